"""Gradient noise scale: the batch beyond which a larger one buys little, from gradient norms at two batch sizes.

With G the true gradient and Sigma the covariance of the gradient of one unit, a batch of b units has a gradient g with
`E |g|^2 = |G|^2 + tr Sigma / b`. Two batch sizes give two equations (McCandlish et al. 2018, "An Empirical Model of
Large-Batch Training", arXiv 1812.06162, appendix A.1):

    |G|^2    = (b_big * g_big - b_small * g_small) / (b_big - b_small)
    tr Sigma = (g_small - g_big) / (1 / b_small - 1 / b_big)
    B_noise  = tr Sigma / |G|^2

where g_small and g_big are squared norms. Both estimates are unbiased for independent units, also if the small batch
is a part of the big one; their ratio is not, so they are averaged over steps before it is taken.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

__all__ = ["NoiseEstimate", "NoiseScale", "noise_estimate"]


class NoiseEstimate(NamedTuple):
    """What squared gradient norms at two batch sizes say; either value may be negative by chance."""

    gradient_square: float
    """|G|^2 of the true gradient."""
    noise_trace: float
    """tr Sigma, per unit of the batch sizes."""


def noise_estimate(small_square: float, big_square: float, *, small_batch: float, big_batch: float) -> NoiseEstimate:
    """Unbiased estimates of |G|^2 and tr Sigma; the formulas are in the module's docstring.

    Args:
        small_square: Squared norm of the mean gradient of the smaller batch, or its mean over several such batches.
        big_square: The same for the larger batch.
        small_batch: Units of the smaller batch; the harmonic mean where several differ.
        big_batch: Units of the larger batch.

    Raises:
        ValueError: Unless `0 < small_batch < big_batch`.
    """
    if not 0 < small_batch < big_batch:
        raise ValueError(f"two batch sizes need 0 < small_batch < big_batch, got {small_batch!r} and {big_batch!r}")
    gradient_square = (big_batch * big_square - small_batch * small_square) / (big_batch - small_batch)
    noise_trace = (small_square - big_square) / (1.0 / small_batch - 1.0 / big_batch)
    return NoiseEstimate(gradient_square, noise_trace)


class NoiseScale:
    """B_noise from running means of |G|^2 and tr Sigma, never of their ratio.

    Both means are exponential, weighted by units: a measurement on b units weighs b, and half of that after
    `half_life` further ones. The noise scale moves over a run, upwards as a rule; the mean follows it.

    Args:
        half_life: Measurements after which one counts half.

    Attributes:
        count: Measurements so far.
    """

    def __init__(self, half_life: float = 50.0) -> None:
        if not (math.isfinite(half_life) and half_life > 0):
            raise ValueError(f"half_life counts measurements and must be above 0, got {half_life!r}")
        self.half_life = half_life
        self.count = 0
        self._weight = 0.0
        self._gradient_square = 0.0
        self._noise_trace = 0.0

    def add(self, small_square: float, big_square: float, *, small_batch: float, big_batch: float) -> bool:
        """Take in one measurement, see `noise_estimate`; False, and nothing taken, if a norm is not finite."""
        estimate = noise_estimate(small_square, big_square, small_batch=small_batch, big_batch=big_batch)
        if not all(map(math.isfinite, estimate)):
            return False
        kept = 0.5 ** (1.0 / self.half_life)
        self.count += 1
        self._weight = kept * self._weight + big_batch
        self._gradient_square = kept * self._gradient_square + big_batch * estimate.gradient_square
        self._noise_trace = kept * self._noise_trace + big_batch * estimate.noise_trace
        return True

    @property
    def estimate(self) -> NoiseEstimate | None:
        """The means of |G|^2 and tr Sigma; None before the first measurement."""
        if self.count == 0:
            return None
        return NoiseEstimate(self._gradient_square / self._weight, self._noise_trace / self._weight)

    @property
    def value(self) -> float | None:
        """B_noise in units; None while either mean is not above 0, so that its ratio says nothing."""
        estimate = self.estimate
        if estimate is None or not (estimate.gradient_square > 0 and estimate.noise_trace > 0):
            return None
        return estimate.noise_trace / estimate.gradient_square

    def largest_useful_kappa(self, reference_batch_size: float) -> float | None:
        """`B_noise / reference_batch_size`, or None where there is no B_noise.

        Useful in the trade-off model of arXiv 1812.06162: a run at batch b needs `1 + B_noise / b` times the fewest
        possible steps and `1 + b / B_noise` times the fewest possible units. At b = B_noise both factors are 2; beyond
        it, doubling the batch saves at most a quarter of the steps. A rule of thumb, not a bound: the model is of SGD
        with the best learning rate at each batch, and does not know Adam's preconditioner. Scaling rules are derived
        for batches whose gradients are mostly noise, well below B_noise; that they lose accuracy near it is expected
        from this, not measured here. Nothing is known about whether the average needs a bound of its own.

        Args:
            reference_batch_size: B in units.
        """
        value = self.value
        return None if value is None else value / reference_batch_size

    def state_dict(self) -> dict[str, float]:
        """The sums, as floats that survive JSON bit for bit."""
        return {
            "count": float(self.count),
            "weight": self._weight,
            "gradient_square": self._gradient_square,
            "noise_trace": self._noise_trace,
        }

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Restore `state_dict()`; an empty mapping starts anew."""
        self.count = int(state.get("count", 0))
        self._weight = float(state.get("weight", 0.0))
        self._gradient_square = float(state.get("gradient_square", 0.0))
        self._noise_trace = float(state.get("noise_trace", 0.0))
