"""Rows of audio for a model that labels: read, resampled, features; one row at a time."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hf_ema_scaling.data.audio import read_audio
from hf_ema_scaling.data.bad_items import BadItemError
from hf_ema_scaling.data.collator import CTCCollator, WindowCollator
from hf_ema_scaling.data.speech_rows import check_seconds, check_window, features_of, window_frames
from hf_ema_scaling.labelling.heads import Head
from hf_ema_scaling.labelling.inputs import Prepared
from hf_ema_scaling.labels.ctc import LENGTH_METHODS, frames_of, sees_padding
from hf_ema_scaling.labels.decoder import bare, is_encoder_decoder

LONGEST = 40.0
"""Seconds of the longest audio that is labelled, where nothing else is said: its attention may not fit into memory."""


class SpeechInputs:
    """Audio for a speech model.

    A model with a fixed window (Whisper's 30 s) hears rows one by one in windows of that length; a row longer than the
    window is broken ("beyond_window"), unless `seconds` leaves it out.

    Args:
        head: of a speech model.
        column: of the audio.
        seconds: shortest and longest audio that is labelled; the longest is `LONGEST` for None, and without limit
            where there is a window.
    """

    unit = "seconds"

    def __init__(self, head: Head, column: str, seconds: tuple[float, float | None]) -> None:
        self.column = column
        self.model = head.model
        self.extractor = getattr(head.processing_class, "feature_extractor", head.processing_class)
        self.frames, self.window = window_frames(self.extractor)
        longest = seconds[1]
        if longest is None:
            longest = LONGEST if self.frames is None else math.inf
        self.seconds = seconds[0], longest
        # Encoder-decoders need not say what they make of a length (Whisper, SeamlessM4T): they take any.
        self.writes = is_encoder_decoder(head.model)
        self.counts = not self.writes or any(hasattr(bare(head.model), method) for method in LENGTH_METHODS)
        padded = CTCCollator.from_processor(head.processing_class)
        self._collate = padded if self.frames is None else WindowCollator(self.frames)
        # Without a mask every model takes padding for sound; those that write are decoded by length where need be.
        without_mask = self.frames is None and not padded.attention_mask
        self.same_length = without_mask or (not self.writes and sees_padding(head.model))

    def prepare(self, row: Mapping[str, Any]) -> Prepared:
        """Features of the row's audio."""
        waveform = read_audio(row[self.column], self.extractor.sampling_rate, self.seconds[1])
        duration = len(waveform) / self.extractor.sampling_rate
        try:
            check_seconds(duration, self.seconds)
            check_window(duration, self.extractor)
            features = features_of(waveform, self.extractor)
            if self.counts and not int(frames_of(self.model, torch.tensor([len(features)]))):
                raise BadItemError(f"{duration:.3f} s of audio make no frame of the model", "no_features")
        except BadItemError as error:
            error.size = duration
            raise
        cost = None if self.frames is None else self.window
        return Prepared({self.extractor.model_input_names[0]: features}, len(features), duration, cost)

    def collate(self, rows: Sequence[Prepared]) -> dict[str, Tensor]:
        """Padded features."""
        return self._collate([row.inputs for row in rows])
