"""`PseudoLabelCollator`: labels from the average of an `EMACallback`, in the stock `Trainer`'s data loader."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from hf_ema_scaling.ema import EMATeacher
from hf_ema_scaling.labels import (
    FILTERS,
    CTCLabeler,
    Filter,
    FilterChain,
    Labeler,
    LabelsByPosition,
    MakesTargets,
    PseudoLabel,
    Row,
    build_filters,
)
from hf_ema_scaling.labels.base import draws
from hf_ema_scaling.labels.decoder import with_decoder_start
from hf_ema_scaling.labels.filter_base import SECONDS, SOURCE, TEXT
from hf_ema_scaling.labels.filters import read_filters
from hf_ema_scaling.labels.score_filters import Confidence
from hf_ema_scaling.labels.serving import check_served, names_of
from hf_ema_scaling.labels.transducer import TransducerLabeler
from hf_ema_scaling.labels.two_views import inner_labeler
from hf_ema_scaling.training.callback import EMACallback
from hf_ema_scaling.training.label_judge import source_ids, text_decoder
from hf_ema_scaling.training.pseudo_label_step import inputs_of_model

Example = Mapping[str, Any]
Collate = Callable[[list[dict[str, Any]]], Mapping[str, Any]]

LABELS = "labels"
CTC_LIKE = (CTCLabeler, TransducerLabeler)
"""Labelers whose ids have been collapsed already."""
_DUST = 1e-9
DROPPED_IN_A_ROW = 1000
"""So many dropped pseudo-labels without one that is kept are an error: the teacher labels nothing."""


def _has_no_labels(example: Example) -> bool:
    return example.get(LABELS) is None


class PseudoLabelCollator:
    """Lets the average of an `EMACallback` label the unlabelled examples of each batch of the stock `Trainer`.

    ```python
    average = EMACallback(momentum=0.999, reference_batch_size=64)
    collator = PseudoLabelCollator(average, CTCLabeler(blank_id=0), pad, stand_ins=labelled)
    Trainer(model, args, data_collator=collator, train_dataset=mixed, callbacks=[average])
    ```

    Examples with labels stay. The others are collated once without labels for the teacher (clean input, eval mode,
    float32 whatever the student's autocast) and, where the label is kept, once more with it for the student; all
    keep their order. Dropped examples leave the batch, so a batch may be smaller than the loader's, and the mean of
    the stock loss is over what is left; kappa still counts what the loader drew.

    An empty batch would stop the stock loop. If nothing is left, one of `stand_ins` takes the place of the batch,
    chosen by the number of the step; without stand-ins this raises.

    The loader collates one batch of an epoch ahead: labels of a step's first batch come from the average of one step
    before, those of further batches that it accumulates from the latest. A resumed run collates its first batch anew,
    and labels it by the latest: it is not bit-identical to one that was never stopped. `PseudoLabelTrainer` is.

    The data loader must run in the training process (`dataloader_num_workers=0`): a worker would label with the
    weights it was started with.

    Trainer evaluates through the same collator; evaluation examples need labels of their own.

    Before the first label of a run the teacher is compared with the student on one example, see
    `EMACallback.check_teacher`; what the labeler takes beside the model's inputs must be in its `needs_columns`.

    `filters` drop labels as in `PseudoLabelArguments`, written the same way; their reasons are in `counts`. Text is
    decoded by `processing_class`, seconds are those of `duration_column`, inputs the teacher's `input_ids`.
    Filters whose thresholds follow the labels of a step are refused: a collator sees batches, not steps.

    A labeler that draws random numbers needs to know which example is which: without `id_column` it could only go by
    an example's place in the batch, and would draw other labels for another batch size, order or number of processes.
    With it a label depends on the weights, the labeler's seed and the example's id.

    Args:
        callback: The callback that the Trainer also has in its `callbacks`.
        labeler: Makes the labels, for example a `CTCLabeler`.
        collate: Collates examples with labels into the student's batch; augmentation belongs here.
        teacher_collate: Collates examples without `labels` into the teacher's batch; None for `collate`, which then
            must do without labels.
        is_unlabeled: Says which examples the teacher labels; None for those whose `labels` are missing or None. Labels
            of such an example are removed before anything sees them. What it looks at must reach the collator:
            `remove_unused_columns=True` drops columns that the model's forward does not take.
        pl_start: In reference steps of the callback's clock; until then unlabelled examples leave the batch.
        stand_ins: Labelled examples, one of which replaces a batch of which nothing is left.
        filters: Filters by name with their arguments, as JSON or a mapping, or filters as objects.
        min_confidence: Labels less confident than this are dropped, after all filters.
        processing_class: Tokenizer or processor that decodes labels and inputs.
        duration_column: Seconds of each example, for filters. It must reach the collator, and does not go on to
            `collate`.
        id_column: An integer of at least 0 that is the example's own, for labelers that draw; likewise.

    Attributes:
        counts: Pseudo-labels so far on this process: "kept", each reason of labeler and filters, "before_start" for
            examples before `pl_start`, and "stand_in" for replaced batches. Starts at zero on resume.

    Raises:
        ValueError: `pl_start` is negative or not finite; for filters that cannot be built, or that ask for what is not
            there; for a labeler that draws without `id_column`.
        NotImplementedError: for a labeler whose targets are not rows of ids (`MakesTargets`), and adaptive filters.
    """

    def __init__(
        self,
        callback: EMACallback,
        labeler: Labeler,
        collate: Collate,
        *,
        teacher_collate: Collate | None = None,
        is_unlabeled: Callable[[Example], bool] = _has_no_labels,
        pl_start: float = 0,
        stand_ins: Sequence[Example] | None = None,
        filters: str | Mapping[str, Any] | Sequence[Filter] | None = None,
        min_confidence: float = 0.0,
        processing_class: Any = None,
        duration_column: str | None = None,
        id_column: str | None = None,
    ) -> None:
        if not (math.isfinite(pl_start) and pl_start >= 0):
            raise ValueError(f"pl_start must be a number of reference steps of at least 0, got {pl_start!r}")
        if isinstance(labeler, MakesTargets):
            raise NotImplementedError(
                f"{type(labeler).__name__} makes targets of a kind of its own, and PseudoLabelCollator takes labels "
                "that are rows of ids, as CTC has them: use PseudoLabelTrainer"
            )
        if draws(labeler) and id_column is None:
            raise ValueError(
                f"{type(labeler).__name__} draws its labels at random, and nothing in a batch of the stock loader "
                "tells which example is which: name a column of integers that are the examples' own by id_column, "
                "decode without a temperature, or use PseudoLabelTrainer, which knows every item's place"
            )
        self.callback = callback
        self.labeler = labeler
        self.collate = collate
        self.teacher_collate = collate if teacher_collate is None else teacher_collate
        self.is_unlabeled = is_unlabeled
        self.pl_start = float(pl_start)
        self.stand_ins = stand_ins
        self.duration_column = duration_column
        self.id_column = id_column
        self._decode = text_decoder(processing_class, ctc=isinstance(inner_labeler(labeler), CTC_LIKE))
        self.chain = self._chain(filters, min_confidence)
        self.counts: Counter[str] = Counter()
        self._dropped_in_a_row = 0
        self._checked: EMATeacher | None = None

    def __call__(self, examples: Sequence[Example]) -> Mapping[str, Any]:
        """Collate one batch.

        Args:
            examples: Rows of the data set.

        Returns:
            What `collate` makes of the labelled rows and the rows whose pseudo-label is kept.

        Raises:
            RuntimeError: Called in a loader worker, before training, or nothing is left and there are no stand-ins.
            ValueError: The labeler did not return one label per row.
            DeadTeacherError: The teacher is not the student with other weights.
        """
        if get_worker_info() is not None:
            raise RuntimeError(
                "PseudoLabelCollator runs in a data loader worker, which has the teacher of the moment it was "
                "started; set dataloader_num_workers=0."
            )
        unlabelled = [i for i, example in enumerate(examples) if self.is_unlabeled(example)]
        if self.callback.clock >= self.pl_start - _DUST:
            # On every process at the same batch: a sharded average is gathered by all of them together.
            together = self.callback.meet_teacher()
            if unlabelled or together:
                self._check_teacher(examples[unlabelled[0] if unlabelled else 0])
        targets = self._label([examples[i] for i in unlabelled]) if unlabelled else []
        by_row = dict(zip(unlabelled, targets, strict=True))
        kept: list[dict[str, Any]] = []
        for i, example in enumerate(examples):
            if i not in by_row:
                kept.append(self._without_own(example))
            elif (target := by_row[i]) is not None:
                kept.append({**self._without_own(example), LABELS: target})
        return self.collate(kept or [self._stand_in(len(examples))])

    def _chain(self, written: str | Mapping[str, Any] | Sequence[Filter] | None, min_confidence: float) -> FilterChain:
        """The filters, after a look at whether they can judge these labels."""
        given = {what for what, there in ((TEXT, self._decode), (SECONDS, self.duration_column)) if there is not None}
        # Whether inputs are text shows in the first batch.
        served = (self.labeler, "this collator's labels", {*given, SOURCE})
        chosen: list[Filter] = []
        if isinstance(written, (str, Mapping)):
            check_served({name: FILTERS[name] for name in read_filters(written)}, *served)
            chosen = build_filters(written)
        elif written is not None:
            chosen = list(written)
            check_served(names_of(chosen), *served)
        if min_confidence > 0:
            chosen.append(Confidence(min_confidence))
            check_served({f"min_confidence={min_confidence:g}": chosen[-1]}, *served)
        chain = FilterChain(chosen)
        if chain.adaptive:
            raise NotImplementedError(
                f"{', '.join(chain.adaptive)} follows the labels of each optimizer step, over all processes, and a "
                "collator sees batches: use PseudoLabelTrainer, or a fixed limit"
            )
        ways_out = {TEXT: "processing_class=, which decodes labels", SECONDS: "duration_column="}
        for what, names in chain.needs.items():
            if what in ways_out and what not in given:
                raise ValueError(f"the filters {', '.join(names)} need {ways_out[what]}")
        return chain

    def _judged(
        self, labels: list[PseudoLabel], examples: Sequence[Example], batch: Mapping[str, Any]
    ) -> list[PseudoLabel]:
        sources = source_ids(batch) if SOURCE in self.chain.needs and "input_ids" in batch else None

        def row(number: int) -> Row:
            seconds = None if self.duration_column is None else float(examples[number][self.duration_column])
            ids = None if sources is None else sources[number]
            return Row(labels[number], decode=self._decode, seconds=seconds, source_ids=ids)

        return self.chain.judge(labels, row)

    def _without_own(self, example: Example) -> dict[str, Any]:
        """The example without the columns that are for this collator alone."""
        return {name: value for name, value in example.items() if name not in (self.id_column, self.duration_column)}

    def _label(self, examples: list[Example]) -> list[list[int] | None]:
        """Label ids of each example, None where there are none to train on."""
        if not self.callback.has_begun:
            raise RuntimeError(
                f"{self.callback!r} has no average to label with: it must be in the callbacks= of the Trainer whose "
                "train() collates these examples"
            )
        if self.callback.clock < self.pl_start - _DUST:
            self.counts["before_start"] += len(examples)
            return [None] * len(examples)
        teacher = self.callback.teacher
        batch = self._without_labels(examples, teacher.device)
        labeler = self.labeler
        if self.id_column is not None and isinstance(labeler, LabelsByPosition):
            labeler = labeler.at([int(example[self.id_column]) for example in examples])
        found = labeler.label(teacher, batch)
        if len(found) != len(examples):
            raise ValueError(f"{type(self.labeler).__name__} returned {len(found)} labels for {len(examples)} rows")
        found = self._judged(found, examples, batch)
        for label in found:
            self.counts[label.reason or "kept"] += 1
            self._dropped_in_a_row = 0 if label.kept else self._dropped_in_a_row + 1
        if self._dropped_in_a_row >= DROPPED_IN_A_ROW:
            raise RuntimeError(
                f"the last {self._dropped_in_a_row} pseudo-labels were all dropped ({dict(self.counts)}): the teacher "
                "labels nothing. Start from a better model, raise pl_start, or loosen the labeler."
            )
        return [list(label.ids) if label.kept else None for label in found]

    def _without_labels(self, examples: Sequence[Example], device: torch.device) -> dict[str, Any]:
        rows = [self._without_own(example) for example in examples]
        for row in rows:
            row.pop(LABELS, None)
        batch = self.teacher_collate(rows)
        return {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}

    def _check_teacher(self, example: Example) -> None:
        """Tests a teacher that has not been tested yet, on one example."""
        teacher = self.callback.teacher
        if teacher is self._checked:
            return
        inputs = inputs_of_model(self._without_labels([example], teacher.device), self.labeler)
        inputs.pop(LABELS, None)
        self.callback.check_teacher(with_decoder_start(teacher.module, inputs))
        self._checked = teacher

    def _stand_in(self, drawn: int) -> dict[str, Any]:
        if not self.stand_ins:
            raise RuntimeError(
                f"nothing is left of a batch of {drawn} examples: it has no labelled example and every pseudo-label "
                f"was dropped ({dict(self.counts)}), and Trainer cannot take an empty batch. Pass stand_ins= with "
                "labelled examples, or put a labelled example into every batch."
            )
        self.counts["stand_in"] += 1
        return self._without_own(self.stand_ins[self.callback.global_step % len(self.stand_ins)])
