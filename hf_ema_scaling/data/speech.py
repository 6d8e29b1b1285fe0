"""Speech before it is rows: reading audio files, a processor of characters, SpecAugment."""

from __future__ import annotations

import io
import json
import logging
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import numpy.typing as npt
import soundfile
import torch
import torchaudio
from torch import Tensor
from transformers import Speech2TextFeatureExtractor, Wav2Vec2BertProcessor, Wav2Vec2CTCTokenizer

from hf_ema_scaling.data.seeding import spread_seed
from hf_ema_scaling.data.wav import missing_bytes

logger = logging.getLogger(__name__)

Waveform = npt.NDArray[np.float32]
AudioSource = str | Path | bytes | Mapping[str, Any]

PAD, DELIMITER, UNKNOWN = "<pad>", "|", "<unk>"
FRAME_SECONDS = 0.025  # window of the log-mel extractors of transformers


class AudioError(ValueError):
    """An audio source that cannot be used; the message names it and says why."""


@lru_cache(maxsize=8)
def _resampler(source_rate: int, target_rate: int) -> torchaudio.transforms.Resample:
    return torchaudio.transforms.Resample(source_rate, target_rate)


def resample(waveform: Waveform, source_rate: int, target_rate: int) -> Waveform:
    """Band-limited resampling of float32 (samples,) by torchaudio's windowed sinc."""
    if source_rate == target_rate:
        return waveform
    resampled: Waveform = _resampler(source_rate, target_rate)(torch.from_numpy(waveform)).numpy()
    return resampled


def read_audio(source: AudioSource, sampling_rate: int = 16_000) -> Waveform:
    """Read, mix down to mono and resample.

    Args:
        source: a path; the bytes of a file; or a row of `datasets`: `{"path", "bytes"}` (`Audio(decode=False)`) or
            `{"array", "sampling_rate"}`, whose array is (samples,) or (channels, samples), in floats in [-1, 1] or
            16-bit integers.
        sampling_rate: of the result, in hertz.

    Returns:
        float32 (samples,).

    Raises:
        AudioError: when the source is missing, unreadable, of an unknown kind, empty, or not finite.
    """
    name, samples, rate = _decoded(source)
    if samples.size == 0:
        raise AudioError(f"{name}: no samples")
    if not np.isfinite(samples).all():
        raise AudioError(f"{name}: {int((~np.isfinite(samples)).sum())} samples are NaN or infinite")
    if rate <= 0:
        raise AudioError(f"{name}: a sampling rate of {rate} Hz")
    return resample(np.ascontiguousarray(samples, dtype=np.float32), rate, sampling_rate)


def _decoded(source: AudioSource) -> tuple[str, npt.NDArray[Any], int]:
    """Name for messages, mono samples, rate."""
    if isinstance(source, Mapping):
        if source.get("array") is not None:
            return _decoded_array(source)
        path, content = source.get("path"), source.get("bytes")
        if content is not None:
            return _decoded_file(str(path or f"{len(content)} bytes"), content)
        if path is None:
            raise AudioError(f"audio row with keys {sorted(source)} holds no 'array', 'bytes' or 'path'")
        source = path
    if isinstance(source, bytes):
        return _decoded_file(f"{len(source)} bytes", source)
    if isinstance(source, str | Path):
        if not Path(source).is_file():
            raise AudioError(f"{source}: no such file")
        return _decoded_file(str(source))
    raise AudioError(f"audio of type {type(source).__name__}: give a path, bytes, or a row of an audio column")


def _decoded_array(source: Mapping[str, Any]) -> tuple[str, npt.NDArray[Any], int]:
    name = str(source.get("path") or "audio array")
    if source.get("sampling_rate") is None:
        raise AudioError(f"{name}: an 'array' needs its 'sampling_rate'")
    array = np.asarray(source["array"])
    # int64 is what a list of ints is, and what the numpy format of `datasets` makes of an int16 column.
    if array.dtype in (np.int16, np.int64) and array.size and array.min() >= -32768 and array.max() <= 32767:
        array = array.astype(np.float32) / 32768
    elif array.dtype.kind != "f":
        raise AudioError(f"{name}: samples of type {array.dtype}; give floats in [-1, 1] or 16-bit integers")
    if array.ndim == 2 and array.shape[0] <= max(array.shape[1], 1):
        array = array.mean(0)
    if array.ndim != 1:
        raise AudioError(f"{name}: an array of shape {array.shape}; give (samples,) or (channels, samples)")
    return name, array, int(source["sampling_rate"])


def _decoded_file(name: str, content: bytes | None = None) -> tuple[str, npt.NDArray[Any], int]:
    try:
        with open(name, "rb") if content is None else io.BytesIO(content) as file:
            missing = missing_bytes(file)
            samples, rate = soundfile.read(file, dtype="float32", always_2d=True)
    except (soundfile.SoundFileError, OSError) as error:
        raise AudioError(f"{name}: not readable as audio ({error})") from error
    if missing:
        raise AudioError(
            f"{name}: cut short after {len(samples) / rate:.2f} s, its header promises {missing} more bytes of sound: "
            "fetch or write the file again"
        )
    return name, samples.mean(axis=1), int(rate)


