from __future__ import annotations

import math
import random

import pytest

from hf_ema_scaling.scaling import (
    ema_weight,
    half_life_from_momentum,
    log_momentum,
    momentum_from_epoch_weight,
    momentum_from_half_life,
    scale_momentum,
    weight_from_log_momentum,
)


@pytest.mark.parametrize(
    ("rho", "kappa", "expected", "tolerance"),
    [
        (0.9999, 8, 0.9992003, 5e-8),
        (0.99, 6, 0.94148, 5e-6),
        (0.992, 24, 0.82467, 5e-6),
        (0.992, 32, 0.77335, 5e-6),
        (0.996, 0.25, 0.9989985, 5e-8),
        (0.0, 3, 0.0, 0.0),
        (1.0, 3, 1.0, 0.0),
    ],
)
def test_scale_momentum_numbers(rho: float, kappa: float, expected: float, tolerance: float) -> None:
    assert scale_momentum(rho, kappa) == pytest.approx(expected, abs=tolerance, rel=0)


@pytest.mark.parametrize("rho", [0.0, 0.5, 0.9, 0.9999, 1.0])
def test_kappa_one_changes_no_bit(rho: float) -> None:
    assert scale_momentum(rho, 1) == rho


@pytest.mark.parametrize("rho", [-0.1, 1.0001, math.nan, math.inf])
def test_momentum_outside_range_is_refused(rho: float) -> None:
    message = r"momentum must lie in \[0, 1\], got"
    with pytest.raises(ValueError, match=message):
        scale_momentum(rho, 2)
    with pytest.raises(ValueError, match=message):
        log_momentum(rho)
    with pytest.raises(ValueError, match=message):
        ema_weight(rho)


@pytest.mark.parametrize("kappa", [0, -1, math.nan, math.inf])
def test_kappa_outside_range_is_refused(kappa: float) -> None:
    with pytest.raises(ValueError, match="kappa must be a finite number above 0, got"):
        scale_momentum(0.99, kappa)


def test_weight_keeps_its_digits() -> None:
    # Series of 1 - (1 - d) ** kappa for the d that float64 holds; 1 - rho ** kappa would keep about 4 digits.
    rho = 1 - 2.0**-40
    d, kappa = 2.0**-40, 0.25
    assert ema_weight(rho, kappa) == pytest.approx(kappa * d * (1 - (kappa - 1) * d / 2), rel=1e-15, abs=0)
    assert ema_weight(0.9999, 8) == pytest.approx(1 - 0.9999**8, rel=1e-11)
    assert ema_weight(0.0) == 1.0
    assert math.copysign(1, ema_weight(1.0)) == 1.0 and ema_weight(1.0) == 0.0


def test_log_momentum_limits() -> None:
    assert log_momentum(0.0) == -math.inf and weight_from_log_momentum(-math.inf) == 1.0
    assert weight_from_log_momentum(log_momentum(0.75)) == pytest.approx(0.25, rel=1e-15)
    with pytest.raises(ValueError, match="at most 0"):
        weight_from_log_momentum(0.1)
    with pytest.raises(ValueError, match="at most 0"):
        weight_from_log_momentum(math.nan)


def test_any_partition_of_the_data_decays_alike() -> None:
    generator = random.Random(0)
    for _ in range(50):
        rho, total = generator.uniform(0.9, 0.99999), generator.uniform(1, 200)
        cuts = sorted(generator.uniform(0, total) for _ in range(30))
        kappas = [b - a for a, b in zip([0.0, *cuts], [*cuts, total], strict=True)]
        product = math.prod(scale_momentum(rho, kappa) for kappa in kappas)
        summed = math.fsum(kappa * log_momentum(rho) for kappa in kappas)
        assert product == pytest.approx(rho**total, rel=1e-12)
        assert weight_from_log_momentum(summed) == pytest.approx(ema_weight(rho, total), rel=1e-12)


def test_half_life() -> None:
    # After H / B steps half is left.
    half_life = half_life_from_momentum(0.999, 64)
    assert 0.999 ** (half_life / 64) == pytest.approx(0.5, rel=1e-12)
    assert half_life == pytest.approx(64 * math.log(2) / 0.00100050033358, rel=1e-11)
    for kappa in (0.25, 1, 3, 8, 100.5):
        assert half_life_from_momentum(scale_momentum(0.999, kappa), kappa * 64) == pytest.approx(half_life, rel=1e-12)
        assert momentum_from_half_life(half_life, kappa * 64) == pytest.approx(0.999**kappa, rel=1e-13)
    for rho, expected in ((0.0, 0.0), (1.0, math.inf)):
        assert half_life_from_momentum(rho, 64) == expected and momentum_from_half_life(expected, 64) == rho
    with pytest.raises(ValueError, match="half_life must be at least 0 units, got -1"):
        momentum_from_half_life(-1, 64)
    with pytest.raises(ValueError, match="reference_batch_size"):
        half_life_from_momentum(0.9, 0)


def test_epoch_weight() -> None:
    assert momentum_from_epoch_weight(0.5, 100) ** 100 == pytest.approx(0.5, rel=1e-13)
    # kappa times the batch has 1 / kappa of the steps: already the scaling rule.
    assert momentum_from_epoch_weight(0.5, 100 / 8) == pytest.approx(
        scale_momentum(momentum_from_epoch_weight(0.5, 100), 8), rel=1e-13
    )
    with pytest.raises(ValueError, match="weight must lie in"):
        momentum_from_epoch_weight(1.5, 100)
