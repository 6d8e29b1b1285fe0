"""Filters whose thresholds follow the labels of the steps before: quantiles, and FreeMatch's by class.

A label's weight in the statistics falls by `momentum` for each reference step that the run has gone on since the
label's place in the stream. So they are a function of the data seen: after the same labels they are the same, up to
float64 rounding, at every kappa, and to the bit for any order and split of a step. What kappa does change is that a
step's own labels are judged by the statistics of the steps before, as they are labelled by the teacher of that moment.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from hf_ema_scaling.labels.base import CONFIDENCE, LabelKind
from hf_ema_scaling.labels.filter_base import Row, in_range
from hf_ema_scaling.labels.score_filters import LOG_PROBABILITY

BINS = 400
# Equal steps of the log-odds from -10 to 10, so that 0.99 and 0.999 are as far apart as 0.01 and 0.001.
EDGES: tuple[float, ...] = (0.0, *(1 / (1 + math.exp(10 - 20 * i / BINS)) for i in range(1, BINS)))


class DecayedSums:
    """Sums over labels, each weighted by `momentum` to the power of its age in reference steps.

    Measurements of a step are integers, in units of 2**-32, so that their sum over rows and processes has no order.

    Args:
        size: numbers measured on each label.
        momentum: per reference step, in [0, 1).
    """

    SCALE = 2.0**32

    def __init__(self, size: int, momentum: float) -> None:
        if not 0 <= momentum < 1:
            raise ValueError(f"the momentum of a threshold must lie in [0, 1), got {momentum!r}")
        self.momentum = momentum
        self.sums: NDArray[np.float64] = np.zeros(size)
        self.steps = 0.0
        """Reference steps taken in."""
        self.measured: NDArray[np.int64] = np.zeros(size, dtype=np.int64)

    def add(self, place: int, value: float, age: float) -> None:
        """Add `value` at `place`, for a label that is `age` reference steps old when the step ends."""
        self.measured[place] += round(value * self.momentum**age * self.SCALE)

    def end_step(self, measured: NDArray[np.int64], length: float) -> None:
        """Take in what all processes measured in a step of `length` reference steps."""
        self.sums = self.sums * self.momentum**length + measured / self.SCALE
        self.steps += length
        self.measured = np.zeros_like(self.measured)

    def state_dict(self) -> dict[str, object]:
        """The sums, as JSON values."""
        return {"sums": self.sums.tolist(), "steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore them; an empty dictionary starts anew."""
        size = len(self.sums)
        self.sums = np.array(state.get("sums", [0.0] * size), dtype=np.float64)
        if len(self.sums) != size:
            raise ValueError(f"the checkpoint has {len(self.sums)} statistics of a threshold, this run {size}")
        self.steps = float(state.get("steps", 0.0))
        self.measured = np.zeros(size, dtype=np.int64)


class _Adaptive:
    """What adaptive filters share: their decayed sums."""

    def __init__(self, size: int, momentum: float) -> None:
        self.history = DecayedSums(size, momentum)

    def measured(self) -> NDArray[np.int64]:
        """What this process measured in the step."""
        return self.history.measured

    def end_step(self, measured: NDArray[np.int64], length: float) -> None:
        """Take in what all processes measured in a step of `length` reference steps, and begin the next."""
        self.history.end_step(measured, length)

    def state_dict(self) -> dict[str, object]:
        """The statistics, as JSON values."""
        return self.history.state_dict()

    def load_state_dict(self, state: dict[str, object]) -> None:
        """Restore them; an empty dictionary starts anew."""
        self.history.load_state_dict(state)


class _Quantile(_Adaptive):
    """Drops the labels whose probability lies below a quantile of the labels before.

    The quantile is known to a bin of a histogram over log-odds, 0.05 wide: 5 % of p or of 1 - p, whichever is smaller.
    The threshold is that bin's lower edge, so that no more than `share` is dropped in the long run. Until there is a
    label nothing is dropped.
    """

    reason: str

    def __init__(self, share: float, momentum: float) -> None:
        if not 0 <= share < 1:
            raise ValueError(f"{self.reason}_quantile: share, of labels to drop, must lie in [0, 1), got {share!r}")
        super().__init__(BINS, momentum)
        self.share = share

    def probability(self, row: Row) -> float:
        raise NotImplementedError

    @property
    def threshold(self) -> float:
        """The probability below which labels are dropped."""
        mass = np.cumsum(self.history.sums)
        # The first bin whose lower edge has less than the share below it and whose upper edge has more.
        return EDGES[int(np.searchsorted(mass, self.share * mass[-1], side="right"))] if mass[-1] > 0 else 0.0

    def end_step(self, measured: NDArray[np.int64], length: float) -> None:
        super().end_step(measured, length)
        self._now = self.threshold

    def load_state_dict(self, state: dict[str, object]) -> None:
        super().load_state_dict(state)
        self._now = self.threshold

    _now = 0.0
    """The threshold of this step."""

    def observe(self, row: Row) -> None:
        """Count the row in its bin."""
        self.history.add(bisect_right(EDGES, self.probability(row)) - 1, 1.0, row.age)

    def drops(self, row: Row) -> bool:
        """Whether the label is among the worst, by the labels of the steps before."""
        return self.probability(row) < self._now


