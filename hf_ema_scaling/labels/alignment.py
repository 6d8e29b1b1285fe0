"""Distribution alignment: class probabilities of the teacher, corrected for what it says too often and too seldom.

A teacher that has seen few labels leans to one class, all the more on data of another kind, and a student that learns
its labels leans further. Alignment assumes that unlabelled rows, or those of each source, have classes as often as
labelled rows do; where they have not it does harm.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hf_ema_scaling.labels.base import Labeler, PseudoLabel
from hf_ema_scaling.labels.score_filters import ENTROPY
from hf_ema_scaling.labels.sequence import MARGIN, ClassLabeler
from hf_ema_scaling.labels.thresholds import DecayedSums

BINS, RANGE = 800, 40.0
"""Log-odds are counted in so many equal bins from -RANGE to RANGE: a teacher that has learnt its labels by heart is
sure beyond what a few decimals of a probability show."""
CENTRES: NDArray[np.float64] = -RANGE + (np.arange(BINS) + 0.5) * 2 * RANGE / BINS
PRIOR_LABELS = 10.0
"""Offsets of a source are those found on its labels times n / (n + PRIOR_LABELS), for n labels."""


class LabelAlignment:
    """Shifts the log-odds of each class so that classes are, on average, as probable as in labelled data.

    The aim is that of ReMixMatch's distribution alignment (arXiv 1911.09785, section 3.2), and by source of AdaMatch's
    (arXiv 2106.04732). They multiply probabilities by a ratio of means, which hardly moves those near 0 and 1. Here
    the shift is the one at which the labels before would have had the wanted mean. That is exact for two classes; of
    more, each is judged against all others, and their shifts hold together as far as they are small.

    The labels before count as the teacher gave them, with a weight that falls by `momentum` for each reference step
    since. So shifts are a function of the data seen, the same at every kappa but that a step's own labels are aligned
    by the steps before.

    Args:
        shares: of each class in labelled data; they add up to 1.
        sources: number of sources that are aligned one by one.
        momentum: per reference step, in [0, 1).

    Raises:
        ValueError: for fewer than two classes, shares that are no distribution, or another momentum.
    """

    def __init__(self, shares: Sequence[float], sources: int = 1, momentum: float = 0.98) -> None:
        self.shares: NDArray[np.float64] = np.asarray(shares, dtype=np.float64)
        if self.shares.ndim != 1 or len(self.shares) < 2:
            raise ValueError(f"alignment needs the shares of at least 2 classes, got {list(shares)}")
        if self.shares.min() < 0 or not math.isclose(self.shares.sum(), 1.0, abs_tol=1e-6):
            raise ValueError(f"shares of classes must add up to 1 and not be below 0, got {list(shares)}")
        self.sources = sources
        # A histogram of log-odds for each class of each source.
        self.history = DecayedSums(sources * len(self.shares) * BINS, momentum)
        self._now = self.shifts()

    def __repr__(self) -> str:
        classes = len(self.shares)
        return f"LabelAlignment(classes={classes}, sources={self.sources}, momentum={self.history.momentum})"

    def shifts(self) -> NDArray[np.float64]:
        """What is added to log-probabilities, `(sources, classes)`; -inf for a class that labelled data lacks."""
        classes = len(self.shares)
        counts = self.history.sums.reshape(self.sources, classes, BINS)
        labels = counts.sum(-1)
        low, high = np.full_like(labels, -2 * RANGE), np.full_like(labels, 2 * RANGE)
        # Halved until float64 shows no difference.
        for _ in range(60):
            middle = (low + high) / 2
            means = (counts / (1 + np.exp(-CENTRES - middle[..., None]))).sum(-1)
            above = means > self.shares * labels
            low, high = np.where(above, low, middle), np.where(above, middle, high)
        found = np.where(labels > 0, (low + high) / 2, 0.0) * labels / (labels + PRIOR_LABELS)
        # Between a class and all others the log-odds change by its own shift less the mean of theirs.
        return np.where(self.shares > 0, found * (classes - 1) / classes, -math.inf)

    def align(self, label: PseudoLabel, source: int, age: float, *, soft: bool) -> PseudoLabel:
        """The label with its probabilities corrected, which are counted as they were.

        Its class is the most probable one, its confidence, entropy and margin are those of the new probabilities.
        Dropped labels stay as they are and are not counted.

        Args:
            label: with the probabilities of all classes as `values`.
            source: number of its source.
            age: reference steps from its place in the stream to the end of the step.
            soft: whether probabilities are what the student learns; else the label is left without them.

        Raises:
            ValueError: for a label without them.
        """
        if not label.kept:
            return label
        classes = len(self.shares)
        if len(label.values) != classes:
            raise ValueError(
                f"a label has {len(label.values)} probabilities, and there are {classes} classes to align: the "
                "labeler must give the probabilities of all classes as values"
            )
        # The smallest float64 for a probability of 0.
        given = [math.log(max(value, 5e-324)) for value in label.values]
        for place, value in enumerate(given):
            odds = value - _log_sum(given[:place] + given[place + 1 :])
            at = min(max(int((odds + RANGE) * BINS / (2 * RANGE)), 0), BINS - 1)
            self.history.add((source * classes + place) * BINS + at, 1.0, age)
        shifted = [value + shift for value, shift in zip(given, self._now[source].tolist(), strict=True)]
        total = _log_sum(shifted)
        probabilities = [math.exp(value - total) for value in shifted]
        second, first = sorted(probabilities)[-2:]
        entropy = -math.fsum(p * math.log(p) for p in probabilities if p > 0) / math.log(classes)
        return dataclasses.replace(
            label,
            ids=(probabilities.index(first),),
            confidence=min(first, 1.0),
            values=tuple(probabilities) if soft else (),
            scores={**label.scores, ENTROPY: entropy, MARGIN: first - second},
        )

    def measured(self) -> NDArray[np.int64]:
        """What this process counted in the step."""
        return self.history.measured

    def end_step(self, measured: NDArray[np.int64], length: float) -> None:
        """Take in what all processes counted in a step of `length` reference steps, and begin the next."""
        self.history.end_step(measured, length)
        self._now = self.shifts()

    def state_dict(self) -> dict[str, object]:
        """The histograms, as JSON values."""
        return self.history.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore them; an empty dictionary starts anew."""
        self.history.load_state_dict(state)
        self._now = self.shifts()


