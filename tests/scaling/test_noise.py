"""The noise-scale estimator against gradients whose |G|^2 and Sigma are known."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from hf_ema_scaling.scaling import NoiseScale, noise_estimate

GRADIENT = np.array([0.6, -0.4, 0.2, 0.1])
DEVIATION = np.array([1.0, 0.5, 2.0, 0.25])
SQUARE = float(np.square(GRADIENT).sum())
TRACE = float(np.square(DEVIATION).sum())


@pytest.mark.parametrize(("small", "big"), [(1.0, 2.0), (3.0, 8.0), (12.5, 1000.0)])
def test_expected_norms_give_back_what_they_are_made_of(small: float, big: float) -> None:
    found = noise_estimate(SQUARE + TRACE / small, SQUARE + TRACE / big, small_batch=small, big_batch=big)
    assert found.gradient_square == pytest.approx(SQUARE, rel=1e-11)
    assert found.noise_trace == pytest.approx(TRACE, rel=1e-11)


def test_two_halves_by_hand() -> None:
    # Gradients 3 and 1 of one unit each: squares 9 and 4.
    assert noise_estimate(9.0, 4.0, small_batch=1, big_batch=2) == (-1.0, 10.0)


def quadratic_gradients(rng: np.random.Generator, steps: int, units: int) -> np.ndarray:
    """Gradients `w - x` of `|w - x|^2 / 2` at w = G for x of mean 0 and known spread; `(steps, units, 4)`."""
    return GRADIENT - DEVIATION * rng.standard_normal((steps, units, len(GRADIENT)))


@pytest.mark.parametrize(("small", "big"), [(8, 16), (5, 16), (11, 16)])
def test_unbiased_on_a_quadratic_though_the_small_batch_is_part_of_the_big(small: int, big: int) -> None:
    steps = 40_000
    units = quadratic_gradients(np.random.default_rng(0), steps, big)
    g_small = np.square(units[:, :small].mean(1)).sum(1)
    g_big = np.square(units.mean(1)).sum(1)
    found = np.array(
        [noise_estimate(a, b, small_batch=small, big_batch=big) for a, b in zip(g_small, g_big, strict=True)]
    )
    # Four standard errors of the mean; the values themselves spread much wider.
    tolerance = 4 * found.std(0) / math.sqrt(steps)
    assert (np.abs(found.mean(0) - [SQUARE, TRACE]) < tolerance).all()
    assert tolerance[0] < 0.1 * SQUARE and tolerance[1] < 0.07 * TRACE


def test_the_mean_of_several_small_batches_counts_at_their_harmonic_mean() -> None:
    sizes = [2.0, 3.0, 6.0]
    small_square = np.mean([SQUARE + TRACE / size for size in sizes])
    found = noise_estimate(
        float(small_square), SQUARE + TRACE / 11, small_batch=3 / sum(1 / s for s in sizes), big_batch=11
    )
    assert found == pytest.approx((SQUARE, TRACE), rel=1e-12)


def test_the_accumulator_averages_before_it_divides() -> None:
    scale = NoiseScale(half_life=1.0)
    measured = [(9.0, 4.0, 1.0, 2.0), (5.0, 4.5, 2.0, 6.0), (7.0, 5.0, 2.0, 4.0)]
    for small_square, big_square, small, big in measured:
        assert scale.add(small_square, big_square, small_batch=small, big_batch=big)
    estimates = [noise_estimate(a, b, small_batch=s, big_batch=t) for a, b, s, t in measured]
    weights = np.array([2 / 4, 6 / 2, 4 / 1])
    square, trace = weights @ np.array(estimates) / weights.sum()
    assert scale.count == 3
    assert scale.estimate == pytest.approx((square, trace), rel=1e-14)
    assert scale.value == pytest.approx(trace / square, rel=1e-14)
    assert scale.largest_useful_kappa(2.5) == pytest.approx(trace / square / 2.5, rel=1e-14)


def test_noise_scale_of_the_quadratic() -> None:
    steps = 20_000
    scale = NoiseScale(half_life=1e9)
    units = quadratic_gradients(np.random.default_rng(1), steps, 64)
    for half, whole in zip(np.square(units[:, :32].mean(1)).sum(1), np.square(units.mean(1)).sum(1), strict=True):
        scale.add(float(half), float(whole), small_batch=32, big_batch=64)
    assert scale.value == pytest.approx(TRACE / SQUARE, rel=0.03)


def test_no_result_until_both_means_are_above_zero() -> None:
    scale = NoiseScale()
    assert scale.estimate is None and scale.value is None and scale.largest_useful_kappa(4) is None
    scale.add(9.0, 4.0, small_batch=1, big_batch=2)  # |G|^2 = -1
    assert scale.estimate == (-1.0, 10.0) and scale.value is None and scale.largest_useful_kappa(4) is None
    scale.add(4.0, 4.0, small_batch=1, big_batch=2)  # |G|^2 = 4, no noise
    assert scale.value is not None and scale.value > 0
    quiet = NoiseScale()
    quiet.add(4.0, 5.0, small_batch=1, big_batch=2)
    assert quiet.estimate == (6.0, -2.0) and quiet.value is None


def test_what_is_not_finite_is_not_counted() -> None:
    scale = NoiseScale()
    scale.add(5.0, 4.0, small_batch=1, big_batch=2)
    before = scale.state_dict()
    for pair in ((math.nan, 4.0), (5.0, math.inf), (math.inf, math.inf)):
        assert not scale.add(*pair, small_batch=1, big_batch=2)
    assert scale.state_dict() == before


def test_a_state_through_json_continues_bit_for_bit() -> None:
    rng = np.random.default_rng(2)
    whole, first = NoiseScale(), NoiseScale()
    pairs = rng.uniform(0.1, 3.0, (9, 2)).tolist()
    for number, (a, b) in enumerate(pairs):
        whole.add(a + b, b, small_batch=3.7, big_batch=9.1)
        if number < 4:
            first.add(a + b, b, small_batch=3.7, big_batch=9.1)
    resumed = NoiseScale()
    resumed.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for a, b in pairs[4:]:
        resumed.add(a + b, b, small_batch=3.7, big_batch=9.1)
    assert resumed.state_dict() == whole.state_dict() and resumed.value == whole.value is not None
    resumed.load_state_dict({})
    assert resumed.state_dict() == NoiseScale().state_dict()


@pytest.mark.parametrize(("small", "big"), [(2.0, 2.0), (3.0, 2.0), (0.0, 2.0), (-1.0, 2.0), (math.nan, 2.0)])
def test_sizes_that_are_no_two_sizes_are_refused(small: float, big: float) -> None:
    with pytest.raises(ValueError, match="0 < small_batch < big_batch"):
        noise_estimate(2.0, 1.0, small_batch=small, big_batch=big)


@pytest.mark.parametrize("half_life", [0.0, -1.0, math.inf, math.nan])
def test_half_lives_that_are_none_are_refused(half_life: float) -> None:
    with pytest.raises(ValueError, match="half_life"):
        NoiseScale(half_life)
