"""Views of speech for the student: faster or slower, and in noise; of waveforms or of log-mel features.

What a row becomes depends on its seed, content and length only (see `data.views`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fractions import Fraction

import torch
import torchaudio
from torch import Tensor
from torch.nn import functional as F

from hf_ema_scaling.data.seeding import spread_seed

SPEECH_INPUTS = ("input_values", "input_features")
FINEST_SPEED = 100
"""Speeds are fractions with a denominator of at most this: 1.05 is 21/20."""


class SpeedPerturbation:
    """Plays each row at a speed drawn from a few (Ko et al., "Audio augmentation for speech recognition", 2015).

    Waveforms are resampled, so pitch and formants move with the tempo, as in the paper. Log-mel features are
    interpolated linearly over time, which changes the tempo alone: the bins stay where they are. Lengths become
    `ceil(length / speed)`, and `attention_mask` (where there is one) follows; behind them is zero.

    A faster row has fewer frames, and this view sees no labels. That a CTC label still fits is up to the trainer,
    which knows both: rows whose label would not fit go back to what they were (`training.augment.keep_fitting`).

    Args:
        speeds: with equal chances; 1.1 is ten per cent faster. A row at speed 1 keeps its bits.

    Raises:
        ValueError: without a speed, or for one outside [0.5, 2].
    """

    changes_length = True

    def __init__(self, speeds: Sequence[float] = (0.9, 1.0, 1.1)) -> None:
        if not speeds or not all(0.5 <= speed <= 2.0 for speed in speeds):
            raise ValueError(f"speeds must be one or more numbers in [0.5, 2], got {list(speeds)}")
        self.speeds = [Fraction(speed).limit_denominator(FINEST_SPEED) for speed in speeds]

    def __call__(self, inputs: Mapping[str, Tensor], seeds: Sequence[int]) -> dict[str, Tensor]:
        """The speech input and its `attention_mask`, as far as they are there.

        Raises:
            ValueError: when the inputs hold no speech.
        """
        name, lengths = _speech(inputs)
        rows = [
            _played(row[:length], self.speeds[int(torch.randint(len(self.speeds), (), generator=_generator(seed)))])
            for row, length, seed in zip(inputs[name], lengths, seeds, strict=True)
        ]
        changed = {name: torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)}
        if "attention_mask" in inputs:
            mask = inputs["attention_mask"]
            sizes = torch.tensor([len(row) for row in rows], device=mask.device)
            places = torch.arange(changed[name].shape[1], device=mask.device)
            changed["attention_mask"] = (places[None] < sizes[:, None]).to(mask.dtype)
        return changed


class AdditiveNoise:
    """Adds white Gaussian noise to some rows, at a ratio of signal to noise drawn evenly in decibels.

    The signal's power is the variance of the row, over its length; of log-mel features over all bins, where the noise
    is one of the features and no sound: it blurs, as SpecAugment masks. Padding is not touched.

    Args:
        probability: with which a row gets noise.
        snr: lowest and highest ratio, in dB.

    Raises:
        ValueError: for a probability outside [0, 1] or ratios that are not in order.
    """

    def __init__(self, probability: float = 0.5, snr: tuple[float, float] = (10.0, 30.0)) -> None:
        if not 0.0 <= probability <= 1.0:
            raise ValueError(f"probability must lie in [0, 1], got {probability}")
        if not -math.inf < snr[0] <= snr[1] < math.inf:
            raise ValueError(f"snr must be a lowest and a highest number of dB, got {snr}")
        self.probability = probability
        self.snr = snr

    def __call__(self, inputs: Mapping[str, Tensor], seeds: Sequence[int]) -> dict[str, Tensor]:
        """The speech input.

        Raises:
            ValueError: when the inputs hold no speech.
        """
        name, lengths = _speech(inputs)
        noisy = inputs[name].clone()
        for row, length, seed in zip(noisy, lengths, seeds, strict=True):
            generator = _generator(seed)
            chance, place = torch.rand(2, generator=generator).tolist()
            if chance >= self.probability or length < 2:
                continue
            signal = row[:length]
            ratio = 10 ** (-(self.snr[0] + place * (self.snr[1] - self.snr[0])) / 20)
            # On the CPU, so that it is the same on every device.
            noise = torch.randn(signal.shape, generator=generator).to(row)
            signal += noise * (ratio * signal.float().std(correction=0)).to(row)
        return {name: noisy}


def _speech(inputs: Mapping[str, Tensor]) -> tuple[str, list[int]]:
    """Name of the speech among the inputs, and the length of each row."""
    name = next((name for name in SPEECH_INPUTS if name in inputs), None)
    if name is None:
        raise ValueError(f"views of speech change 'input_values' or 'input_features', got {sorted(inputs)}")
    rows, width = inputs[name].shape[:2]
    mask = inputs.get("attention_mask")
    return name, [width] * rows if mask is None else mask.long().sum(-1).tolist()


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(spread_seed(seed))


def _played(row: Tensor, speed: Fraction) -> Tensor:
    """A row `(samples,)` or `(frames, bins)` at another speed."""
    if speed == 1 or not len(row):
        return row
    if row.ndim == 1:
        return torchaudio.functional.resample(row, speed.numerator, speed.denominator)
    frames = math.ceil(len(row) / speed)
    return F.interpolate(row.T[None], size=frames, mode="linear", align_corners=False)[0].T
