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

PRIOR_LABELS = 10.0
"""So many labels with the shares of the labelled data count as seen before, in each source, at any time."""


class LabelAlignment:
    """Multiplies class probabilities by the share of the class in labelled data over its mean probability.

    ReMixMatch's distribution alignment (arXiv 1911.09785, section 3.2); by source, the target's part of AdaMatch's
    (arXiv 2106.04732). Means are those of the labels before, as the teacher gave them, and a label's weight in them
    falls by `momentum` for each reference step since. So they are a function of the data seen, the same at every
    kappa but that a step's own labels are aligned by the steps before.

    Args:
        shares: of each class in labelled data; they add up to 1.
        sources: number of sources that are aligned one by one.
        momentum: per reference step, in [0, 1).

    Raises:
        ValueError: for fewer than two classes, shares that are no distribution, or another momentum.
    """

    def __init__(self, shares: Sequence[float], sources: int = 1, momentum: float = 0.99) -> None:
        self.shares: NDArray[np.float64] = np.asarray(shares, dtype=np.float64)
        if self.shares.ndim != 1 or len(self.shares) < 2:
            raise ValueError(f"alignment needs the shares of at least 2 classes, got {list(shares)}")
        if self.shares.min() < 0 or not math.isclose(self.shares.sum(), 1.0, abs_tol=1e-6):
            raise ValueError(f"shares of classes must add up to 1 and not be below 0, got {list(shares)}")
        self.sources = sources
        # Labels, and probabilities by class, of each source.
        self._size = 1 + len(self.shares)
        self.history = DecayedSums(sources * self._size, momentum)
        self._now = self.factors()

    def __repr__(self) -> str:
        classes = len(self.shares)
        return f"LabelAlignment(classes={classes}, sources={self.sources}, momentum={self.history.momentum})"

    def means(self) -> NDArray[np.float64]:
        """Mean probabilities, `(sources, classes)`."""
        sums = self.history.sums.reshape(self.sources, self._size)
        return (sums[:, 1:] + PRIOR_LABELS * self.shares) / (sums[:, :1] + PRIOR_LABELS)

    def factors(self) -> NDArray[np.float64]:
        """What probabilities are multiplied by, `(sources, classes)`; 0 for a class that labelled data lacks."""
        means = self.means()
        return np.divide(self.shares, means, out=np.zeros_like(means), where=(self.shares > 0) & (means > 0))

    def align(self, label: PseudoLabel, source: int, age: float, *, soft: bool) -> PseudoLabel:
        """The label with its probabilities corrected, which are then counted.

        Its class is the most probable one, its confidence, entropy and margin are those of the new probabilities.
        Dropped labels stay as they are and are not counted, and so does one whose classes labelled data lacks.

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
        if len(label.values) != len(self.shares):
            raise ValueError(
                f"a label has {len(label.values)} probabilities, and there are {len(self.shares)} classes to align: "
                "the labeler must give the probabilities of all classes as values"
            )
        place = source * self._size
        for number, value in enumerate((1.0, *label.values)):
            self.history.add(place + number, value, age)
        weighted = np.array(label.values) * self._now[source]
        if (total := weighted.sum()) > 0:
            probabilities = (weighted / total).tolist()
            best = int(np.argmax(probabilities))
            second, first = sorted(probabilities)[-2:]
            entropy = -math.fsum(p * math.log(p) for p in probabilities if p > 0) / math.log(len(probabilities))
            label = dataclasses.replace(
                label,
                ids=(best,),
                confidence=first,
                values=tuple(probabilities),
                scores={**label.scores, ENTROPY: entropy, MARGIN: first - second},
            )
        return label if soft else dataclasses.replace(label, values=())

    def measured(self) -> NDArray[np.int64]:
        """What this process counted in the step."""
        return self.history.measured

    def end_step(self, measured: NDArray[np.int64], length: float) -> None:
        """Take in what all processes counted in a step of `length` reference steps, and begin the next."""
        self.history.end_step(measured, length)
        self._now = self.factors()

    def state_dict(self) -> dict[str, object]:
        """The means, as JSON values."""
        return self.history.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore them; an empty dictionary starts anew."""
        self.history.load_state_dict(state)
        self._now = self.factors()


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