def build_character_processor(
    texts: Iterable[str], *, sampling_rate: int = 16_000, num_mel_bins: int = 80
) -> Wav2Vec2BertProcessor:
    """A processor for a CTC model trained from scratch on log-mel features and characters.

    Features are Kaldi log-mel filter banks, every 10 ms, each bin with mean 0 and variance 1 over the utterance
    (`Speech2TextFeatureExtractor`). Ids are 0 `<pad>`, which is also the CTC blank, 1 `|` between words, 2 `<unk>`,
    then the characters in code point order. `Wav2Vec2BertProcessor` is the processor class of transformers that pairs
    `input_features` with this tokenizer; `AutoProcessor.from_pretrained` reads it back from its own folder.

    Args:
        texts: texts whose characters make the vocabulary, or an alphabet as one string. Case counts.
        sampling_rate: in hertz.
        num_mel_bins: features per frame.

    Raises:
        ValueError: when there are no characters.
    """
    characters = sorted({character for text in texts for character in text if not character.isspace()} - {DELIMITER})
    if not characters:
        raise ValueError("no characters to make a vocabulary of: give training texts, or an alphabet")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "vocab.json"
        file.write_text(json.dumps({token: i for i, token in enumerate([PAD, DELIMITER, UNKNOWN, *characters])}))
        tokenizer = Wav2Vec2CTCTokenizer(
            str(file), bos_token=None, eos_token=None, unk_token=UNKNOWN, pad_token=PAD, word_delimiter_token=DELIMITER
        )
    extractor = Speech2TextFeatureExtractor(
        feature_size=num_mel_bins, num_mel_bins=num_mel_bins, sampling_rate=sampling_rate
    )
    return Wav2Vec2BertProcessor(feature_extractor=extractor, tokenizer=tokenizer)


@contextmanager
def quiet_unless_terminal() -> Iterator[None]:
    """No progress bars of `datasets` where nobody would see them move."""
    silence = not sys.stderr.isatty() and not datasets.are_progress_bars_disabled()
    if silence:
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        if silence:
            datasets.enable_progress_bars()


class SpecAugment:
    """Masks bands of bins and spans of frames with zeros (SpecAugment, arXiv 1904.08779, without time warping).

    Zero is the mean of features that were normalised per utterance, as `build_character_processor` makes them. What a
    row becomes depends on its seed, content and length, not on its neighbours, the padding, the device or the global
    random state, which is left as it was.

    Args:
        num_freq_masks: masks over bins.
        freq_width: each is narrower than this many bins.
        num_time_masks: masks over frames.
        time_width: each is shorter than this many frames,
        time_share: and than this share of the utterance.
        bins_first: whether features are (rows, bins, frames) in a window without attention mask, as Whisper's are.

    Raises:
        ValueError: when a number is negative, or `time_share` is not in [0, 1].
    """

    def __init__(
        self,
        num_freq_masks: int = 2,
        freq_width: int = 15,
        num_time_masks: int = 2,
        time_width: int = 20,
        time_share: float = 0.2,
        *,
        bins_first: bool = False,
    ) -> None:
        counts = (num_freq_masks, freq_width, num_time_masks, time_width)
        if min(counts) < 0 or not 0.0 <= time_share <= 1.0:
            raise ValueError(f"masks {counts} must not be negative, and time_share {time_share} must be in [0, 1]")
        self.num_freq_masks = num_freq_masks
        self.freq_width = freq_width
        self.num_time_masks = num_time_masks
        self.time_width = time_width
        self.time_share = time_share
        self.bins_first = bins_first

    def __call__(self, inputs: Mapping[str, Tensor], seeds: Sequence[int]) -> dict[str, Tensor]:
        """The `input_features` of padded inputs, masked; `attention_mask` tells their lengths where there is one.

        Raises:
            ValueError: when the inputs have no `input_features`.
        """
        features = inputs.get("input_features")
        if features is None:
            raise ValueError(f"SpecAugment masks 'input_features', which are not among the inputs {sorted(inputs)}")
        if self.bins_first:
            frames = [features.shape[2]] * len(features)
            return {"input_features": self.masked(features.transpose(1, 2), frames, seeds).transpose(1, 2)}
        mask = inputs.get("attention_mask")
        lengths = [features.shape[1]] * len(features) if mask is None else mask.sum(-1)
        return {"input_features": self.masked(features, lengths, seeds)}

    def masked(self, features: Tensor, lengths: Tensor | Sequence[int], seeds: Sequence[int]) -> Tensor:
        """A masked copy of `features` (rows, frames, bins); padding behind `lengths` is not touched.

        Raises:
            ValueError: when there is not one length and one seed per row.
        """
        rows, frames, bins = features.shape
        sizes = [int(length) for length in lengths]
        if len(sizes) != rows or len(seeds) != rows or max(sizes, default=0) > frames:
            raise ValueError(
                f"features {tuple(features.shape)} need {rows} lengths of at most {frames} and {rows} seeds, got "
                f"{sizes} and {len(seeds)} seeds"
            )
        masked = torch.zeros(rows, frames, bins, dtype=torch.bool)
        # torchaudio draws from the global CPU generator, so each row seeds it and the fork puts it back.
        with torch.random.fork_rng(devices=[]):
            for row, (size, seed) in enumerate(zip(sizes, seeds, strict=True)):
                torch.default_generator.manual_seed(spread_seed(seed))
                masked[row, :size] = self._mask(size, bins)
        return features.masked_fill(masked.to(features.device), 0.0)

    def _mask(self, frames: int, bins: int) -> Tensor:
        """True (frames, bins) where one utterance is masked."""
        kept = torch.ones(1, frames, bins)
        time_width = min(self.time_width, int(frames * self.time_share))
        for _ in range(self.num_time_masks):
            kept = torchaudio.functional.mask_along_axis(kept, time_width, 0.0, axis=1)
        for _ in range(self.num_freq_masks):
            kept = torchaudio.functional.mask_along_axis(kept, min(self.freq_width, bins), 0.0, axis=2)
        return kept[0] == 0
