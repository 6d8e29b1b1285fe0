from __future__ import annotations

import math
import random
from decimal import Decimal, localcontext

import numpy as np
import pytest

from hf_ema_scaling.scaling import (
    ema_weight,
    half_life_from_momentum,
    log_momentum,
    momentum_from_epoch_weight,
    momentum_from_half_life,
    path_correction,
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


# ---- Path correction


@pytest.mark.parametrize("kappa", [1e-3, 0.3, 0.999, 1 + 1e-9, 1.5, 2, 7.3, 64, 1024.5])
@pytest.mark.parametrize("distance", [1e-14, 1e-9, 1e-4, 0.01, 0.0681, 0.2, 0.45, 0.9])
def test_path_weights_keep_their_digits(kappa: float, distance: float) -> None:
    """Against the formula in 80 digits, at rho close to 1 as well as far from it, and on both sides of the series."""
    logarithm = kappa * math.log1p(-distance)
    before, after = path_correction(logarithm, kappa)
    with localcontext(prec=80):
        k = Decimal(kappa)
        rho, r = (Decimal(logarithm) / k).exp(), Decimal(logarithm).exp()
        w = 1 - rho * (1 - r) / (k * (1 - rho))
        lead = 1 - r / (1 - w)
    assert after == pytest.approx(float(w), rel=2e-14, abs=0)
    # Towards kappa 1 the first move vanishes; there only its share of the whole update counts.
    assert before == pytest.approx(float(lead), rel=2e-14, abs=3e-16 * float(1 - r))
    # Both moves together leave r of the average.
    assert before + after - before * after == pytest.approx(float(1 - r), rel=1e-13, abs=1e-15)


def test_path_weights_at_kappa_one_and_at_the_ends() -> None:
    for rho in (0.0, 0.3, 0.99, 1 - 1e-9, 1.0):
        logarithm = log_momentum(rho)
        assert path_correction(logarithm, 1.0) == (0.0, weight_from_log_momentum(logarithm))
    assert path_correction(-math.inf, 8) == (0.0, 1.0) and path_correction(0.0, 8) == (0.0, 0.0)
    # Small kappa (1 - rho): w ~ (kappa + 1)(1 - rho) / 2.
    assert path_correction(8 * math.log1p(-1e-9), 8).after == pytest.approx(4.5e-9, rel=1e-8)
    assert path_correction(8 * math.log1p(-1e-9), 8).before == pytest.approx(3.5e-9, rel=1e-8)
    assert path_correction(0.5 * math.log(0.99), 0.5).before < 0
    # Far beyond one step the average is the mean over the last reference steps of the way, and no bit is lost to inf.
    assert path_correction(-5000.0, 100) == pytest.approx((1.0, 1 - 1 / (100 * math.expm1(50.0))), rel=1e-15)
    for bad in (0.1, math.nan):
        with pytest.raises(ValueError, match="at most 0"):
            path_correction(bad, 2)
    with pytest.raises(ValueError, match="kappa must be"):
        path_correction(-0.1, 0)


def reference_steps(count: int, eta: float, rho: float) -> np.ndarray:
    """(theta, zeta, g) after `count` reference steps at a constant gradient, as a power of the matrix of one."""
    one = np.array([[1, 0, -eta], [1 - rho, rho, -(1 - rho) * eta], [0, 0, 1]])
    return np.linalg.matrix_power(one, count)


@pytest.mark.parametrize("rho", [0.5, 0.9, 0.999])
@pytest.mark.parametrize(
    "kappas", [(8.0,), (3.0, 1.0, 5.0), (0.25,) * 8, (2.5, 0.5, 1.7, 3.3), (0.1, 12.9, 1 / 3, 2 / 3)], ids=str
)
def test_path_correction_is_exact_for_a_constant_gradient(rho: float, kappas: tuple[float, ...]) -> None:
    eta = 0.01
    total = round(sum(kappas))
    expected = reference_steps(total, eta, rho) @ np.array([1.0, 2.0, 3.0])
    theta, zeta, ordinary = 1.0, 2.0, 2.0
    for kappa in kappas:
        after = theta - kappa * eta * 3.0
        weights = path_correction(kappa * math.log(rho), kappa)
        zeta += weights.before * (theta - zeta)
        zeta += weights.after * (after - zeta)
        ordinary += ema_weight(rho, kappa) * (after - ordinary)
        theta = after
    assert theta == pytest.approx(expected[0], abs=1e-12)
    assert zeta == pytest.approx(expected[1], abs=1e-12)
    assert abs(ordinary - expected[1]) > 1e-5


@pytest.mark.parametrize("kappa", [2, 8, 64])
@pytest.mark.parametrize("rho", [0.9, 0.999])
def test_residual_of_the_ordinary_update(kappa: int, rho: float) -> None:
    """-eta g (kappa r - rho (1 - r) / (1 - rho)), about eta g kappa (kappa - 1)(1 - rho) / 2."""
    eta, g, r = 0.01, 3.0, rho**kappa
    true = reference_steps(kappa, eta, rho) @ np.array([1.0, 2.0, g])
    ordinary = r * 2.0 + (1 - r) * (1.0 - kappa * eta * g)
    residual = -eta * g * (kappa * r - rho * (1 - r) / (1 - rho))
    assert true[1] - ordinary == pytest.approx(residual, abs=1e-12)
    if kappa * (1 - rho) < 0.01:
        assert residual == pytest.approx(eta * g * kappa * (kappa - 1) * (1 - rho) / 2, rel=0.02)
    w = path_correction(kappa * math.log(rho), kappa).after
    assert r * 2.0 + (1 - r) * 1.0 - w * kappa * eta * g == pytest.approx(true[1], abs=1e-12)
