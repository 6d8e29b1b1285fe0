"""What the student makes of its targets: loss by source, and how often it would label otherwise.

Sums stay on the device of the model until somebody reads them, so that watching costs no synchronisation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
)

from hf_ema_scaling.ema.adapters import base_of
from hf_ema_scaling.ema.sharding import class_of
from hf_ema_scaling.labels import CTCLabeler, Labeler, ctc_frame_lengths
from hf_ema_scaling.labels.ctc import labels_differ
from hf_ema_scaling.training.losses import is_ctc

NATS = 2**20
"""Losses are counted in parts of `1 / NATS`, as integers: their sum has no order."""
LARGEST = 1e6
"""A loss above it, infinity included, is counted as this."""

Differ = Callable[[Mapping[str, Tensor], Tensor, Tensor], Tensor]
"""`(inputs, logits, labels) -> bool (rows,)`: whether logits say something else than the label."""

FIELDS = ("rows", "loss", "weighted")


class StudentWatch:
    """Sums of losses by source, and of rows on which the student differs from the teacher.

    Args:
        differ: compares logits and labels of rows; None where that is not cheap.
    """

    def __init__(self, differ: Differ | None) -> None:
        self.differ = differ
        self._sums: Tensor | None = None

    def observe(
        self,
        unlabelled: bool,
        inputs: Mapping[str, Tensor],
        logits: Tensor,
        labels: Tensor,
        losses: Tensor,
        weights: Tensor | None,
    ) -> None:
        """Take in the rows of a micro-batch that have a target.

        Args:
            unlabelled: whether they are pseudo-labelled.
            inputs: the student's.
            logits: in train mode, of augmented inputs.
            labels: the targets.
            losses: `(rows,)`, in nats, capped.
            weights: `(rows,)`, what they are weighted with; None for 1.
        """
        losses = losses.detach().float().nan_to_num(LARGEST, LARGEST, -LARGEST).clamp(-LARGEST, LARGEST)
        weighted = losses if weights is None else losses * weights.to(losses)
        parts = [(part * NATS).round().long().sum() for part in (losses, weighted)]
        zero = torch.zeros_like(parts[0])
        row_count = zero + len(losses)
        differing = zero
        if unlabelled and self.differ is not None:
            with torch.no_grad():
                differing = self.differ(inputs, logits.detach(), labels).sum()
        own, others = torch.stack([row_count, *parts]), torch.stack([zero] * len(FIELDS))
        both = (others, own) if unlabelled else (own, others)
        found = torch.cat([*both, differing[None]])
        self._sums = found if self._sums is None else self._sums + found

    def drain(self) -> dict[str, int]:
        """The sums since the last call, by the names that `student_metrics` reads."""
        if self._sums is None:
            return {}
        names = [f"{source}_{name}" for source in ("labelled", "unlabelled") for name in FIELDS]
        sums = dict(zip([*names, "differing"], self._sums.tolist(), strict=True))
        if self.differ is not None:
            sums["compared"] = sums["unlabelled_rows"]
        self._sums = None
        return sums


def student_metrics(counts: Mapping[str, int]) -> dict[str, float]:
    """What the sums say, where there were pseudo-labels with a loss.

    Returns:
        `loss/labelled` and `loss/unlabelled` (nats, means over rows with a target, before weights),
        `loss/unlabelled_share` (of the weighted sum) and `student/disagreement`: the share of kept pseudo-labels that
        the student, in train mode and on augmented input, would have labelled otherwise.
    """
    rows = counts.get("unlabelled_rows", 0)
    if rows == 0:
        return {}
    weighted = [counts.get(f"{source}_weighted", 0) for source in ("labelled", "unlabelled")]
    metrics = {"loss/unlabelled": counts["unlabelled_loss"] / NATS / rows}
    if counts.get("labelled_rows", 0):
        metrics["loss/labelled"] = counts["labelled_loss"] / NATS / counts["labelled_rows"]
    if sum(weighted):
        metrics["loss/unlabelled_share"] = weighted[1] / sum(weighted)
    if counts.get("compared", 0):
        metrics["student/disagreement"] = counts["differing"] / counts["compared"]
    return metrics


def differ_for(model: nn.Module, labeler: Labeler) -> Differ | None:
    """Compares logits and labels by the kind of the model's head; None for heads where that takes more than argmax."""
    name = class_of(base_of(model)).__name__
    if is_ctc(model):
        if not isinstance(labeler, CTCLabeler):
            return None
        no_targets = labeler.no_targets

        def ctc(inputs: Mapping[str, Tensor], logits: Tensor, labels: Tensor) -> Tensor:
            return labels_differ(logits, ctc_frame_lengths(model, inputs), labels, no_targets)

        return ctc
    if name in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES.values():
        return _classes_differ
    if name in MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES.values():
        return _tokens_differ
    return None


def _classes_differ(inputs: Mapping[str, Tensor], logits: Tensor, labels: Tensor) -> Tensor:
    if logits.shape[-1] == 1:
        # A regression agrees with nothing to the bit.
        return torch.zeros(len(labels), dtype=torch.bool, device=logits.device)
    classes = labels.argmax(-1) if labels.is_floating_point() else labels.view(-1)
    return logits.argmax(-1) != classes


def _tokens_differ(inputs: Mapping[str, Tensor], logits: Tensor, labels: Tensor) -> Tensor:
    hard = labels.argmax(-1) if labels.is_floating_point() else labels
    return ((logits.argmax(-1) != hard) & (hard >= 0)).any(-1)