def _log_sum(values: Sequence[float]) -> float:
    """Logarithm of the sum of exponentials; of -inf alone, -inf."""
    highest = max(values)
    return highest if highest == -math.inf else highest + math.log(math.fsum(math.exp(v - highest) for v in values))


def with_probabilities(labeler: Labeler) -> tuple[ClassLabeler, bool]:
    """A copy of a labeler that gives the probabilities of all classes, and whether the student learns them.

    Raises:
        ValueError: for one whose labels are not one class per row.
    """
    if not isinstance(labeler, ClassLabeler):
        raise ValueError(
            f"align_labels is for labels of one class per row, of a ClassLabeler, and the labeler is a "
            f"{type(labeler).__name__}: set it to null; give a second view by second_view"
        )
    labeler = copy.copy(labeler)
    labeler.probabilities = True
    return labeler, labeler.soft


def class_shares(labels: Sequence[int] | NDArray[Any], classes: int) -> list[float]:
    """The share of each class in labelled data.

    Args:
        labels: class ids of the labelled rows.
        classes: number of classes.

    Raises:
        ValueError: for ids that are no classes.
    """
    found = np.asarray(labels)
    if found.ndim != 1 or not np.issubdtype(found.dtype, np.integer) or found.min() < 0 or found.max() >= classes:
        raise ValueError(f"align_labels needs labels that are ids of {classes} classes, got {found[:5].tolist()}")
    return (np.bincount(found, minlength=classes) / len(found)).tolist()
