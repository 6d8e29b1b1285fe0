"""A model ready to label: with which labeler, what it reads, and how its labels are written down."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from hf_ema_scaling.labels import Labeler, PseudoLabel
from hf_ema_scaling.labels.filter_base import Decode

SPEECH, TEXT, WORDS, SOURCE, PROMPT = "speech", "text", "words", "source", "prompt"
"""What a head reads: audio, texts to classify, words to tag, texts to translate or summarise, prompts to continue."""
COLUMNS = {SPEECH: "audio", TEXT: "text", WORDS: "tokens", SOURCE: "source", PROMPT: "prompt"}
"""The column in which it is expected, where none is named; as recipes have them."""


@dataclass(frozen=True)
class Column:
    """A column that the labels of one kind of head have beside those of all (`OUTPUT_FEATURES`).

    Args:
        feature: its type in `datasets`.
        value: of a label; of one that has neither ids nor values what stands for nothing.
    """

    feature: Any
    value: Callable[[PseudoLabel], Any]


@dataclass(frozen=True)
class Head:
    """A model ready to label.

    Args:
        model: in eval mode, on its device.
        processing_class: processor or tokenizer.
        labeler: turns the model's output into labels.
        kind: what it reads: `speech`, `text`, `words`, `source` or `prompt`.
        decode: the label as text; not asked where there are neither ids nor values.
        name: of the folder or repository it comes from.
        text: label ids to text, for filters; None where labels are no text.
        columns: what else is written of a label, by name.
        prefix: what is written before each text that the model reads (T5's instruction).
        settings: what the labels were asked to be, as JSON values, for the record.
    """

    model: nn.Module
    processing_class: Any
    labeler: Labeler
    kind: str
    decode: Callable[[PseudoLabel], str]
    name: str = ""
    text: Decode | None = None
    columns: Mapping[str, Column] = field(default_factory=dict)
    prefix: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
