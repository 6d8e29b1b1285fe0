"""What the student makes of its targets: loss and gradient by source, and how much it would say otherwise.

Sums stay on the device of the model until somebody reads them, so that watching costs no synchronisation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hf_ema_scaling.ema.adapters import base_of
from hf_ema_scaling.ema.sharding import class_of
from hf_ema_scaling.labels import (
    CTCLabeler,
    Labeler,
    LabelKind,
    MultiLabelLabeler,
    Seq2SeqLabeler,
    ctc_frame_lengths,
)
from hf_ema_scaling.labels.agreement import YES
from hf_ema_scaling.labels.ctc import labels_differ
from hf_ema_scaling.labels.decoder import TRANSDUCERS, is_encoder_decoder
from hf_ema_scaling.labels.registry import SEQUENCE_HEADS, label_kind
from hf_ema_scaling.labels.two_views import inner_labeler
from hf_ema_scaling.training.losses import is_ctc, is_token_classifier, labels_by_token

NATS = 2**20
"""Losses are counted in parts of `1 / NATS`, as integers: their sum has no order."""
LARGEST = 1e6
"""A loss above it, infinity included, is counted as this."""

Differ = Callable[[Mapping[str, Tensor], Tensor, Tensor], Tensor]
"""`(inputs, logits, labels) -> (rows,)`: how much of a label the logits say otherwise, bool or a share."""

FIELDS = ("rows", "loss", "weighted")


class StudentWatch:
    """Sums of losses by source, of what the student says otherwise than the teacher, and of gradients by source.

    Gradients are those of each row's weighted loss in the row's logits: the last ones that belong to one row alone, so
    norms add up the same for every split into micro-batches and processes. They pass by in the backward pass, so to
    look at them costs a norm and changes no bit; that is done in steps that end with a log (`measuring`).

    Args:
        differ: compares logits and labels of rows; None where that is not cheap, or makes no sense.

    Attributes:
        measuring: whether gradients of the step are looked at.
    """

    def __init__(self, differ: Differ | None) -> None:
        self.differ = differ
        self.measuring = False
        self._sums: Tensor | None = None
        self._gradients: Tensor | None = None

    def begin(self, measuring: bool) -> None:
        """Begin a step."""
        self.measuring = measuring
        self._gradients = None

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
                differing = (self.differ(inputs, logits.detach(), labels).double() * NATS).round().long().sum()
        own, others = torch.stack([row_count, *parts]), torch.stack([zero] * len(FIELDS))
        both = (others, own) if unlabelled else (own, others)
        found = torch.cat([*both, differing[None]])
        self._sums = found if self._sums is None else self._sums + found
        if self.measuring and logits.requires_grad:
            logits.register_hook(lambda gradient: self._add_gradient(unlabelled, gradient))

    def _add_gradient(self, unlabelled: bool, gradient: Tensor) -> None:
        # Returns nothing, which leaves the gradient as it is. What overflowed is no step either.
        norms = torch.linalg.vector_norm(gradient.detach().flatten(1), dim=1, dtype=torch.float32)
        size = norms.double().nan_to_num(0.0, 0.0, 0.0).sum()
        both = torch.stack([torch.zeros_like(size), size] if unlabelled else [size, torch.zeros_like(size)])
        self._gradients = both if self._gradients is None else self._gradients + both

    def gradient_logs(self, total: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """`gradient/unlabelled_share` of the step: what pseudo-labelled rows have of the sum over rows of the norms of
        their losses' gradients, weights included; nothing for a step that was not measured.

        Args:
            total: sums a float64 vector over the processes; called on each of them, or on none.
        """
        if not self.measuring:
            return {}
        own = torch.zeros(2, dtype=torch.float64) if self._gradients is None else self._gradients.cpu()
        labelled, unlabelled = total(own).tolist()
        both = labelled + unlabelled
        return {"gradient/unlabelled_share": unlabelled / both} if both > 0 else {}

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
        `loss/unlabelled_share` (of the weighted sum) and `student/disagreement`: how much of a kept pseudo-label the
        student, in train mode and on augmented input, would have said otherwise, mean over labels. For CTC,
        transducers, one class and tags of words that is the share of labels that it would not have given. For several
        classes it is the Jaccard distance, and for decoders the share of tokens that are not the student's most
        probable one behind the label up to there; what was forced, such as a language, does not count.
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
        metrics["student/disagreement"] = counts["differing"] / NATS / counts["compared"]
    return metrics


def differ_for(model: nn.Module, labeler: Labeler) -> Differ | None:
    """Compares logits and labels by the kind of the model's head; None for numbers, and heads that nobody knows."""
    name = class_of(base_of(model)).__name__
    plain, kind = inner_labeler(labeler), label_kind(model, labeler)
    if is_ctc(model):
        if not isinstance(plain, CTCLabeler):
            return None
        no_targets = plain.no_targets

        def ctc(inputs: Mapping[str, Tensor], logits: Tensor, labels: Tensor) -> Tensor:
            return labels_differ(logits, ctc_frame_lengths(model, inputs), labels, no_targets)

        return ctc
    if name in SEQUENCE_HEADS:
        differs = {LabelKind.CLASS: _classes_differ, LabelKind.CLASSES: _several_differ(plain)}
        return None if kind is None else differs.get(kind)
    if is_token_classifier(model):
        return _tokens_differ
    if name in TRANSDUCERS:

        def transducer(inputs: Mapping[str, Tensor], logits: Tensor, labels: Tensor) -> Tensor:
            return transducer_differs(model.config, logits, ctc_frame_lengths(model, inputs), labels)

        return transducer
    if is_encoder_decoder(model):
        begun = len(plain.prompt) - 1 if isinstance(plain, Seq2SeqLabeler) else 0
        ended = len(plain.suffix) if isinstance(plain, Seq2SeqLabeler) else 0
        return lambda inputs, logits, labels: decoder_differs(logits, labels, begun, ended)
    if labels_by_token(model):
        return lambda inputs, logits, labels: decoder_differs(logits[:, :-1], labels[:, 1:])
    return None


