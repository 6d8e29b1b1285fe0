"""The trainers: `EMATrainer` owns an average, `PseudoLabelTrainer` also learns from the labels that it gives."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from datasets import Dataset
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import logging

from hf_ema_scaling.data.collator import MicroBatch, TwoSourceDataset
from hf_ema_scaling.data.named_views import with_second_view
from hf_ema_scaling.data.passes import CLOCK_DUST
from hf_ema_scaling.data.sampler import Draw
from hf_ema_scaling.data.stream import LABELLED, UNLABELLED
from hf_ema_scaling.ema import EMATeacher
from hf_ema_scaling.labels import Labeler, LabelsByPosition, PseudoLabel, columns_of, ctc_frame_lengths, labeler_for
from hf_ema_scaling.labels.base import LabelKind, scores_of
from hf_ema_scaling.labels.filter_base import Filter
from hf_ema_scaling.labels.ledger import Ledger
from hf_ema_scaling.labels.registry import label_kind
from hf_ema_scaling.training.aligned import aligned
from hf_ema_scaling.training.arguments import EMATrainingArguments, PseudoLabelArguments
from hf_ema_scaling.training.cached_labels import CachedLabels
from hf_ema_scaling.training.calibration import calibration, chosen_rows
from hf_ema_scaling.training.collapse_watch import CollapseWatch, check_rollback
from hf_ema_scaling.training.diagnostics import LabelStatistics
from hf_ema_scaling.training.dropout import DropoutChange
from hf_ema_scaling.training.flow import log_is_due
from hf_ema_scaling.training.hidden import HiddenReferences, split_off
from hf_ema_scaling.training.label_counts import LabelCounts
from hf_ema_scaling.training.label_judge import check_scores, durations, judge_for
from hf_ema_scaling.training.label_record import LabelRecord, SaveLedger
from hf_ema_scaling.training.label_sources import Sources
from hf_ema_scaling.training.mixin import EMATrainerMixin
from hf_ema_scaling.training.pseudo_label_step import drop_too_long, with_targets, without_targets
from hf_ema_scaling.training.streaming import refuse_streams
from hf_ema_scaling.training.student_watch import StudentWatch, differ_for
from hf_ema_scaling.training.teacher_start import PARITY_ROWS, start_teacher

logger = logging.get_logger(__name__)


class EMATrainer(EMATrainerMixin):
    """`Trainer` whose recipe is stated at a reference batch and whose weights are averaged by the EMA Scaling Rule.

    Evaluates, saves, resumes and logs student and average; see `EMATrainingArguments`. "How to Scale Your EMA",
    arXiv 2307.13813.
    """


class PseudoLabelTrainer(EMATrainerMixin):
    """`EMATrainer` that from `pl_start` on also trains on unlabelled data, labelled on the fly by the average.

    Args:
        model: the student.
        args: the recipe at the reference batch, and the batch of this run.
        unlabeled_dataset: data without labels, map-style or a stream; a `labels` column in it is never read.
        pseudo_label_args: when, how much and which pseudo-labels enter the loss.
        labeler: turns teacher output into labels; None for `labeler_for(model)`.
        filters: which labels are dropped, after those that `pseudo_label_args` names.
        teacher_factory: builds the teacher's module where a transformers config does not suffice.
        **kwargs: as for `EMATrainer`; `train_dataset` is the labelled set.

    Raises:
        ValueError: without unlabelled data, where the config does not say what labels mean, or for filters that ask
            for what is not there.
        NotImplementedError: for a head whose labeler must be given.
    """

    def __init__(
        self,
        model: PreTrainedModel | nn.Module | None = None,
        args: EMATrainingArguments | None = None,
        *,
        unlabeled_dataset: Any | None = None,
        pseudo_label_args: PseudoLabelArguments | None = None,
        labeler: Labeler | None = None,
        filters: Sequence[Filter] | None = None,
        teacher_factory: Callable[[], nn.Module] | None = None,
        **kwargs: Any,
    ) -> None:
        if unlabeled_dataset is None:
            raise ValueError("PseudoLabelTrainer needs an unlabeled_dataset; without one use EMATrainer")
        self.pseudo_label_args = pseudo = pseudo_label_args or PseudoLabelArguments()
        if args is not None:
            # Before anything is taken out of them.
            refuse_streams(args, kwargs.get("train_dataset"), unlabeled_dataset, pseudo, world_size=1)
        references = None
        if pseudo.hidden_reference_column is not None:
            unlabeled_dataset, references = split_off(unlabeled_dataset, pseudo.hidden_reference_column)
        self.unlabeled_dataset = unlabeled_dataset
        self.teacher_factory = teacher_factory
        self.teacher: EMATeacher | None = None
        self.cached_labels: CachedLabels | None = None
        super().__init__(model, args, **kwargs)
        sources = Sources(unlabeled_dataset, pseudo.source_column)
        labeler, alignment = aligned(
            labeler or labeler_for(self.model, self.processing_class),
            pseudo,
            labelled=self.train_dataset,
            sources=sources,
        )
        self.labeler: Labeler = with_second_view(labeler, pseudo.second_view, self.processing_class)
        self.label_kind = label_kind(self.model, self.labeler)
        if getattr(self.model.config, "feat_extract_norm", None) == "group":
            logger.warning(
                "This model's group norm sees the padding of a batch (feat_extract_norm='group'): labels depend on "
                "their neighbours. Set bucket_window, or use a model with feat_extract_norm='layer'."
            )
        column = self.args.duration_column
        self.judge = judge_for(
            self.model,
            pseudo,
            filters,
            labeler=self.labeler,
            ctc=self.ctc,
            processing_class=self.processing_class,
            labelled=self.train_dataset,
            unlabelled=unlabeled_dataset,
            duration_column=column,
            alignment=alignment,
        )
        self.student_watch = StudentWatch(differ_for(self.model, labeler))
        self.record = LabelRecord(
            self.args.batch_unit,
            sources,
            reasons=self.judge.chain.reasons,
            student=self.student_watch,
            hidden=self._hidden(references),
            seconds=(durations(self.train_dataset, column), self.judge.seconds),
            tokens=durations(unlabeled_dataset, str(self.args.length_column_name)),
            numbers=self.label_kind is LabelKind.NUMBERS,
            classes=self.label_kind is LabelKind.CLASS,
        )
        self.dropout = None if pseudo.pl_dropout is None else DropoutChange(self.model, pseudo.pl_dropout)
        check_rollback(self.args, pseudo)
        self.collapse = CollapseWatch(self, pseudo.on_collapse, pseudo.collapse_window, pseudo.pl_start)
        if pseudo.calibration_rows and self.label_kind is LabelKind.NUMBERS:
            raise ValueError(
                f"calibration_rows={pseudo.calibration_rows} compares confidence with accuracy, and a regression has "
                "neither: leave it at 0"
            )
        self._calibrated_at = -1
        self.add_callback(self.collapse)
        self.add_callback(SaveLedger(self))

    def _hidden(self, references: Dataset | None) -> HiddenReferences | None:
        if references is None:
            return None
        outputs = getattr(getattr(self.model, "config", None), "num_labels", None)
        return HiddenReferences(references, self.judge.decode, kind=self.label_kind, outputs=outputs)

    @property
    def label_statistics(self) -> LabelStatistics:
        """What is counted of labels between logs, on this process."""
        return self.record.statistics

    @property
    def ledger(self) -> Ledger:
        """What was kept and dropped, over all processes, as of the last log, checkpoint or end of training."""
        return self.record.ledger

    def unlabelled_data(self) -> tuple[Any, PseudoLabelArguments]:
        """The unlabelled data set and its arguments."""
        return self.unlabeled_dataset, self.pseudo_label_args

    def columns_for_labeler(self) -> tuple[str, ...]:
        """What the labeler says that it needs (`needs_columns`)."""
        return columns_of(self.labeler)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As `EMATrainer.train`; see `on_collapse`.

        Raises:
            CollapseError: pseudo-labels collapsed, and training was stopped.
            NotImplementedError: `on_collapse="rollback"` in a hyper-parameter search.
        """
        if kwargs.get("trial") is not None and self.pseudo_label_args.on_collapse == "rollback":
            raise NotImplementedError(
                "on_collapse=rollback in a hyper-parameter search: a run that goes back is no trial any more, and its "
                "checkpoints lie in folders of their own. Use stop or warn"
            )
        return self.collapse.train(super().train, resume_from_checkpoint, *args, **kwargs)

    def begin_training(self) -> None:
        """Also builds the teacher over the average's storage and tests that it is the student with other weights."""
        self.cached_labels = None
        if self.dropout is not None:
            # `model_init` makes another student for each run; its predecessor's config may be its own.
            self.dropout.set(False)
            self.dropout = DropoutChange(self.model, self.dropout.probability)
        resumed = self._resumed
        checkpoint = None
        if resumed is not None and resumed.checkpoint is not None:
            checkpoint = resumed.checkpoint, resumed.global_step
        if self.sampler.stream.pool is not None:
            self.cached_labels = CachedLabels(self.sampler, self.accelerator, checkpoint)
        super().begin_training()
        self._calibrated_at = -1
        if checkpoint is not None and resumed is not None:
            self.collapse.resumed(checkpoint[0], resumed.clock)
        assert self.average is not None
        wanted = 1 if self.pseudo_label_args.teacher_dtype == "float32" else PARITY_ROWS
        dataset = self.run_dataset()
        count = dataset.at_most(UNLABELLED, min(wanted, self.args.per_device_train_batch_size))
        inputs = self._collated(dataset, UNLABELLED, range(count))
        self.teacher = start_teacher(
            self.model,
            self.average,
            self._prepare_inputs(dict(inputs)),
            self.labeler,
            dtype=self.pseudo_label_args.teacher_dtype,
            factory=self.teacher_factory,
            autocast=self.accelerator.autocast,
        )
        if self.judge.chain.needs_scores and scores_of(self.labeler) is None:
            # Nobody knows what this labeler gives until it has given it: better now than at pl_start.
            check_scores(self.judge.chain, self._teacher_labels(inputs, range(count)))

    def _collated(self, dataset: TwoSourceDataset, source: int, rows: Sequence[int]) -> dict[str, Any]:
        return dict(self.data_collator([dict(dataset[Draw(source, row, 0, 0, 1.0)][1]) for row in rows]))

    def label_micro_batches(self, inputs: dict[str, list[MicroBatch]]) -> list[MicroBatch]:
        """Labels the unlabelled rows by the teacher, on clean inputs; in its own batches where there are such.

        All labels of a step are made by the teacher as it is when the step begins, and judged by the statistics of
        the steps before. With a cache only the rows that enter it are labelled; every row drawn has the label with
        which it entered.
        """
        step = self._last_step
        assert step is not None
        begun = step.start > self.pseudo_label_args.pl_start - CLOCK_DUST
        if self.dropout is not None:
            self.dropout.set(begun)
        self.student_watch.begin(begun and log_is_due(self, self.state.global_step))
        micro_batches = super().label_micro_batches(inputs)
        drawn = [batch for batch in micro_batches if batch["source"] == UNLABELLED and batch["weight"]]
        number = self.state.global_step
        # On every process, also one that has nothing to label: a sharded average is gathered by all of them together.
        if self.teacher is not None and any(batch["source"] == UNLABELLED for batch in micro_batches):
            self.teacher.refresh()
        found: dict[int, PseudoLabel] = {}
        for batch in inputs.get("label_batches", drawn if self.sampler.labels_micro_batches(number) else []):
            found.update(zip(batch["positions"], self.labels_of(batch), strict=True))
        if self.cached_labels is not None:
            found = self.cached_labels.labels(number, found, drawn)
        targets = [self._with_labels(batch, found) for batch in micro_batches]
        if begun:
            self.judge.chain.end_step(self._total_counts, step.kappa)
        self.label_statistics.end_step(number)
        return targets

    def _with_labels(self, micro_batch: MicroBatch, found: dict[int, PseudoLabel]) -> MicroBatch:
        if micro_batch["source"] == LABELLED:
            if micro_batch["weight"]:
                self.record.gold(micro_batch)
            return micro_batch
        if micro_batch["weight"] == 0:
            return without_targets(micro_batch, self.labeler)
        labels = [found[position] for position in micro_batch["positions"]]
        if self.ctc:
            labels = drop_too_long(labels, ctc_frame_lengths(self.model, micro_batch["inputs"]))
        self.record.used(labels, micro_batch["indices"], self.sampler.stream)
        result = with_targets(micro_batch, self.labeler, labels, self._weights(micro_batch["positions"], labels))
        self.record.targets(result, labels)
        return result

    def _weights(self, positions: list[int], labels: list[PseudoLabel]) -> float | Tensor:
        """lambda; while it rises, that of each row's own reference step, so that it is the same at every kappa."""
        arguments, pauses = self.pseudo_label_args, self.collapse.guard.pauses
        if arguments.pl_ramp == 0 and not pauses and not arguments.weight_by_confidence:
            return arguments.unlabeled_weight
        clocks = self.sampler.stream.clock(np.array(positions))
        weights = arguments.unlabeled_weight * self.collapse.guard.weight(clocks)
        if arguments.pl_ramp:
            ramp = self.plan.recipe.pseudo_label_ramp()
            weights = weights * [ramp.at(step) for step in np.floor(clocks + CLOCK_DUST).astype(int).tolist()]
        if arguments.weight_by_confidence:
            weights = weights * [label.confidence for label in labels]
        return torch.tensor(weights, dtype=torch.float32)

    def labels_of(self, batch: MicroBatch) -> list[PseudoLabel]:
        """The teacher's label for each row of one of its batches, judged by the filters."""
        step, stream = self._last_step, self.sampler.stream
        assert step is not None
        end = step.end
        labels = self.judge.judge(
            self._teacher_labels(batch["inputs"], batch["positions"]),
            batch,
            lambda positions: end - stream.clock(np.array(positions)),
        )
        self.record.made(labels, batch["indices"], stream)
        return labels

    def _teacher_labels(self, inputs: Mapping[str, Any], positions: Sequence[int] | None = None) -> list[PseudoLabel]:
        assert self.teacher is not None
        labeler = self.labeler
        if positions is not None and isinstance(labeler, LabelsByPosition):
            labeler = labeler.at(positions)
        prepared: dict[str, Tensor] = self._prepare_inputs(dict(inputs))
        with self.accelerator.autocast():
            return labeler.label(self.teacher, prepared)

    def largest_loss(self, micro_batch: MicroBatch) -> float | None:
        """Cap on the loss of an example, a tighter one for pseudo-labels where there is one."""
        caps = [super().largest_loss(micro_batch)]
        if micro_batch["source"] == UNLABELLED:
            caps.append(self.pseudo_label_args.max_unlabeled_loss)
        return min((cap for cap in caps if cap is not None), default=None)

    def observe_losses(self, micro_batch: MicroBatch, *rows: Any) -> None:
        """Sums losses by source."""
        self.student_watch.observe(micro_batch["source"] == UNLABELLED, *rows)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As `EMATrainer`; then, once at each step of training, logs how right the teacher is on labelled rows."""
        metrics = super().evaluate(*args, **kwargs)
        asked, step = self.pseudo_label_args.calibration_rows, self.state.global_step
        if asked and self.teacher is not None and self._calibrated_at != step:
            self._calibrated_at = step
            self.teacher.refresh()
            rows = chosen_rows(self.sampler.stream.labelled_items, asked)
            mine = rows[self.accelerator.process_index :: self.accelerator.num_processes]
            size = self.args.per_device_eval_batch_size
            dataset = self.run_dataset()
            parts = [mine[i : i + size] for i in range(0, len(mine), size)]
            batches = ((part, self._collated(dataset, LABELLED, part)) for part in parts)
            self.log(calibration(batches, self._teacher_labels, self.labeler, self._total_counts, self.label_kind))
        return metrics

    def training_logs(self) -> dict[str, float]:
        """Also what became of pseudo-labels since the last log, their weight and gradient, and the cache."""
        gradients = self.student_watch.gradient_logs(self._total_counts)
        logs = {**super().training_logs(), **self.record.logs(self.gather), **gradients}
        step, start = self._last_step, self.plan.recipe.pl_start
        if step is not None and start is not None and step.end > start + CLOCK_DUST:
            rise = self.plan.recipe.pseudo_label_ramp().mean(step.start, step.end)
            left = float(self.collapse.guard.weight(np.array([step.start]))[0])
            logs["pl/weight"] = self.pseudo_label_args.unlabeled_weight * rise * left
            if self.collapse.guard.alarms:
                logs["collapse/alarms"] = float(len(self.collapse.guard.alarms))
        return logs if self.cached_labels is None else {**logs, **self.cached_labels.logs()}

    def window_metrics(self) -> tuple[LabelCounts, dict[str, float]]:
        """What the collapse guard looks at; called on every process."""
        return self.record.window(self.gather)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As `EMATrainer`; a checkpoint also gets the labels in the cache (`label_cache.safetensors`)."""
        with contextlib.nullcontext() if self.dropout is None else self.dropout.configs_as_given():
            super().save_model(output_dir, _internal_call)
        # Trainer names the folder in its own calls for checkpoints only.
        checkpoint = output_dir if _internal_call and self.is_in_train else None
        if self.cached_labels is not None and checkpoint is not None and self.args.should_save:
            self.cached_labels.cache.save(checkpoint)

    def gather(self, state: Any) -> list[Any]:
        """JSON values of all processes, on all of them, which must all call it."""
        return gather_object([state]) if self.accelerator.num_processes > 1 else [state]

    def _total_counts(self, counts: Any) -> Any:
        """The sum over processes of an array of integers or a tensor."""
        if self.accelerator.num_processes == 1:
            return counts
        total = self.accelerator.reduce(torch.as_tensor(counts).to(self.args.device), reduction="sum").cpu()
        return total if isinstance(counts, Tensor) else total.numpy()

    def counters(self) -> dict[str, Any]:
        """Also what is counted of labels, over all processes while they train together, and what adapts to it."""
        cache = {} if self.cached_labels is None else {"cache": self.cached_labels.state_dict()}
        return {
            **super().counters(),
            **self.record.state_dict(self.gather if self.is_in_train else None),
            "thresholds": self.judge.chain.state_dict(),
            "collapse": self.collapse.guard.state_dict(),
            **cache,
        }

    def load_counters(self, counters: dict[str, Any]) -> None:
        """Restore `counters()`."""
        super().load_counters(counters)
        self.record.load_state_dict(counters, main=self.is_world_process_zero())
        self.judge.chain.load_state_dict(counters.get("thresholds", {}))
        self.collapse.guard.load_state_dict(counters.get("collapse", {}))
        if self.cached_labels is not None:
            self.cached_labels.load_state_dict(counters.get("cache", {}))
