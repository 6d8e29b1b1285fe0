"""A momentum that changes over the run, stated per reference step, and its logarithm summed over any interval."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, get_args

import numpy as np

from .momentum import check_positive, log_momentum
from .schedule import FloatArray

__all__ = ["MomentumSchedule", "MomentumScheduleKind"]

MomentumScheduleKind = Literal["constant", "cosine"]


@dataclass(frozen=True)
class MomentumSchedule:
    """Momentum rho(k) of the average at reference step k = 0, 1, ...

    - `"constant"`: rho(k) = base.
    - `"cosine"`: rho(k) = 1 - (1 - base) * (cos(pi * k / K) + 1) / 2 with K = `reference_steps`, from base to 1
      (BYOL, arXiv 2006.07733). From step K on it is 1 and the average stands still.

    A step that covers a clock interval has the sum of the reference steps' log-momenta over that interval, each
    weighted by the length covered. The sum is additive, so every partition of the same data decays alike; this is the
    scaling of the schedule in sample time, `rho(kappa * t) ** kappa` for slowly changing rho. Raising the base to the
    power kappa and running the cosine again is another schedule.

    Args:
        base: rho at reference step 0, in [0, 1].
        kind: "constant" or "cosine".
        reference_steps: K; used by "cosine" only, and need not be whole.

    Raises:
        ValueError: If a value is outside its range, or the kind is unknown.
    """

    base: float
    kind: MomentumScheduleKind = "constant"
    reference_steps: float = math.inf

    def __post_init__(self) -> None:
        if self.kind not in get_args(MomentumScheduleKind):
            known = ", ".join(get_args(MomentumScheduleKind))
            raise ValueError(f"momentum_schedule must be one of {known}, got {self.kind!r}")
        log_momentum(self.base)
        if self.kind == "cosine":
            check_positive("reference_steps of a cosine momentum schedule", self.reference_steps)

    def log_at(self, step: int) -> float:
        """Logarithm of rho at a reference step, counted from 0; `-inf` for a momentum of 0."""
        if self.kind == "constant":
            return self._log_base
        return float(self._logs[step]) if step < len(self._logs) else 0.0

    def log_momentum(self, start: float, end: float) -> float:
        """Sum over a clock interval of `log rho(floor(k))`, each weighted by the length of k's step inside it.

        Exactly `log_at(k)` for the whole of reference step k. Summed over the interval itself and not taken from
        cumulative sums, which would lose the digits of the small terms at the end of a cosine.

        Args:
            start: Clock position, in reference steps, at least 0.
            end: Clock position, at least `start`; 0.0 is returned for an empty interval.

        Raises:
            ValueError: If the positions are out of order.
        """
        if not 0 <= start <= end:
            raise ValueError(f"a clock interval needs 0 <= start <= end, got {start!r} to {end!r}")
        if start == end:
            return 0.0
        if self.kind == "constant":
            return (end - start) * self._log_base
        first, last = math.floor(start), math.ceil(end) - 1
        if first == last:
            return (end - start) * self.log_at(first)
        inner = self._logs[first + 1 : last].tolist()
        return math.fsum([(first + 1 - start) * self.log_at(first), *inner, (end - last) * self.log_at(last)])

    @cached_property
    def _log_base(self) -> float:
        return log_momentum(self.base)

    @cached_property
    def _logs(self) -> FloatArray:
        """Log-momenta of the steps before K; sin(x)**2 for (cos + 1) / 2, which cancels near the end."""
        left = self.reference_steps - np.arange(math.ceil(self.reference_steps), dtype=np.float64)
        share = np.sin(np.pi / 2 * left / self.reference_steps) ** 2
        with np.errstate(divide="ignore"):  # log(0) where base is 0
            logs = np.log1p(-(1 - self.base) * share)
        logs.setflags(write=False)
        return logs