class ConfidenceQuantile(_Quantile):
    """`confidence`: the least confident `share` of labels is dropped, by the labels of the steps before.

    Args:
        share: of labels to drop, in [0, 1].
        momentum: per reference step; 0.99 looks back about 100 of them.
    """

    reason: str = "confidence"
    needs_scores: ClassVar[frozenset[str]] = frozenset({CONFIDENCE})

    def __init__(self, share: float, momentum: float = 0.99) -> None:
        super().__init__(share, momentum)

    def __repr__(self) -> str:
        return f"ConfidenceQuantile(share={self.share}, momentum={self.history.momentum})"

    def probability(self, row: Row) -> float:
        """The confidence."""
        return row.label.confidence


class LogProbabilityQuantile(_Quantile):
    """`logprob`: the `share` of labels with the lowest mean log-probability is dropped, as `ConfidenceQuantile`."""

    reason: str = "logprob"
    needs_scores: ClassVar[frozenset[str]] = frozenset({LOG_PROBABILITY})

    def __init__(self, share: float, momentum: float = 0.99) -> None:
        super().__init__(share, momentum)

    def __repr__(self) -> str:
        return f"LogProbabilityQuantile(share={self.share}, momentum={self.history.momentum})"

    def probability(self, row: Row) -> float:
        """Geometric mean of the tokens' probabilities; 0 for a log-probability that is NaN."""
        score = row.score(LOG_PROBABILITY)
        return math.exp(min(score, 0.0)) if score == score else 0.0


class AdaptiveConfidence(_Adaptive):
    """`confidence`: below a threshold that rises with the teacher, and more slowly for classes it seldom predicts.

    FreeMatch's self-adaptive threshold (arXiv 2205.07246, eq. 5 to 8): tau * p(c) / max p for the label's class c,
    where tau is the moving average of confidences and p that of class probabilities, both starting at 1 / classes.
    Class probabilities are the label's soft values where it has them; of a hard label its confidence for its class,
    and the rest in equal parts for the others.

    Args:
        classes: number of classes; in a trainer the model's by default.
        momentum: per reference step.
    """

    reason: ClassVar[str] = "confidence"
    needs_scores: ClassVar[frozenset[str]] = frozenset({CONFIDENCE})
    kinds: ClassVar[frozenset[LabelKind]] = frozenset({LabelKind.CLASS})

    def __init__(self, classes: int, momentum: float = 0.999) -> None:
        in_range("confidence_adaptive: classes", classes, 2, math.inf)
        # Rows, confidences, and probabilities by class.
        super().__init__(2 + classes, momentum)
        self.classes = classes
        self._now = self.thresholds()

    def __repr__(self) -> str:
        return f"AdaptiveConfidence(classes={self.classes}, momentum={self.history.momentum})"

    def thresholds(self) -> list[float]:
        """The threshold of each class."""
        rows, means = self.history.sums[0], np.full(1 + self.classes, 1 / self.classes)
        if rows > 0:
            start = self.history.momentum**self.history.steps
            means = start * means + (1 - start) * self.history.sums[1:] / rows
        tau, shares = means[0], means[1:]
        return (tau * shares / shares.max()).tolist()

    def end_step(self, measured: NDArray[np.int64], length: float) -> None:
        """Take in what all processes measured, and move the thresholds."""
        super().end_step(measured, length)
        self._now = self.thresholds()

    def load_state_dict(self, state: dict[str, object]) -> None:
        """Restore the statistics and the thresholds."""
        super().load_state_dict(state)
        self._now = self.thresholds()

    def observe(self, row: Row) -> None:
        """Add the row's confidence and class probabilities."""
        chosen, confidence = self._class(row), row.label.confidence
        values = row.label.values
        if len(values) != self.classes:
            values = ((1 - confidence) / (self.classes - 1),) * self.classes
            values = (*values[:chosen], confidence, *values[chosen + 1 :])
        for place, value in enumerate((1.0, confidence, *values)):
            self.history.add(place, value, row.age)

    def drops(self, row: Row) -> bool:
        """Whether the confidence is below the threshold of the label's class."""
        return row.label.confidence < self._now[self._class(row)]

    def _class(self, row: Row) -> int:
        ids = row.label.ids
        if len(ids) != 1 or not 0 <= ids[0] < self.classes:
            raise ValueError(
                f"confidence_adaptive is for labels of one class out of {self.classes}, got the label ids "
                f"{list(ids)[:5]}: use confidence or confidence_quantile"
            )
        return ids[0]
