"""How right the teacher is on labelled rows, and how far its confidence is from that."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from rapidfuzz.distance import Levenshtein
from torch import Tensor

from hf_ema_scaling.data.collator import pad_labels
from hf_ema_scaling.labels.agreement import errors
from hf_ema_scaling.labels.base import Labeler, LabelKind, MakesTargets, PseudoLabel, ReadsLabelledRows
from hf_ema_scaling.labels.two_views import inner_labeler

BINS = 10
"""Bins of confidence, of equal width."""


def chosen_rows(available: int, wanted: int) -> list[int]:
    """Row numbers, evenly spread over a data set; all of them where it has no more than are wanted."""
    return np.unique(np.linspace(0, available - 1, min(wanted, available)).round().astype(int)).tolist()


def calibration(
    batches: Iterable[tuple[Sequence[int], Mapping[str, Tensor]]],
    label: Callable[[Mapping[str, Tensor], Sequence[int]], list[PseudoLabel]],
    labeler: Labeler,
    total: Callable[[Tensor], Tensor],
    kind: LabelKind | None = None,
) -> dict[str, float]:
    """Labels labelled rows and compares.

    Args:
        batches: row numbers, and collated labelled rows of this process, with their `labels`, on the CPU.
        label: labels inputs, as `labeler` has them of unlabelled rows, by the teacher. A labeler that draws does so by
            the row number, so that the split into batches and processes changes nothing.
        labeler: makes targets of labels, as in training.
        total: sums a float64 vector over the processes.
        kind: what labels say; not numbers, which have no accuracy.

    Returns:
        `calibration/error`: edits between labels and gold labels over the length of gold; the share of wrong classes,
        of wrong decisions about a class where there are several, of wrong ones among the words with a label.
        `calibration/ece`: expected calibration error, the mean over rows of how far the mean confidence of their bin
        is from its mean accuracy, where the accuracy of a row is 1 - its error, at least 0 (Guo et al. 2017, eq. 3).
        Nothing without rows.
    """
    edits, lengths = 0.0, 0.0
    bins: NDArray[np.float64] = np.zeros((BINS, 3))
    for rows, batch in batches:
        inputs = dict(batch)
        gold = inputs.pop("labels")
        if isinstance(reader := inner_labeler(labeler), ReadsLabelledRows):
            inputs, gold = reader.as_unlabelled(inputs, gold)
        labels = label(inputs, rows)
        targets = _targets(labeler, inputs, labels)
        for one, (wrong, size) in zip(labels, _wrong(labels, targets, gold, kind), strict=True):
            edits, lengths = edits + wrong, lengths + size
            accuracy = max(0.0, 1 - wrong / max(1, size))
            bins[min(int(one.confidence * BINS), BINS - 1)] += (1.0, one.confidence, accuracy)
    sums = total(torch.tensor([edits, lengths, *bins.flatten()], dtype=torch.float64)).numpy()
    (edits, lengths), bins = sums[:2], sums[2:].reshape(BINS, 3)
    judged = bins[:, 0].sum()
    if judged == 0 or lengths == 0:
        return {}
    gaps = np.abs(bins[:, 1] - bins[:, 2]).sum()
    return {"calibration/error": float(edits / lengths), "calibration/ece": float(gaps / judged)}


def _targets(labeler: Labeler, inputs: Mapping[str, Tensor], labels: Sequence[PseudoLabel]) -> Tensor:
    """What the loss would see of labels, dropped ones included."""
    if isinstance(labeler, MakesTargets):
        every = [PseudoLabel(label.ids, label.confidence, None, label.values) for label in labels]
        return labeler.with_targets(inputs, every)["labels"]
    return pad_labels([label.ids for label in labels])


def _wrong(
    labels: Sequence[PseudoLabel], targets: Tensor, gold: Tensor, kind: LabelKind | None
) -> list[tuple[float, int]]:
    """What is wrong of each row, and out of how much (`agreement.errors`)."""
    if kind is LabelKind.CLASSES:
        return [errors(label, wanted, kind) for label, wanted in zip(labels, gold.tolist(), strict=True)]
    if kind is LabelKind.WORDS:
        # In their places; a word that is not sure enough has no target.
        both = (targets >= 0) & (gold >= 0)
        return list(zip(((targets != gold) & both).sum(-1).tolist(), both.sum(-1).tolist(), strict=True))
    pairs = zip(_sequences(targets), _sequences(gold), strict=True)
    return [(Levenshtein.distance(found, wanted), len(wanted)) for found, wanted in pairs]


def _sequences(labels: Tensor) -> list[list[int]]:
    """Label ids of each row without padding; of the probabilities of classes the most probable one."""
    if labels.is_floating_point():
        labels = labels.argmax(-1)
    return [[one for one in row if one >= 0] for row in labels.reshape(len(labels), -1).tolist()]
