"""Known texts as the targets of a decoder, in the form in which the teacher's labels come."""

from __future__ import annotations

import re
from typing import Any

from hf_ema_scaling.data.bad_items import BadItemError
from hf_ema_scaling.labels.seq2seq import Seq2SeqLabeler

TIME = re.compile(r"<\|\d+\.\d\d\|>")
"""How Whisper writes times; its tokenizers do not count them among their special tokens."""


class TextTargets:
    """What a decoder is to learn for a text: forced tokens (language, task), the text, and the end of sequence.

    Exactly the `ids` of a `PseudoLabel` in which the teacher wrote that text.

    Args:
        labeler: of the model.
        tokenizer: of the texts; where source and target have vocabularies of their own, it is used as for targets.
        leading_space: whether the model writes a space before the first word, as Whisper does.

    Raises:
        ValueError: when the labeler lets the teacher choose the language of each row.
    """

    def __init__(self, labeler: Seq2SeqLabeler, tokenizer: Any, *, leading_space: bool = False) -> None:
        if labeler.languages:
            raise ValueError("this model writes many languages: set language, that of the labelled texts")
        self.labeler = labeler
        self.tokenizer = tokenizer
        self.leading_space = leading_space
        # What the vocabulary lacks is a gap in a text, and no mark of ours.
        unknown = {getattr(tokenizer, "unk_token_id", None)} - set(labeler.eos_ids)
        self._special = {*labeler.special_ids, *labeler.eos_ids} - unknown

    def __call__(self, text: str) -> list[int]:
        """The ids of a text, whose white space counts as single spaces; none for a blank one.

        Raises:
            BadItemError: when it holds a special token, such as an end of sequence ("special_tokens"), or a time of
                Whisper's ("times"): what is learnt here says that it has none.
        """
        words = " ".join(text.split())
        if not words:
            return []
        time = TIME.search(words)
        if time is not None and self.labeler.no_speech_id is not None:
            raise BadItemError(f"text {text[:60]!r} holds the time {time.group()}: take times out of texts", "times")
        given = f" {words}" if self.leading_space else words
        ids: list[int] = self.tokenizer(text_target=given, add_special_tokens=False).input_ids
        special = self._special.intersection(ids)
        if special:
            tokens = self.tokenizer.convert_ids_to_tokens(sorted(special))
            raise BadItemError(
                f"text {text[:60]!r} holds {tokens}, which are special tokens and no text: take them out",
                "special_tokens",
            )
        return [*self.labeler.prompt[1:], *ids, self.labeler.eos_ids[0], *self.labeler.suffix]
