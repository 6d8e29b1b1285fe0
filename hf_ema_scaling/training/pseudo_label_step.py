"""The semi-supervised part of a step: the teacher labels, unusable labels are dropped, targets are padded."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor

from hf_ema_scaling.data.collator import MicroBatch, pad_labels
from hf_ema_scaling.labels.base import Labeler, MakesTargets, PseudoLabel, columns_of
from hf_ema_scaling.labels.ctc import min_ctc_frames


def drop_too_long(labels: list[PseudoLabel], frames: Tensor) -> list[PseudoLabel]:
    """Kept labels that need more CTC frames than the student has for the row are dropped with reason `too_long`.

    Args:
        labels: one per row.
        frames: int64 `(rows,)`, frames that the student makes of each row.
    """
    return [
        dataclasses.replace(label, reason="too_long") if label.kept and min_ctc_frames(label.ids) > room else label
        for label, room in zip(labels, frames.tolist(), strict=True)
    ]


def with_targets(
    micro_batch: MicroBatch, labeler: Labeler, labels: list[PseudoLabel], weight: float | Tensor
) -> MicroBatch:
    """The micro-batch with `labels` as targets, and without what only the labeler needs (`columns_of`).

    Dropped rows stay, so that batch statistics do not depend on labels.

    Args:
        micro_batch: unlabelled rows.
        labeler: says what targets are made of its labels (`MakesTargets`); others give rows of ids, padded with -100.
        labels: one per row.
        weight: lambda, the weight of a kept row; or float32 `(rows,)`, of each.
    """
    result = micro_batch.copy()
    inputs = micro_batch["inputs"]
    if isinstance(labeler, MakesTargets):
        result["inputs"] = labeler.with_targets(inputs, labels)
    else:
        result["inputs"] = {**inputs, "labels": pad_labels([label.ids if label.kept else () for label in labels])}
    result["inputs"] = inputs_of_model(result["inputs"], labeler)
    result["example_weights"] = torch.tensor([label.kept for label in labels]).float() * weight
    return result


def inputs_of_model(inputs: Mapping[str, Tensor], labeler: Labeler) -> dict[str, Tensor]:
    """The inputs without what only the labeler needs."""
    return {name: value for name, value in inputs.items() if name not in columns_of(labeler)}


def without_targets(micro_batch: MicroBatch, labeler: Labeler) -> MicroBatch:
    """A padding micro-batch, which needs no labels because nothing of it enters the loss."""
    nothing = PseudoLabel((), 0.0, "padding")
    return with_targets(micro_batch, labeler, [nothing] * len(micro_batch["positions"]), 0.0)