def _classes_differ(inputs: Mapping[str, Tensor], logits: Tensor, labels: Tensor) -> Tensor:
    classes = labels.argmax(-1) if labels.is_floating_point() else labels.view(-1)
    return logits.argmax(-1) != classes


def _several_differ(labeler: Labeler) -> Differ:
    thresholds = torch.tensor(labeler.thresholds if isinstance(labeler, MultiLabelLabeler) else YES)

    def differ(inputs: Mapping[str, Tensor], logits: Tensor, labels: Tensor) -> Tensor:
        limits = thresholds.to(logits.device)
        ours, theirs = logits.float().sigmoid() >= limits, labels >= limits
        return (ours != theirs).sum(-1) / (ours | theirs).sum(-1).clamp(min=1)

    return differ


def _tokens_differ(inputs: Mapping[str, Tensor], logits: Tensor, labels: Tensor) -> Tensor:
    hard = labels.argmax(-1) if labels.is_floating_point() else labels
    return ((logits.argmax(-1) != hard) & (hard >= 0)).any(-1)


def decoder_differs(logits: Tensor, labels: Tensor, begun: int = 0, ended: int = 0) -> Tensor:
    """The share of each label's tokens that are not the most probable one behind the label up to there.

    Args:
        logits: `(rows, tokens, vocabulary)`, at the places of the labels.
        labels: int64 `(rows, tokens)`, -100 where there are none.
        begun: tokens at the beginning of a label that were forced.
        ended: the same at its end.

    Returns:
        float `(rows,)`; 0 for a row without tokens that count.
    """
    counted = labels >= 0
    place = counted.cumsum(-1)
    counted &= (place > begun) & (place <= counted.sum(-1, keepdim=True) - ended)
    return ((logits.argmax(-1) != labels) & counted).sum(-1) / counted.sum(-1).clamp(min=1)


def transducer_differs(config: Any, logits: Tensor, frames: Tensor, labels: Tensor) -> Tensor:
    """Whether the greedy path of each row, as `TransducerLabeler` takes it, leaves its label.

    Args:
        config: of the model, with `blank_token_id`, `max_symbols_per_step`, `vocab_size` and, for TDT, `durations`.
        logits: `(rows, frames, tokens + 1, vocabulary)`, of TDT with the durations behind the vocabulary.
        frames: int64 `(rows,)`.
        labels: int64 `(rows, tokens)`, padded with -100.

    Returns:
        bool `(rows,)`.
    """
    size, durations = config.vocab_size, getattr(config, "durations", None)
    best, frames = logits[..., :size].argmax(-1), frames.to(logits.device)
    steps = None
    if durations is not None:
        steps = torch.tensor(durations, device=logits.device)[logits[..., size:].argmax(-1)]
    rows, longest, places = best.shape
    number = torch.arange(rows, device=logits.device)
    # Behind its end a label says what no path does.
    wanted = torch.nn.functional.pad(labels, (0, max(1, places - labels.shape[1])), value=-100)
    frame, place, here = (torch.zeros_like(number) for _ in range(3))
    differs = torch.zeros_like(number, dtype=torch.bool)
    # Each round goes on by a frame or a token. It is not asked whether all rows are done: that would wait for the GPU.
    for _ in range(longest + places):
        active = (frame < frames) & ~differs
        at = (number, frame.clamp(max=longest - 1), place.clamp(max=places - 1))
        token = best[at]
        blank = token == config.blank_token_id
        differs |= active & ~blank & (token != wanted[number, place])
        step = blank.long() if steps is None else torch.where(blank, steps[at].clamp(min=1), steps[at])
        here = torch.where(step > 0, torch.zeros_like(here), here + 1)
        forced = here >= int(config.max_symbols_per_step)
        step, here = torch.where(forced, torch.ones_like(step), step), here.masked_fill(forced, 0)
        frame = torch.where(active, frame + step, frame)
        place = torch.where(active & ~blank & ~differs, place + 1, place)
    return differs | (place != (labels >= 0).sum(-1))
