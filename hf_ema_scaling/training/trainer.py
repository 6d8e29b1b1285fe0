"""The trainers: `EMATrainer` owns an average, `PseudoLabelTrainer` also learns from the labels that it gives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import logging

from hf_ema_scaling.data.collator import MicroBatch
from hf_ema_scaling.data.passes import CLOCK_DUST
from hf_ema_scaling.data.sampler import Draw
from hf_ema_scaling.data.stream import LABELLED, UNLABELLED
from hf_ema_scaling.ema import EMATeacher
from hf_ema_scaling.labels import Labeler, PseudoLabel, columns_of, ctc_frame_lengths, labeler_for
from hf_ema_scaling.training.arguments import EMATrainingArguments, PseudoLabelArguments
from hf_ema_scaling.training.cached_labels import CachedLabels
from hf_ema_scaling.training.diagnostics import LabelStatistics
from hf_ema_scaling.training.mixin import EMATrainerMixin
from hf_ema_scaling.training.pseudo_label_step import drop_too_long, label_rows, with_targets, without_targets
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
        teacher_factory: builds the teacher's module where a transformers config does not suffice.
        **kwargs: as for `EMATrainer`; `train_dataset` is the labelled set.

    Raises:
        ValueError: without unlabelled data, or where the config does not say what labels mean.
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
        teacher_factory: Callable[[], nn.Module] | None = None,
        **kwargs: Any,
    ) -> None:
        if unlabeled_dataset is None:
            raise ValueError("PseudoLabelTrainer needs an unlabeled_dataset; without one use EMATrainer")
        self.unlabeled_dataset = unlabeled_dataset
        self.pseudo_label_args = pseudo_label_args or PseudoLabelArguments()
        self.teacher_factory = teacher_factory
        self.teacher: EMATeacher | None = None
        self.label_statistics = LabelStatistics()
        self.cached_labels: CachedLabels | None = None
        super().__init__(model, args, **kwargs)
        self.labeler: Labeler = labeler or labeler_for(self.model, self.processing_class)
        if getattr(self.model.config, "feat_extract_norm", None) == "group":
            logger.warning(
                "This model's group norm sees the padding of a batch (feat_extract_norm='group'): labels depend on "
                "their neighbours. Set bucket_window, or use a model with feat_extract_norm='layer'."
            )

    def unlabelled_data(self) -> tuple[Any, PseudoLabelArguments]:
        """The unlabelled data set and its arguments."""
        return self.unlabeled_dataset, self.pseudo_label_args

    def columns_for_labeler(self) -> tuple[str, ...]:
        """What the labeler says that it needs (`needs_columns`)."""
        return columns_of(self.labeler)

    def begin_training(self) -> None:
        """Also builds the teacher over the average's storage and tests that it follows the student."""
        self.cached_labels = None
        if self.sampler.stream.pool is not None:
            resumed = self._resumed
            checkpoint = None
            if resumed is not None and resumed.checkpoint is not None:
                checkpoint = resumed.checkpoint, resumed.global_step
            self.cached_labels = CachedLabels(self.sampler, self.accelerator, checkpoint)
        super().begin_training()
        assert self.average is not None
        dataset = self.run_dataset()
        wanted = 1 if self.pseudo_label_args.teacher_dtype == "float32" else PARITY_ROWS
        count = dataset.at_most(UNLABELLED, min(wanted, self.args.per_device_train_batch_size))
        rows = [dict(dataset[Draw(UNLABELLED, number, 0, 0, 1.0)][1]) for number in range(count)]
        self.teacher = start_teacher(
            self.model,
            self.average,
            self._prepare_inputs(self.data_collator(rows)),
            self.labeler,
            dtype=self.pseudo_label_args.teacher_dtype,
            factory=self.teacher_factory,
        )

    def label_micro_batches(self, inputs: dict[str, list[MicroBatch]]) -> list[MicroBatch]:
        """Labels the unlabelled rows by the teacher, on clean inputs; in its own batches where there are such.

        All labels of a step are made by the teacher as it is when the step begins. With a cache only the rows that
        enter it are labelled; every row drawn has the label with which it entered.
        """
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
        return [batch if batch["source"] == LABELLED else self._labelled(batch, found) for batch in micro_batches]

    def _labelled(self, micro_batch: MicroBatch, found: dict[int, PseudoLabel]) -> MicroBatch:
        if micro_batch["weight"] == 0:
            return without_targets(micro_batch, self.labeler)
        labels = [found[position] for position in micro_batch["positions"]]
        if self.ctc:
            labels = drop_too_long(labels, ctc_frame_lengths(self.model, micro_batch["inputs"]))
        self.label_statistics.add(labels)
        return with_targets(micro_batch, self.labeler, labels, self._weights(micro_batch["positions"]))

    def _weights(self, positions: list[int]) -> float | Tensor:
        """lambda; while it rises, that of each row's own reference step, so that it is the same at every kappa."""
        full = self.pseudo_label_args.unlabeled_weight
        if self.pseudo_label_args.pl_ramp == 0:
            return full
        ramp = self.plan.recipe.pseudo_label_ramp()
        steps = np.floor(self.sampler.stream.clock(np.array(positions)) + CLOCK_DUST).astype(int).tolist()
        return torch.tensor([full * ramp.at(step) for step in steps], dtype=torch.float32)

    def labels_of(self, batch: MicroBatch) -> list[PseudoLabel]:
        """The teacher's label for each row of one of its batches, an unlabelled micro-batch or one of its own."""
        assert self.teacher is not None
        inputs: dict[str, Tensor] = self._prepare_inputs(dict(batch["inputs"]))
        with self.accelerator.autocast():
            return label_rows(self.labeler, self.teacher, inputs, min_confidence=self.pseudo_label_args.min_confidence)

    def training_logs(self) -> dict[str, float]:
        """Also the shares of pseudo-labels kept and dropped since the last log, their weight, and the cache."""
        logs = {**super().training_logs(), **self.label_statistics.logs(self._over_processes)}
        step, start = self._last_step, self.plan.recipe.pl_start
        if step is not None and start is not None and step.end > start + CLOCK_DUST:
            rise = self.plan.recipe.pseudo_label_ramp().mean(step.start, step.end)
            logs["pl/weight"] = self.pseudo_label_args.unlabeled_weight * rise
        return logs if self.cached_labels is None else {**logs, **self.cached_labels.logs()}

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As `EMATrainer`; a checkpoint also gets the labels in the cache (`label_cache.safetensors`)."""
        super().save_model(output_dir, _internal_call)
        # Trainer names the folder in its own calls for checkpoints only.
        checkpoint = output_dir if _internal_call and self.is_in_train else None
        if self.cached_labels is not None and checkpoint is not None and self.args.should_save:
            self.cached_labels.cache.save(checkpoint)

    def _over_processes(self, values: Tensor) -> Tensor:
        return self.accelerator.reduce(values.to(self.args.device), reduction="sum").cpu()

    def counters(self) -> dict[str, Any]:
        """Also the counts of pseudo-labels, over all processes while they train together."""
        total = self._over_processes if self.is_in_train else None
        cache = {} if self.cached_labels is None else {"cache": self.cached_labels.state_dict()}
        return {**super().counters(), "labels": self.label_statistics.state_dict(total), **cache}

    def load_counters(self, counters: dict[str, Any]) -> None:
        """Restore `counters()`; what was counted over all processes goes to one of them."""
        super().load_counters(counters)
        mine = counters.get("labels", {}) if self.is_world_process_zero() else {}
        self.label_statistics.load_state_dict(mine)
        if self.cached_labels is not None:
            self.cached_labels.load_state_dict(counters.get("cache", {}))
