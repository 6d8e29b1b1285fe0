"""Decoding, draws, ends and likelihoods, apart from any model."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from hf_ema_scaling.labels import Decoding
from hf_ema_scaling.labels.generation import (
    GumbelNoise,
    generated_label,
    mean_log_probabilities,
    token_log_probabilities,
    until_end,
)


def test_argmax_of_noisy_scores_is_a_draw_from_their_softmax() -> None:
    scores = torch.tensor([[0.0, 1.0, -1.0, 2.0, -math.inf]]).repeat(4000, 1)
    noise = GumbelNoise(7, range(4000))
    counts = torch.bincount(noise(torch.zeros(4000, 1), scores).argmax(-1), minlength=5).double()
    expected = scores[0].double().softmax(-1) * 4000
    chi_square = float(((counts[:4] - expected[:4]).square() / expected[:4]).sum())
    assert chi_square < 16.3  # 99.9 % point at 3 degrees of freedom
    assert counts[4] == 0
    # The next step draws anew.
    again = torch.bincount(noise(torch.zeros(4000, 1), scores).argmax(-1), minlength=5)
    assert not torch.equal(again, counts.long())


def test_noise_of_a_row_is_its_own() -> None:
    scores = torch.zeros(3, 6)
    together = GumbelNoise(1, [5, 6, 7])(scores, scores)
    alone = GumbelNoise(1, [6])(scores[:1], scores[:1])
    assert torch.equal(alone[0], together[1])
    assert together.dtype == torch.float32
    first = np.random.default_rng([1, 5]).gumbel(size=6).astype(np.float32)
    assert together[0].tolist() == first.tolist()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        ({"num_beams": 0}, "num_beams must be at least 1, got 0"),
        ({"temperature": -1.0}, "temperature must be a number of at least 0, got -1.0"),
        ({"temperature": math.nan}, "temperature must be"),
        ({"temperature": 1.0, "top_p": 0.0}, r"top_p in \(0, 1\], got 0 and 0.0"),
        ({"temperature": 1.0, "top_k": -1}, "top_k must be at least 0"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
        ({"top_k": 5}, "set a temperature above 0"),
        ({"temperature": 0.5, "num_beams": 2}, "temperature=0.5 samples and num_beams=2 searches"),
    ],
)
def test_decoding_refuses(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Decoding(**({"max_new_tokens": 5} | changes))


def test_a_label_ends_with_the_first_end() -> None:
    assert until_end([5, 6, 2, 7, 2], {2, 3}) == ((5, 6, 2), True)
    assert until_end([5, 3, 2], {2, 3}) == ((5, 3), True)
    assert until_end([5, 6], {2}) == ((5, 6), False)
    assert until_end([], {2}) == ((), False)


def test_likelihoods_by_hand() -> None:
    logits = torch.tensor([[[0.0, math.log(3.0)], [math.log(4.0), 0.0], [9.0, 9.0]], [[0.0, 0.0]] * 3])
    targets = torch.tensor([[1, 0, -100], [-100, -100, -100]])
    found = token_log_probabilities(logits, targets)
    assert found[0].tolist() == pytest.approx([math.log(3 / 4), math.log(4 / 5), 0.0])
    assert mean_log_probabilities(logits, targets) == [
        pytest.approx((math.log(3 / 4) + math.log(4 / 5)) / 2),
        -math.inf,
    ]
    half = token_log_probabilities(logits.to(torch.bfloat16), targets)
    assert half.dtype == torch.float32
    with pytest.raises(ValueError, match=r"NaN in rows \[1\]"):
        logits[1, 0, 0] = math.nan
        token_log_probabilities(logits, torch.tensor([[1, 0, -100], [0, -100, -100]]))


@pytest.mark.parametrize(
    ("ended", "text", "room", "reason"),
    [
        (True, [5], None, None),
        (True, [5], 2, None),
        (True, [5], 1, "too_long"),
        (True, [], 1, "empty"),
        (False, [5], 1, "no_eos"),
        (False, [], None, "no_eos"),
    ],
)
def test_reasons(ended: bool, text: list[int], room: int | None, reason: str | None) -> None:
    label = generated_label([5, 2], text=text, ended=ended, room=room, log_probability=-0.5, scores={"copy": 0.25})
    assert (label.reason, label.ids, label.confidence) == (reason, (5, 2), math.exp(-0.5))
    assert label.scores == {"log_probability": -0.5, "ended": float(ended), "copy": 0.25}
