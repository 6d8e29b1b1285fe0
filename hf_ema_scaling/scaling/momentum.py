"""Momentum of an exponential moving average, and its change with the batch size, in float64.

The average of the weights moves as `zeta <- rho * zeta + (1 - rho) * theta`. A step with `kappa` times the reference
batch stands for `kappa` reference steps, so its momentum is `rho ** kappa`
("How to Scale Your EMA", arXiv 2307.13813).
"""

from __future__ import annotations

import math
from typing import NamedTuple

__all__ = [
    "PathWeights",
    "ema_weight",
    "half_life_from_momentum",
    "log_momentum",
    "momentum_from_epoch_weight",
    "momentum_from_half_life",
    "path_correction",
    "scale_momentum",
    "weight_from_log_momentum",
]


def check_positive(name: str, value: float) -> float:
    """Return `value` as a float if it is finite and above 0; raise `ValueError` naming it otherwise."""
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name} must be a finite number above 0, got {value!r}")
    return float(value)


def check_not_negative(name: str, value: float) -> float:
    """Return `value` as a float if it is finite and at least 0; raise `ValueError` naming it otherwise."""
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"{name} must be a finite number of at least 0, got {value!r}")
    return float(value)


def check_below_one(name: str, value: float) -> float:
    """Return `value` as a float if it lies in [0, 1); raise `ValueError` naming it otherwise."""
    if not 0 <= value < 1:
        raise ValueError(f"{name} must lie in [0, 1), got {value!r}")
    return float(value)


def _check_momentum(momentum: float) -> float:
    if not 0 <= momentum <= 1:
        raise ValueError(
            f"momentum must lie in [0, 1], got {momentum!r}; it is the share of the average that is kept (0.999), "
            "not the share of the new weights (0.001)"
        )
    return float(momentum)


def scale_momentum(momentum: float, kappa: float) -> float:
    """Momentum of one step that covers `kappa` reference steps: `momentum ** kappa`.

    Source: "How to Scale Your EMA", arXiv 2307.13813. The first-order form `1 - kappa * (1 - momentum)` is not used:
    it turns negative for `kappa > 1 / (1 - momentum)`.

    Args:
        momentum: rho at the reference batch, in [0, 1].
        kappa: Batch size over reference batch size; any real number above 0.

    Returns:
        The scaled momentum, float64.

    Raises:
        ValueError: If `momentum` is outside [0, 1] or `kappa` is not a finite number above 0.
    """
    return math.pow(_check_momentum(momentum), check_positive("kappa", kappa))


def log_momentum(momentum: float) -> float:
    """Natural logarithm of a momentum in [0, 1]; `-inf` for 0. Log-momenta of consecutive steps add up.

    Raises:
        ValueError: If `momentum` is outside [0, 1].
    """
    momentum = _check_momentum(momentum)
    return math.log(momentum) if momentum > 0 else -math.inf


def weight_from_log_momentum(log_momentum: float) -> float:
    """Weight `1 - exp(log_momentum)` of the new weights in one update, free of cancellation; `-inf` gives 1.0.

    Raises:
        ValueError: If `log_momentum` is above 0 or NaN.
    """
    if not log_momentum <= 0:
        raise ValueError(f"log_momentum must be at most 0 (a momentum of at most 1), got {log_momentum!r}")
    # 0.0 - x rather than -x, so that momentum 1 gives 0.0 and not -0.0.
    return 0.0 - math.expm1(log_momentum)


def ema_weight(momentum: float, kappa: float = 1.0) -> float:
    """Weight `1 - momentum ** kappa` of the new weights, as `-expm1(kappa * log(momentum))` in float64.

    Args:
        momentum: rho at the reference batch, in [0, 1].
        kappa: Batch size over reference batch size; any real number above 0.

    Raises:
        ValueError: If `momentum` is outside [0, 1] or `kappa` is not a finite number above 0.
    """
    return weight_from_log_momentum(check_positive("kappa", kappa) * log_momentum(momentum))


class PathWeights(NamedTuple):
    """The two moves of a path-corrected update; see `path_correction`."""

    before: float
    """Weight of the move towards the weights before the optimizer step; 0 at kappa 1, below 0 for kappa < 1."""
    after: float
    """w, weight of the move towards the weights after the optimizer step, in [0, 1]."""


