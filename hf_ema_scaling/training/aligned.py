"""Alignment of a run's labels: by which shares, for which sources."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hf_ema_scaling.data.collator import LABEL_COLUMNS
from hf_ema_scaling.data.streaming import is_stream
from hf_ema_scaling.labels.alignment import LabelAlignment, class_shares, with_probabilities
from hf_ema_scaling.labels.base import Labeler, PseudoLabel
from hf_ema_scaling.training.arguments import PseudoLabelArguments
from hf_ema_scaling.training.label_sources import Sources


class Aligned:
    """Aligns the labels of rows by the means of their sources.

    Args:
        alignment: of the sources in the order of `sources.names`, or of one.
        sources: where rows of the unlabelled set come from.
        soft: whether the student learns probabilities.
    """

    def __init__(self, alignment: LabelAlignment, sources: Sources, *, soft: bool) -> None:
        self.alignment = alignment
        self.sources = sources
        self.soft = soft

    def __call__(self, labels: Sequence[PseudoLabel], rows: Sequence[int], ages: Sequence[float]) -> list[PseudoLabel]:
        """The labels of rows of the unlabelled set that are so many reference steps old when the step ends."""
        several = self.alignment.sources > 1
        codes = self.sources.codes(rows) if several else [0] * len(rows)
        return [
            self.alignment.align(label, code, age, soft=self.soft)
            for label, code, age in zip(labels, codes, ages, strict=True)
        ]


def aligned(
    labeler: Labeler, pseudo: PseudoLabelArguments, *, labelled: Any, sources: Sources
) -> tuple[Labeler, Aligned | None]:
    """The labeler as an alignment needs it, and the alignment; the labeler itself and None where there is none.

    Args:
        labeler: makes the labels.
        pseudo: with `align_labels`.
        labelled: the labelled set, which says how frequent classes are.
        sources: where rows of the unlabelled set come from.

    Raises:
        ValueError: for a labeler, or a labelled set, that it cannot work with.
    """
    if pseudo.align_labels is None:
        return labeler, None
    labeler, soft = with_probabilities(labeler)
    columns = [] if is_stream(labelled) else getattr(labelled, "column_names", None) or []
    column = next((name for name in LABEL_COLUMNS if name in columns), None)
    if column is None:
        raise ValueError(
            f"align_labels={pseudo.align_labels} counts the classes of the labelled set, and train_dataset is a "
            "stream or has no labels: give a map-style data set, or set it to null"
        )
    shares = class_shares(labelled.with_format("numpy")[column][:], labeler.outputs)
    number = len(sources.names) if pseudo.align_labels == "source" else 1
    return labeler, Aligned(LabelAlignment(shares, number), sources, soft=soft)
