"""How the rows of a head are read."""

from __future__ import annotations

from hf_ema_scaling.labelling.heads import COLUMNS, SPEECH, TEXT, WORDS, Head
from hf_ema_scaling.labelling.inputs import Inputs
from hf_ema_scaling.labelling.speech_inputs import SpeechInputs
from hf_ema_scaling.labelling.text_inputs import TextInputs, WordInputs, WrittenInputs


def inputs_of(head: Head, column: str | None, seconds: tuple[float, float | None], max_length: int | None) -> Inputs:
    """How the rows of a head are read.

    Args:
        head: that labels them.
        column: of what it reads; that of `COLUMNS` when None.
        seconds: shortest and longest audio, as in `SpeechInputs`.
        max_length: most tokens of a text; the most that the model knows when None.

    Raises:
        ValueError, TypeError: for a tokenizer that cannot do what it must.
    """
    name = column or COLUMNS[head.kind]
    if head.kind == SPEECH:
        return SpeechInputs(head, name, seconds)
    if head.kind == TEXT:
        return TextInputs(head, name, max_length)
    if head.kind == WORDS:
        return WordInputs(head, name, max_length)
    return WrittenInputs(head, name, max_length)
