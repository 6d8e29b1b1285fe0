"""The weight of pseudo-labels, which may rise linearly from where they start."""

from __future__ import annotations

import math
from dataclasses import dataclass

__all__ = ["Ramp"]


@dataclass(frozen=True)
class Ramp:
    """A line from 0 at `start` to 1 at `start + length`, 0 before and 1 after; in reference steps.

    A reference step has the mean of the line over it. Whatever a step covers, every item of it weighs as much as its
    own reference step says, so steps of any size have the mean over the reference steps that they cover, and every
    partition of the same data has the same integral.

    Args:
        start: Where it starts.
        length: Its length; 0 for a step from 0 to 1.
    """

    start: float
    length: float

    def at(self, step: int) -> float:
        """The weight of reference step `step`, counted from 0, as far as it lies past `start`."""
        low, high = max(float(step), self.start), float(step + 1)
        if high <= self.start:
            return 0.0
        return (self._integral(high) - self._integral(low)) / (high - low)

    def mean(self, start: float, end: float) -> float:
        """Mean weight over a clock interval, each reference step's by the length covered; no part before the start.

        Raises:
            ValueError: If the interval is empty.
        """
        if not 0 <= start < end:
            raise ValueError(f"a clock interval needs 0 <= start < end, got {start!r} to {end!r}")
        steps = range(math.floor(start), math.ceil(end))
        covered = (min(step + 1.0, end) - max(float(step), start) for step in steps)
        return math.fsum(length * self.at(step) for step, length in zip(steps, covered, strict=True)) / (end - start)

    def _integral(self, position: float) -> float:
        """Of the line from `start` to a position past it."""
        past = position - self.start
        inside = min(past, self.length)
        return (inside**2 / (2 * self.length) if self.length else 0.0) + past - inside