def path_correction(log_momentum: float, kappa: float) -> PathWeights:
    """Weights of the update that also follows the way which the weights took during a step of `kappa`.

    With r = rho ** kappa, and theta and theta' the weights before and after the optimizer step:

        zeta' = r zeta + (1 - r) theta + w (theta' - theta),    w = 1 - rho (1 - r) / (kappa (1 - rho))

    These are `kappa` reference updates, each with the weights after its own step, of a theta that moves evenly. The
    ordinary update takes theta' for all of them, which is off by (kappa - 1)(1 - rho) / 2 of the step to first order.
    For a constant gradient the corrected update is exact for any sequence of kappas, whole or not. At kappa 1 it is
    the ordinary update bit for bit, w = 1 - rho.

    No copy of theta is needed, so no memory either, only a second pass over the weights:

        before the optimizer step:  zeta <- zeta + before (theta - zeta),   before = 1 - r / (1 - w)
        after it:                   zeta <- zeta + after (theta' - zeta),   after = w

    Source: derived from one step of gradient descent with a constant gradient, as a power of its matrix; the scaled
    step that it corrects is that of "How to Scale Your EMA", arXiv 2307.13813.

    Args:
        log_momentum: log r of the step, `kappa * log(rho)` or the sum of a schedule; rho is then its geometric mean.
        kappa: Reference steps that the step covers; any real number above 0.

    Raises:
        ValueError: If `log_momentum` is above 0 or NaN, or `kappa` is not a finite number above 0.
    """
    weight = weight_from_log_momentum(log_momentum)
    if check_positive("kappa", kappa) == 1 or log_momentum in (0.0, -math.inf):
        return PathWeights(0.0, weight)
    # With x = -log(rho), w = (kappa g(x) + g(-kappa x)) / (kappa (e**x - 1)): two terms of one sign, where the formula
    # above would subtract nearly equal numbers. Likewise for the first move.
    x, y = -log_momentum / kappa, -log_momentum
    if max(x, y) < 0.5:
        growth, remainder = kappa * math.expm1(x), kappa * _second_order(x)
        return PathWeights((_second_order(y) - remainder) / math.expm1(y), (remainder + _second_order(-y)) / growth)
    lost = -math.expm1(-x)
    before = 1 - kappa * lost / weight * math.exp(x - y)
    return PathWeights(before, 1 - math.exp(-x) * weight / (kappa * lost))


def _second_order(x: float) -> float:
    """g(x) = exp(x) - 1 - x for |x| < 0.5 to the last digits: the sum of x**n / n! over n = 2 to 17."""
    factor = 1.0
    for n in range(17, 2, -1):
        factor = 1.0 + x / n * factor
    return x * x / 2 * factor


def half_life_from_momentum(momentum: float, reference_batch_size: float) -> float:
    """Units after which half of the average has been replaced: `H = B * ln 2 / (-ln rho)`.

    The half-life in units does not change under the scaling rule: a batch of `n` units has momentum `0.5 ** (n / H)`.

    Args:
        momentum: rho at the reference batch, in [0, 1]; 0 gives 0.0 and 1 gives `inf`.
        reference_batch_size: B, in units (samples, seconds of audio or tokens).

    Returns:
        The half-life, in the units of `reference_batch_size`.

    Raises:
        ValueError: If `momentum` is outside [0, 1] or `reference_batch_size` is not a finite number above 0.
    """
    batch = check_positive("reference_batch_size", reference_batch_size)
    rate = -log_momentum(momentum)
    return batch * math.log(2.0) / rate if rate > 0 else math.inf


def momentum_from_half_life(half_life: float, reference_batch_size: float) -> float:
    """Momentum of a batch of `reference_batch_size` units for a half-life in units: `0.5 ** (B / H)`.

    Args:
        half_life: H, in the units of `reference_batch_size`; 0 gives 0.0 and `inf` gives 1.0.
        reference_batch_size: B, in units (samples, seconds of audio or tokens).

    Raises:
        ValueError: If `half_life` is negative or NaN, or `reference_batch_size` is not a finite number above 0.
    """
    batch = check_positive("reference_batch_size", reference_batch_size)
    if not half_life >= 0:
        raise ValueError(f"half_life must be at least 0 units, got {half_life!r}")
    return 0.5 ** (batch / half_life) if half_life > 0 else 0.0


def momentum_from_epoch_weight(weight: float, steps_per_epoch: float) -> float:
    """Momentum per step that keeps the share `weight` of the average over one epoch: `weight ** (1 / K)`.

    This is how Momentum Pseudo-Labeling states its momentum (arXiv 2106.08922).

    Args:
        weight: Share of the average at the start of an epoch that is left at its end, in [0, 1].
        steps_per_epoch: K, steps in one epoch; any real number above 0.

    Raises:
        ValueError: If `weight` is outside [0, 1] or `steps_per_epoch` is not a finite number above 0.
    """
    if not 0 <= weight <= 1:
        raise ValueError(f"weight must lie in [0, 1], got {weight!r}; it is the share of the average kept per epoch")
    return math.pow(weight, 1.0 / check_positive("steps_per_epoch", steps_per_epoch))
