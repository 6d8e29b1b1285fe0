"""From a row of a data set to what the model reads, one row at a time, and from rows to batches of bounded size."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from hf_ema_scaling.data.audio import read_audio
from hf_ema_scaling.data.bad_items import BadItemError, text_of
from hf_ema_scaling.data.collator import CTCCollator
from hf_ema_scaling.data.speech_rows import check_seconds, features_of
from hf_ema_scaling.labelling.heads import SPEECH, Head
from hf_ema_scaling.labels.ctc import frames_of, sees_padding


@dataclass(frozen=True)
class Prepared:
    """What the model reads of one row.

    Args:
        inputs: arrays or lists by input name, without padding.
        length: in samples, frames or tokens.
        size: in seconds of audio or tokens: what batches are bounded by and the summary counts.
    """

    inputs: dict[str, Any]
    length: int
    size: float


class Inputs(Protocol):
    """How rows of one kind are read."""

    column: str
    unit: str
    same_length: bool
    """Whether rows of a batch must have one length, since padding would change their labels."""

    def prepare(self, row: Mapping[str, Any]) -> Prepared:
        """One row for the model.

        Raises:
            BadItemError: a row that the model cannot read.
        """
        ...

    def collate(self, rows: Sequence[Prepared]) -> dict[str, Tensor]:
        """A padded batch."""
        ...


class SpeechInputs:
    """Audio for a speech model: read, resampled, features.

    Args:
        head: of a speech model.
        column: of the audio.
        seconds: shortest and longest audio that is labelled.
    """

    unit = "seconds"

    def __init__(self, head: Head, column: str, seconds: tuple[float, float]) -> None:
        self.column = column
        self.seconds = seconds
        self.model = head.model
        self.extractor = getattr(head.processing_class, "feature_extractor", head.processing_class)
        self._collate = CTCCollator.from_processor(head.processing_class)
        # Without a mask every model takes padding for sound.
        self.same_length = not self._collate.attention_mask or sees_padding(head.model)

    def prepare(self, row: Mapping[str, Any]) -> Prepared:
        """Features of the row's audio."""
        waveform = read_audio(row[self.column], self.extractor.sampling_rate)
        duration = len(waveform) / self.extractor.sampling_rate
        try:
            check_seconds(duration, self.seconds)
            features = features_of(waveform, self.extractor)
            if not int(frames_of(self.model, torch.tensor([len(features)]))):
                raise BadItemError(f"{duration:.3f} s of audio make no frame of the model", "no_features")
        except BadItemError as error:
            error.size = duration
            raise
        return Prepared({self.extractor.model_input_names[0]: features}, len(features), duration)

    def collate(self, rows: Sequence[Prepared]) -> dict[str, Tensor]:
        """Padded features."""
        return self._collate([row.inputs for row in rows])


class TextInputs:
    """Texts for a text model.

    Args:
        head: of a text model.
        column: of the texts.
        max_length: tokens at which they are cut; the most that tokenizer and model know when None.

    Raises:
        ValueError: when the tokenizer has no padding token.
    """

    unit = "tokens"
    same_length = False

    def __init__(self, head: Head, column: str, max_length: int | None = None) -> None:
        self.column = column
        self.tokenizer = head.processing_class
        if self.tokenizer.pad_token_id is None:
            raise ValueError("the tokenizer has no padding token, and texts of a batch differ in length: set one")
        known = [self.tokenizer.model_max_length, getattr(head.model.config, "max_position_embeddings", None)]
        self.max_length = min(length for length in (max_length, *known) if length is not None)

    def prepare(self, row: Mapping[str, Any]) -> Prepared:
        """Token ids of the row's text."""
        text = text_of(row[self.column], self.column)
        if not text.strip():
            raise BadItemError(f"{self.column} is empty", "empty_text")
        encoded = dict(self.tokenizer(text, truncation=True, max_length=self.max_length))
        return Prepared(encoded, len(encoded["input_ids"]), float(len(encoded["input_ids"])))

    def collate(self, rows: Sequence[Prepared]) -> dict[str, Tensor]:
        """Padded ids."""
        return dict(self.tokenizer.pad([row.inputs for row in rows], return_tensors="pt"))


def inputs_of(head: Head, column: str | None, seconds: tuple[float, float], max_length: int | None) -> Inputs:
    """How the rows of a head are read; `column` is `audio` or `text` when None."""
    if head.kind == SPEECH:
        return SpeechInputs(head, column or "audio", seconds)
    return TextInputs(head, column or "text", max_length)


def batches(rows: Sequence[Prepared], limit: float, same_length: bool) -> Iterator[list[int]]:
    """Row numbers of each batch: the longest rows first, padded size at most `limit`, at least one row.

    Args:
        rows: to be batched.
        limit: in units of `Prepared.size`; rows count as long as the longest of their batch.
        same_length: whether rows of a batch must have one length.
    """
    order = sorted(range(len(rows)), key=lambda number: -rows[number].length)
    batch: list[int] = []
    for number in order:
        longest = rows[batch[0]] if batch else None
        if longest is not None and (
            (len(batch) + 1) * longest.size > limit or (same_length and rows[number].length != longest.length)
        ):
            yield batch
            batch = []
        batch.append(number)
    if batch:
        yield batch
