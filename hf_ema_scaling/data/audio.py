"""Reading audio: any file or row of samples becomes one mono waveform, or an error that names it."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import soundfile
import torch
import torchaudio

from hf_ema_scaling.data.bad_items import BadItemError
from hf_ema_scaling.data.wav import missing_bytes

Waveform = npt.NDArray[np.float32]
AudioSource = str | Path | bytes | Mapping[str, Any]

FULL_SCALE_LIMIT = 8.0
"""Largest sample that is taken for a float in [-1, 1] with headroom (18 dB)."""
UNKNOWN = 1e9
"""Seconds that no header means: what it says where the length is not known."""
KERNEL_LIMIT = 2**24
"""Most weights of a resampling filter: 64 MB. Rates that share no large divisor ask for gigabytes."""


class AudioError(BadItemError):
    """An audio source that cannot be used; the message names it and says why."""


@lru_cache(maxsize=8)
def _resampler(source_rate: int, target_rate: int) -> torchaudio.transforms.Resample:
    return torchaudio.transforms.Resample(source_rate, target_rate)


def resample(waveform: Waveform, source_rate: int, target_rate: int) -> Waveform:
    """Band-limited resampling of float32 (samples,) by torchaudio's windowed sinc.

    Raises:
        ValueError: for rates whose filter would need gigabytes, such as 44101 to 16000.
    """
    if source_rate == target_rate:
        return waveform
    divisor = math.gcd(source_rate, target_rate)
    # The filter has a row per output phase, as wide as an input period and several periods of the lower rate.
    old, new = source_rate // divisor, target_rate // divisor
    if (old + 14 * max(1, old // new)) * new > KERNEL_LIMIT:
        raise ValueError(
            f"{source_rate} Hz and {target_rate} Hz have no large common divisor, so that the filter between them "
            "would fill the memory: resample the file to a usual rate first"
        )
    resampled: Waveform = _resampler(source_rate, target_rate)(torch.from_numpy(waveform)).numpy()
    return resampled


def read_audio(source: AudioSource, sampling_rate: int = 16_000, longest: float = math.inf) -> Waveform:
    """Read, mix down to mono and resample.

    Args:
        source: a path; the bytes of a file; or a row of `datasets`: `{"path", "bytes"}` (`Audio(decode=False)`) or
            `{"array", "sampling_rate"}`, whose array is (samples,) or (channels, samples), in floats in [-1, 1] or
            16-bit integers.
        sampling_rate: of the result, in hertz.
        longest: seconds above which a file is not decoded, if its header says how long it is: an hour takes memory
            and time before anybody can say that it is not wanted.

    Returns:
        float32 (samples,).

    Raises:
        BadItemError: "too_long", by the header of a file.
        AudioError: when the source is missing, unreadable, of an unknown kind, empty, not finite, or far above full
            scale. Its `reason` is one of "no_audio", "missing_file", "unreadable", "cut_short", "no_samples",
            "not_finite", "out_of_range", "bad_rate", "bad_array".
    """
    name, samples, rate = _decoded(source, longest)
    if samples.size == 0:
        raise AudioError(f"{name}: no samples", "no_samples")
    if not np.isfinite(samples).all():
        raise AudioError(f"{name}: {int((~np.isfinite(samples)).sum())} samples are NaN or infinite", "not_finite")
    peak = float(np.abs(samples).max())
    if peak > FULL_SCALE_LIMIT:
        raise AudioError(
            f"{name}: samples of up to {peak:.6g}, where floats are in [-1, 1]: divide them by the full scale of the "
            "integers they come from (32768 for 16 bits)",
            "out_of_range",
        )
    if rate <= 0:
        raise AudioError(f"{name}: a sampling rate of {rate} Hz", "bad_rate")
    try:
        return resample(np.ascontiguousarray(samples, dtype=np.float32), rate, sampling_rate)
    except ValueError as error:
        raise AudioError(f"{name}: {error}", "bad_rate") from error


def is_file(path: str | Path) -> bool:
    """Whether there is such a file; also for what can be no path, such as one that is too long."""
    try:
        return Path(path).is_file()
    except (OSError, ValueError):
        return False


def _decoded(source: AudioSource, longest: float) -> tuple[str, npt.NDArray[Any], int]:
    """Name for messages, mono samples, rate."""
    if isinstance(source, Mapping):
        if source.get("array") is not None:
            return _decoded_array(source)
        path, content = source.get("path"), source.get("bytes")
        if content is not None:
            return _decoded_file(str(path or f"{len(content)} bytes"), longest, content)
        if path is None:
            raise AudioError(f"audio row with keys {sorted(source)} holds no 'array', 'bytes' or 'path'", "no_audio")
        source = path
    if isinstance(source, bytes):
        return _decoded_file(f"{len(source)} bytes", longest, source)
    if isinstance(source, str | Path):
        if not is_file(source):
            raise AudioError(f"{source}: no such file", "missing_file")
        return _decoded_file(str(source), longest)
    raise AudioError(
        f"audio of type {type(source).__name__}: give a path, bytes, or a row of an audio column", "no_audio"
    )


def _decoded_array(source: Mapping[str, Any]) -> tuple[str, npt.NDArray[Any], int]:
    name, rate = str(source.get("path") or "audio array"), source.get("sampling_rate")
    if rate is None:
        raise AudioError(f"{name}: an 'array' needs its 'sampling_rate'", "bad_rate")
    try:
        whole = int(rate)
        if whole != float(rate):
            raise ValueError
    except (TypeError, ValueError, OverflowError) as error:
        raise AudioError(f"{name}: a sampling rate of {rate!r}, not a whole number of hertz", "bad_rate") from error
    try:
        array = np.asarray(source["array"])
    except ValueError as error:
        raise AudioError(f"{name}: its array holds lists of different lengths", "bad_array") from error
    # int64 is what a list of ints is, and what the numpy format of `datasets` makes of an int16 column.
    if array.dtype in (np.int16, np.int64) and array.size and array.min() >= -32768 and array.max() <= 32767:
        array = array.astype(np.float32) / 32768
    elif array.dtype.kind != "f":
        raise AudioError(
            f"{name}: samples of type {array.dtype}; give floats in [-1, 1] or 16-bit integers", "bad_array"
        )
    if array.ndim == 2 and array.shape[0] <= max(array.shape[1], 1):
        array = array.mean(0)
    if array.ndim != 1:
        raise AudioError(
            f"{name}: an array of shape {array.shape}; give (samples,) or (channels, samples)", "bad_array"
        )
    return name, array, whole


def _decoded_file(name: str, longest: float, content: bytes | None = None) -> tuple[str, npt.NDArray[Any], int]:
    try:
        with open(name, "rb") if content is None else io.BytesIO(content) as file:
            missing = missing_bytes(file)
            with soundfile.SoundFile(file) as sound:
                rate, seconds = sound.samplerate, sound.frames / max(1, sound.samplerate)
                if not missing and longest < seconds < UNKNOWN:
                    told = f"{seconds:.3f} s of audio, at most {longest:g} s are wanted"
                    raise BadItemError(told, "too_long", seconds)
                samples = sound.read(dtype="float32", always_2d=True)
    except BadItemError:
        raise
    except (soundfile.SoundFileError, OSError, ValueError, MemoryError) as error:
        raise AudioError(f"{name}: not readable as audio ({error})", "unreadable") from error
    if missing:
        raise AudioError(
            f"{name}: cut short after {len(samples) / rate:.2f} s, its header promises {missing} more bytes of sound: "
            "fetch or write the file again",
            "cut_short",
        )
    return name, samples.mean(axis=1), int(rate)
