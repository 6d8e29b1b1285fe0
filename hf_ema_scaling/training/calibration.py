"""How right the teacher is on labelled rows, and how far its confidence is from that."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from rapidfuzz.distance import Levenshtein
from torch import Tensor

from hf_ema_scaling.data.collator import pad_labels
from hf_ema_scaling.labels.base import Labeler, MakesTargets, PseudoLabel

BINS = 10
"""Bins of confidence, of equal width."""


def chosen_rows(available: int, wanted: int) -> list[int]:
    """Row numbers, evenly spread over a data set; all of them where it has no more than are wanted."""
    return np.unique(np.linspace(0, available - 1, min(wanted, available)).round().astype(int)).tolist()


def calibration(
    batches: Iterable[Mapping[str, Tensor]],
    label: Callable[[Mapping[str, Tensor]], list[PseudoLabel]],
    labeler: Labeler,
    total: Callable[[Tensor], Tensor],
) -> dict[str, float]:
    """Labels labelled rows and compares.

    Args:
        batches: collated labelled rows of this process, with their `labels`, on the CPU.
        label: labels inputs, by the teacher.
        labeler: makes targets of labels, as in training.
        total: sums a float64 vector over the processes.

    Returns:
        `calibration/error`: edits between labels and gold labels over the length of gold (for classes, the share of
        wrong ones); `calibration/ece`: expected calibration error, the mean over rows of how far the mean confidence
        of their bin is from its mean accuracy, where the accuracy of a row is 1 - its error, at least 0 (Guo et al.
        2017, eq. 3). Nothing without rows.
    """
    edits = lengths = 0
    bins: NDArray[np.float64] = np.zeros((BINS, 3))
    for batch in batches:
        inputs = dict(batch)
        gold = inputs.pop("labels")
        labels = label(inputs)
        for one, found, wanted in zip(labels, _targets(labeler, inputs, labels), _sequences(gold), strict=True):
            wrong = Levenshtein.distance(found, wanted)
            edits, lengths = edits + wrong, lengths + len(wanted)
            accuracy = max(0.0, 1 - wrong / max(1, len(wanted)))
            bins[min(int(one.confidence * BINS), BINS - 1)] += (1.0, one.confidence, accuracy)
    sums = total(torch.tensor([edits, lengths, *bins.flatten()], dtype=torch.float64)).numpy()
    (edits, lengths), bins = sums[:2], sums[2:].reshape(BINS, 3)
    rows = bins[:, 0].sum()
    if rows == 0 or lengths == 0:
        return {}
    gaps = np.abs(bins[:, 1] - bins[:, 2]).sum()
    return {"calibration/error": float(edits / lengths), "calibration/ece": float(gaps / rows)}


def _targets(labeler: Labeler, inputs: Mapping[str, Tensor], labels: Sequence[PseudoLabel]) -> list[list[int]]:
    """What the loss would see of labels, dropped ones included."""
    if isinstance(labeler, MakesTargets):
        every = [PseudoLabel(label.ids, label.confidence, None, label.values) for label in labels]
        return _sequences(labeler.with_targets(inputs, every)["labels"])
    return _sequences(pad_labels([label.ids for label in labels]))


def _sequences(labels: Tensor) -> list[list[int]]:
    """Label ids of each row without padding; of classes their most probable one."""
    if labels.is_floating_point():
        if labels.ndim < 2 or labels.shape[1] < 2:
            raise ValueError("calibration_rows needs classes or label ids: a regression has no accuracy; set it to 0")
        labels = labels.argmax(-1)
    return [[one for one in row if one >= 0] for row in labels.reshape(len(labels), -1).tolist()]
