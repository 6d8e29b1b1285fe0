"""Views of texts, as recipes name them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from hf_ema_scaling.data.text_views import TokenMasking, WordDropout
from hf_ema_scaling.data.views import Augmentation, Chain


@dataclass
class TextViewArguments:
    """What the student sees of a text, from `augment_start` on; the teacher sees it as it is."""

    mask_share: float = field(default=0.0, metadata={"help": "Replace so many of the tokens by the mask token."})
    word_dropout: float = field(
        default=0.0, metadata={"help": "Leave out so many of the words; not for labels by token."}
    )

    def build(self, tokenizer: Any) -> Augmentation | None:
        """The views in turn, None if all are off.

        Raises:
            ValueError: for a share outside [0, 1), or a tokenizer without the token that it takes.
        """
        views: list[Augmentation] = []
        if self.word_dropout:
            views.append(WordDropout.from_tokenizer(tokenizer, self.word_dropout))
        if self.mask_share:
            views.append(TokenMasking.from_tokenizer(tokenizer, self.mask_share))
        return Chain(*views) if views else None
