"""Views of speech: lengths, pitch, loudness of noise; and each row by itself."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_ema_scaling.data.speech_views import AdditiveNoise, SpeedPerturbation
from hf_ema_scaling.data.views import changes_length

RATE = 16_000


def batch(name: str) -> dict[str, Tensor]:
    """Rows of different lengths: tones of 400, 500, 600 Hz, or ramps over time that differ by bin."""
    lengths = [8000, 6001, 7777] if name == "input_values" else [80, 61, 77]
    rows: list[Tensor] = []
    for number, length in enumerate(lengths):
        if name == "input_values":
            time = torch.arange(length) / RATE
            rows.append(torch.sin(2 * math.pi * (400 + 100 * number) * time))
        else:
            rows.append(torch.arange(length)[:, None] * torch.tensor([1.0, -2.0, 0.5]))
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones(length).long() for length in lengths], batch_first=True)
    return {name: torch.nn.utils.rnn.pad_sequence(rows, batch_first=True), "attention_mask": mask}


def single(inputs: dict[str, Tensor], row: int) -> dict[str, Tensor]:
    length = int(inputs["attention_mask"][row].sum())
    return {name: value[row : row + 1, :length] for name, value in inputs.items()}


@pytest.mark.parametrize("name", ["input_values", "input_features"])
@pytest.mark.parametrize("view", [SpeedPerturbation((0.8, 0.9, 1.1, 1.25)), AdditiveNoise(0.7)])
def test_a_row_is_changed_alike_alone_and_among_others(name: str, view: Any) -> None:
    inputs, seeds = batch(name), [3, 2**40 + 1, 5]
    before, state = {key: value.clone() for key, value in inputs.items()}, torch.get_rng_state()
    together = {**inputs, **view(inputs, seeds)}
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(inputs[key], before[key]) for key in inputs)
    torch.manual_seed(7)
    again = view(inputs, seeds)
    assert all(torch.equal(again[key], together[key]) for key in again)
    for row, seed in enumerate(seeds):
        alone = {**single(inputs, row), **view(single(inputs, row), [seed])}
        length = alone[name].shape[1]
        assert int(together["attention_mask"][row].sum()) == length
        assert torch.equal(together[name][row, :length], alone[name][0])
        assert not together[name][row, length:].any()
    others = view(inputs, [10, 11, 12])
    assert not torch.equal(others[name][:, :50], again[name][:, :50])


@pytest.mark.parametrize("speed", [0.5, 0.9, 1.1, 1.05, 2.0])
def test_a_faster_tone_is_shorter_and_higher(speed: float) -> None:
    inputs = batch("input_values")
    changed = SpeedPerturbation([speed])(inputs, [0, 0, 0])
    lengths = changed["attention_mask"].sum(-1).tolist()
    assert lengths == [math.ceil(round(length / speed, 6)) for length in (8000, 6001, 7777)]
    assert changed["attention_mask"].dtype == torch.int64
    for row, length in enumerate(lengths):
        time = torch.arange(length) / RATE
        expected = torch.sin(2 * math.pi * (400 + 100 * row) * speed * time)
        inside = slice(200, length - 200)
        assert torch.allclose(changed["input_values"][row, :length][inside], expected[inside], atol=0.02)


@pytest.mark.parametrize("speed", [0.8, 1.25])
def test_features_are_stretched_in_time_and_keep_their_bins(speed: float) -> None:
    inputs = batch("input_features")
    changed = SpeedPerturbation([speed])(inputs, [0, 0, 0])
    lengths = changed["attention_mask"].sum(-1).tolist()
    assert lengths == [math.ceil(length / speed) for length in (80, 61, 77)]
    for row, length in enumerate(lengths):
        original = int(inputs["attention_mask"][row].sum())
        # A ramp stays a ramp: the middle of output frame i lies at (i + 1/2) * original / length.
        places = (torch.arange(length) + 0.5) * original / length - 0.5
        expected = places.clamp(0, original - 1)[:, None] * torch.tensor([1.0, -2.0, 0.5])
        assert torch.allclose(changed["input_features"][row, :length], expected, atol=1e-3)


def test_speeds_are_equally_likely_and_speed_1_keeps_bits() -> None:
    inputs = {"input_features": torch.randn(600, 20, 2), "attention_mask": torch.ones(600, 20, dtype=torch.int32)}
    changed = SpeedPerturbation((0.8, 1.0, 1.25))(inputs, range(600))
    lengths = changed["attention_mask"].sum(-1)
    counts = [int((lengths == length).sum()) for length in (25, 20, 16)]
    assert sum(counts) == 600 and min(counts) > 160
    assert changed["attention_mask"].dtype == torch.int32
    same = lengths == 20
    assert torch.equal(changed["input_features"][same][:, :20], inputs["input_features"][same])
    assert changes_length(SpeedPerturbation()) and not changes_length(AdditiveNoise())


def test_without_a_mask_rows_are_full() -> None:
    changed = SpeedPerturbation([2.0])({"input_values": torch.randn(2, 100)}, [0, 1])
    assert changed.keys() == {"input_values"} and changed["input_values"].shape == (2, 50)


@pytest.mark.parametrize("name", ["input_values", "input_features"])
@pytest.mark.parametrize("snr", [0.0, 20.0])
def test_noise_is_as_loud_as_it_says(name: str, snr: float) -> None:
    rows = 3 + 5 * torch.randn(40, 4000 if name == "input_values" else 500, *([] if name == "input_values" else [8]))
    added = AdditiveNoise(1.0, (snr, snr))({name: rows}, range(40))[name] - rows
    ratio = 10 * torch.log10(rows.flatten(1).var(1) / added.flatten(1).var(1))
    assert torch.allclose(ratio, torch.full((40,), snr), atol=0.4)
    assert abs(float(torch.corrcoef(added.flatten(1))[0, 1])) < 0.1


def test_noise_falls_on_its_share_of_rows_and_between_its_ratios() -> None:
    rows = torch.randn(500, 2000)
    added = AdditiveNoise(0.3, (5.0, 25.0))({"input_values": rows}, range(500))["input_values"] - rows
    noisy = added.abs().sum(1) > 0
    assert 0.24 < float(noisy.float().mean()) < 0.36
    ratio = 10 * torch.log10(rows[noisy].var(1) / added[noisy].var(1))
    assert 4.5 < float(ratio.min()) < 7.0 and 23.0 < float(ratio.max()) < 25.5
    assert float(ratio.mean()) == pytest.approx(15.0, abs=1.5)


def test_silence_gets_no_noise() -> None:
    assert not AdditiveNoise(1.0)({"input_values": torch.zeros(2, 50)}, [0, 1])["input_values"].any()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SpeedPerturbation([]), r"speeds must be one or more numbers in \[0.5, 2\], got \[\]"),
        (lambda: SpeedPerturbation([1.0, 3.0]), r"got \[1.0, 3.0\]"),
        (lambda: AdditiveNoise(1.5), "probability must lie in"),
        (lambda: AdditiveNoise(0.5, (20.0, 10.0)), "a lowest and a highest"),
        (lambda: SpeedPerturbation()({"input_ids": torch.zeros(1, 2)}, [0]), r"got \['input_ids'\]"),
    ],
)
def test_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
