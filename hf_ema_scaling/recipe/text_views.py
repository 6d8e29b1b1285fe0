"""Views of texts, as recipes name them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from hf_ema_scaling.data.named_views import build_views, read_views
from hf_ema_scaling.data.text_views import TokenMasking, WordDropout
from hf_ema_scaling.data.views import Augmentation, Chain


@dataclass
class TextViewArguments:
    """What the student sees of a text, from `augment_start` on; the teacher sees it as it is."""

    mask_share: float = field(default=0.0, metadata={"help": "Replace so many of the tokens by the mask token."})
    word_dropout: float = field(
        default=0.0, metadata={"help": "Leave out so many of the words; not for labels by token."}
    )
    views: str | None = field(
        default=None,
        metadata={
            "help": "Views by name in an order of your own, in the place of the arguments above, as a mapping: "
            "{token_masking: {share: 0.15}, word_dropout: {share: 0.1}}."
        },
    )

    def __post_init__(self) -> None:
        if self.views is not None:
            read_views(self.views)
            refuse_both(self, {"mask_share", "word_dropout"})

    def build(self, tokenizer: Any) -> Augmentation | None:
        """The views in turn, None if all are off.

        Raises:
            ValueError: for a share outside [0, 1), a tokenizer without the token that a view takes, or a view of
                speech.
        """
        if self.views is not None:
            return build_views(self.views, tokenizer)
        views: list[Augmentation] = []
        if self.word_dropout:
            views.append(WordDropout.from_tokenizer(tokenizer, self.word_dropout))
        if self.mask_share:
            views.append(TokenMasking.from_tokenizer(tokenizer, self.mask_share))
        return Chain(*views) if views else None


def refuse_both(arguments: Any, names: set[str]) -> None:
    """Refuses arguments that say the same as `views`.

    Args:
        arguments: an instance of a data class with `views`.
        names: of those that turn a view on, off by default.

    Raises:
        ValueError: naming those that are given.
    """
    given = sorted(name for name in names if getattr(arguments, name))
    if given:
        raise ValueError(f"views says all that the student sees: leave {', '.join(given)} out, or views")
