"""Two labels of a row, from two views of it: how far they agree says more than one view's confidence."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from hf_ema_scaling.labels.agreement import disagreement
from hf_ema_scaling.labels.base import (
    Labeler,
    LabelKind,
    LabelsByPosition,
    MakesTargets,
    PseudoLabel,
    columns_of,
    draws,
    kind_of,
    scores_of,
)
from hf_ema_scaling.labels.score_filters import DISAGREEMENT

View = Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]
"""A padded batch to another view of its rows: a function of each row alone, not of its neighbours or of chance."""


def two_views(labeler: Labeler, view: View, *, scale: float | Sequence[float] | None = None) -> Labeler:
    """A labeler whose labels, those of the row as it is, say by how much another view of it changes them.

    The score `disagreement` is 0 for equal labels and 1 where nothing agrees, and the filter `disagree` judges by it.
    It costs a second forward pass of the teacher. See `labels.agreement.disagreement` for its definition: edits for
    texts, 0 or 1 for one class, the Jaccard distance for several, the share of words for tags, and for numbers their
    absolute difference over `scale`.

    Args:
        labeler: makes the labels.
        view: the other view, such as audio at another gain or with low noise of a fixed pattern. Randomness in it
            would make labels depend on the split into batches.
        scale: for numbers, and for them only: the difference that is total disagreement, one for all numbers of a row
            or one for each. The spread of labelled numbers will do: with it, `disagree` at 0.1 keeps a row whose
            number changes by less than a tenth of that.

    Raises:
        ValueError: for numbers without `scale`, a scale that is not above 0, or one for labels that are no numbers.
    """
    kind = kind_of(labeler)
    scales = () if scale is None else tuple(map(float, [scale] if isinstance(scale, int | float) else scale))
    if scales and kind not in (None, LabelKind.NUMBERS):
        raise ValueError(f"scale={scale} is for numbers, and the labels of {type(labeler).__name__} are {kind}")
    if kind is LabelKind.NUMBERS and not scales:
        raise ValueError(
            f"the labels of {type(labeler).__name__} are numbers, which agree only up to a difference that somebody "
            "must state: give two_views scale=, such as the standard deviation of the labelled numbers"
        )
    if not all(0 < one < math.inf for one in scales):
        raise ValueError(f"scale must be above 0, got {scale}")
    made = _TwoViewsWithTargets if isinstance(labeler, MakesTargets) else _TwoViews
    return made(labeler, view, scales)


class _TwoViews:
    def __init__(self, labeler: Labeler, view: View, scales: tuple[float, ...]) -> None:
        self.labeler = labeler
        self.view = view
        self.scales = scales
        self.needs_columns = columns_of(labeler)
        self.samples = draws(labeler)
        self.kind = LabelKind.NUMBERS if scales else kind_of(labeler)
        known = scores_of(labeler)
        self.score_names = None if known is None else known | {DISAGREEMENT}

    def at(self, positions: Sequence[int]) -> Labeler:
        inner = self.labeler
        return type(self)(inner.at(positions), self.view, self.scales) if isinstance(inner, LabelsByPosition) else self

    def label(self, teacher: Callable[..., Any], batch: Mapping[str, Tensor]) -> list[PseudoLabel]:
        labels = self.labeler.label(teacher, batch)
        others = self.labeler.label(teacher, self.view(batch))
        if self.kind is None and any(label.values and not label.ids for label in labels):
            raise ValueError(
                f"{type(self.labeler).__name__} does not say what its labels are, and some have values alone: for "
                "numbers give two_views scale=, for several classes set its kind to LabelKind.CLASSES"
            )
        shares = [disagreement(*pair, self.kind, self.scales) for pair in zip(labels, others, strict=True)]
        return [
            dataclasses.replace(label, scores={**label.scores, DISAGREEMENT: share})
            for label, share in zip(labels, shares, strict=True)
        ]


class _TwoViewsWithTargets(_TwoViews):
    def with_targets(self, inputs: Mapping[str, Tensor], labels: Sequence[PseudoLabel]) -> dict[str, Tensor]:
        assert isinstance(self.labeler, MakesTargets)
        return self.labeler.with_targets(inputs, labels)


def inner_labeler(labeler: Labeler) -> Labeler:
    """The labeler that makes the labels, inside of `two_views`."""
    return inner_labeler(labeler.labeler) if isinstance(labeler, _TwoViews) else labeler
