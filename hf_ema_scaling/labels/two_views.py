"""Two labels of a row, from two views of it: how far they agree says more than one view's confidence."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rapidfuzz.distance import Levenshtein
from torch import Tensor

from hf_ema_scaling.labels.base import Labeler, LabelsByPosition, MakesTargets, PseudoLabel, columns_of
from hf_ema_scaling.labels.score_filters import DISAGREEMENT

View = Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]
"""A padded batch to another view of its rows: a function of each row alone, not of its neighbours or of chance."""


def two_views(labeler: Labeler, view: View) -> Labeler:
    """A labeler whose labels, those of the row as it is, say by how much another view of it changes them.

    The score `disagreement` is the number of edits between both labels over the length of the longer one (0 for equal
    labels, 1 where nothing agrees; for one class 0 or 1), and the filter `disagree` judges by it. For the numbers a, b
    of a regression it is |a - b| / (|a| + |b|), which also lies in [0, 1]. It costs a second forward pass of the
    teacher.

    Args:
        labeler: makes the labels.
        view: the other view, such as audio at another gain or with low noise of a fixed pattern. Randomness in it
            would make labels depend on the split into batches.
    """
    return _TwoViewsWithTargets(labeler, view) if isinstance(labeler, MakesTargets) else _TwoViews(labeler, view)


class _TwoViews:
    def __init__(self, labeler: Labeler, view: View) -> None:
        self.labeler = labeler
        self.view = view
        self.needs_columns = columns_of(labeler)

    def at(self, positions: Sequence[int]) -> Labeler:
        inner = self.labeler
        return two_views(inner.at(positions), self.view) if isinstance(inner, LabelsByPosition) else self

    def label(self, teacher: Callable[..., Any], batch: Mapping[str, Tensor]) -> list[PseudoLabel]:
        labels = self.labeler.label(teacher, batch)
        others = self.labeler.label(teacher, self.view(batch))
        return [
            dataclasses.replace(label, scores={**label.scores, DISAGREEMENT: _between(label, other)})
            for label, other in zip(labels, others, strict=True)
        ]


class _TwoViewsWithTargets(_TwoViews):
    def with_targets(self, inputs: Mapping[str, Tensor], labels: Sequence[PseudoLabel]) -> dict[str, Tensor]:
        assert isinstance(self.labeler, MakesTargets)
        return self.labeler.with_targets(inputs, labels)


def _between(label: PseudoLabel, other: PseudoLabel) -> float:
    """The disagreement of two labels; of numbers (a regression) their distance over the sum of their sizes."""
    if label.ids or other.ids or not (label.values and other.values):
        return disagreement(label.ids, other.ids)
    size = math.hypot(*label.values) + math.hypot(*other.values)
    return math.dist(label.values, other.values) / size if size else 0.0


def disagreement(first: Sequence[int], second: Sequence[int]) -> float:
    """Edits between two labels over the length of the longer one; 0 for two empty ones."""
    return float(Levenshtein.normalized_distance(first, second))
