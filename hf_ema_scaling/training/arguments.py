"""The arguments of a run: all values are the recipe's, at the reference batch; one word selects this run's batch."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from transformers import TrainingArguments

from hf_ema_scaling.hub.model_card import WEIGHT_SETS as HUB_WEIGHTS
from hf_ema_scaling.scaling import (
    BatchSchedule,
    half_life_from_momentum,
    momentum_from_epoch_weight,
    momentum_from_half_life,
)
from hf_ema_scaling.scaling.momentum_schedule import MomentumScheduleKind
from hf_ema_scaling.scaling.plan import Correction
from hf_ema_scaling.scaling.recipe import Unit
from hf_ema_scaling.training.argument_checks import at_most_one, one_of
from hf_ema_scaling.training.pseudo_label_arguments import PseudoLabelArguments

__all__ = ["EMATrainingArguments", "PseudoLabelArguments"]

BATCH_UNITS = get_args(Unit)
WEIGHT_SETS = ("both", "ema", "student")
ERROR_METRICS = ("loss", "wer", "cer", "error_rate")
METRIC_DRIVEN_SCHEDULERS = ("reduce_lr_on_plateau", "greedy")


@dataclass
class EMATrainingArguments(TrainingArguments):
    """`TrainingArguments` whose step-valued arguments count **reference steps** (one is `reference_batch_size` units).

    `learning_rate`, betas, weight decay, `warmup_steps`, `max_steps`, `eval_steps`, `save_steps`, `logging_steps` are
    those of the recipe at the reference batch and are never changed. At most one of `kappa`, `batch_size`,
    `batch_schedule` selects the batch of this run; without any, the run is the recipe itself.
    `per_device_train_batch_size` is a memory limit on micro-batches and nothing else.

    Raises:
        ValueError: for contradictory or unsupported settings, with the offending value and the way out.
    """

    reference_batch_size: float | None = field(
        default=None, metadata={"help": "Batch, in units over all processes, at which the recipe was tuned. Required."}
    )
    batch_unit: str = field(
        default="samples",
        metadata={
            "help": "What batches count: samples, seconds of audio (duration_column), or tokens: length_column_name "
            "where the data set has it, else the lengths of input_ids."
        },
    )
    duration_column: str = field(
        default="duration", metadata={"help": "Column with the length of an item in seconds, for batch_unit=seconds."}
    )
    kappa: float | None = field(
        default=None, metadata={"help": "Batch of this run over the reference batch, after small_batch_until."}
    )
    batch_size: float | None = field(
        default=None, metadata={"help": "Batch of this run in units, over all processes, from the first step on."}
    )
    batch_schedule: str | None = field(
        default=None,
        metadata={
            "help": 'Batch of this run by stages, as JSON or a path to it: [{"batch_size": 64, "until": 5000}, '
            '{"batch_size": 512}]; ends in reference steps, until_epochs or until_fraction. From pl_start on a stage '
            'may state "labelled": 128, "unlabelled": 384 for its batch_size.'
        },
    )
    small_batch_until: float | None = field(
        default=None,
        metadata={"help": "With kappa: reference steps for which the batch stays the reference batch."},
    )
    scaling_rule: str = field(
        default="auto", metadata={"help": "auto: the rule of the optimizer; none: leave it unscaled (an ablation)."}
    )
    ema_momentum: float | None = field(
        default=None, metadata={"help": "Momentum rho of the average per reference step. Default 0.999."}
    )
    ema_half_life: float | None = field(
        default=None, metadata={"help": "Half-life of the average in units, instead of ema_momentum."}
    )
    ema_epoch_weight: float | None = field(
        default=None,
        metadata={
            "help": "Weight of the average that one pass over the labelled set (with unlabelled data: one after "
            "pl_start) leaves, instead of ema_momentum."
        },
    )
    ema_start: float = field(
        default=0.0, metadata={"help": "Reference step before which the average is the student itself."}
    )
    ema_momentum_schedule: str = field(
        default="constant",
        metadata={"help": "Momentum over the run: constant, or cosine from ema_momentum to 1 at the end (BYOL)."},
    )
    ema_update_every: int = field(
        default=1,
        metadata={
            "help": "Optimizer steps between updates of the average; an update has the momentum of all steps since "
            "the last one."
        },
    )
    ema_correction: str = field(
        default="none",
        metadata={
            "help": "none, or path: the average follows the weights along each step, not only where they arrive. No "
            "memory, one more pass over the weights; not with fp16 or ema_update_every."
        },
    )
    ema_buffers: str = field(
        default="average", metadata={"help": "Float buffers (BatchNorm statistics): average or copy."}
    )
    ema_dtype: str = field(
        default="float32",
        metadata={
            "help": "float32, or float64 for momenta so close to 1 that float32 loses updates: twice the memory of "
            "the average; what from_pretrained reads stays float32."
        },
    )
    scale_ema: bool = field(
        default=True, metadata={"help": "Scale the momentum with the batch; False is the ablation."}
    )
    noise_scale_every: int = field(
        default=0,
        metadata={
            "help": "Optimizer steps between measurements of the gradient noise scale (noise/scale in units and "
            "noise/largest_kappa in the logs); 0 for none. Costs two gradient norms. Where items have lengths, the "
            "steps measured are sorted by length within each half only: the same samples in other micro-batches."
        },
    )
    evaluate_weights: str = field(
        default="both", metadata={"help": "Weights to evaluate: both (eval_* and eval_ema_*), ema or student."}
    )
    bucket_window: int | None = field(
        default=0, metadata={"help": "Reference batches per length-bucketing window; 0 or None for none."}
    )
    max_example_loss: float | None = field(
        default=50.0, metadata={"help": "Cap on one example's loss (nats per target token); None for no cap."}
    )
    augment_start: float = field(
        default=0.0, metadata={"help": "Reference step at which augmentation of the student's input begins."}
    )
    augment_labelled: bool = field(
        default=True,
        metadata={"help": "Augment labelled rows, too; if not, only what the student sees of unlabelled ones."},
    )
    on_nonfinite: str = field(
        default="raise", metadata={"help": "A gradient that is not finite: raise, or skip the step."}
    )
    max_skipped_steps: int = field(
        default=100,
        metadata={
            "help": "Optimizer steps in a row that on_nonfinite=skip or fp16 loss scaling may skip: at the last of so "
            "many the run ends with an error. 0 for no limit. The logs count them (skip/steps, skip/total)."
        },
    )
    on_missing_average: str = field(
        default="raise",
        metadata={
            "help": "Where the average of the checkpoint to resume is missing or damaged: raise, or rebuild it from "
            "the student."
        },
    )
    hub_weights: str = field(
        default="ema",
        metadata={
            "help": "What a push to the Hub puts at the repository's root: ema (the student then lies in student/) or "
            "student (the average then lies in ema/)."
        },
    )

    def __post_init__(self) -> None:
        # Trainer compares it with 0, which is its word for no clipping.
        self.max_grad_norm = self.max_grad_norm or 0.0
        if self.greater_is_better is None and (self.metric_for_best_model or "").endswith(ERROR_METRICS):
            self.greater_is_better = False
        super().__post_init__()
        self.check()

    def check(self) -> None:
        """Refuses values that are none, or contradict each other.

        At construction, and again when training begins: a hyper-parameter search sets single values.

        Raises:
            ValueError: naming them.
        """
        metric = (self.metric_for_best_model or "").removeprefix("eval_")
        if (
            metric
            and self.evaluate_weights != "both"
            and metric.startswith("ema_") != (self.evaluate_weights == "ema")
        ):
            raise ValueError(
                f"metric_for_best_model={self.metric_for_best_model} is never measured with evaluate_weights="
                f"{self.evaluate_weights}: eval_ema_* is the average, every other name the student"
            )
        if self.reference_batch_size is None or not self.reference_batch_size > 0:
            raise ValueError(
                "reference_batch_size (the batch, over all processes, at which the recipe was tuned) is required and "
                f"must be above 0, got {self.reference_batch_size}"
            )
        one_of("batch_unit", self.batch_unit, BATCH_UNITS)
        one_of("evaluate_weights", self.evaluate_weights, WEIGHT_SETS)
        one_of("ema_momentum_schedule", self.ema_momentum_schedule, get_args(MomentumScheduleKind))
        one_of("ema_correction", self.ema_correction, get_args(Correction))
        one_of("ema_buffers", self.ema_buffers, ("average", "copy"))
        one_of("ema_dtype", self.ema_dtype, ("float32", "float64"))
        one_of("on_nonfinite", self.on_nonfinite, ("raise", "skip"))
        one_of("on_missing_average", self.on_missing_average, ("raise", "rebuild"))
        one_of("hub_weights", self.hub_weights, HUB_WEIGHTS)
        if self.noise_scale_every < 0 or self.noise_scale_every != int(self.noise_scale_every):
            raise ValueError(
                f"noise_scale_every counts optimizer steps (0 for no measurement), got {self.noise_scale_every}"
            )
        if self.max_skipped_steps < 0 or self.max_skipped_steps != int(self.max_skipped_steps):
            raise ValueError(f"max_skipped_steps counts steps (0 for no limit), got {self.max_skipped_steps}")
        if self.batch_unit != "seconds" and self.reference_batch_size != int(self.reference_batch_size):
            raise ValueError(f"reference_batch_size counts {self.batch_unit}, got {self.reference_batch_size}")
        at_most_one(self, ("kappa", "batch_size", "batch_schedule"))
        at_most_one(self, ("ema_momentum", "ema_half_life", "ema_epoch_weight"))
        if self.small_batch_until is not None and self.kappa is None:
            raise ValueError("small_batch_until goes with kappa; use batch_schedule for other schedules")
        if self.gradient_accumulation_steps != 1:
            raise ValueError(
                f"gradient_accumulation_steps={self.gradient_accumulation_steps}: one dataloader batch is one "
                "optimizer step here. Choose the batch by kappa, batch_size or batch_schedule and the memory by "
                "per_device_train_batch_size"
            )
        if self.ignore_data_skip:
            raise ValueError("ignore_data_skip would resume at another position than the clock's: leave it False")
        if self.auto_find_batch_size:
            raise ValueError("auto_find_batch_size would change the batch: lower per_device_train_batch_size instead")
        if str(getattr(self.lr_scheduler_type, "value", self.lr_scheduler_type)) in METRIC_DRIVEN_SCHEDULERS:
            raise ValueError(
                f"lr_scheduler_type={self.lr_scheduler_type} follows metrics, not data seen: choose another"
            )
        if self.bf16_full_eval or self.fp16_full_eval:
            raise ValueError(
                "bf16_full_eval and fp16_full_eval cast the model itself, so the student's weights would come back "
                "from an evaluation rounded: leave them False; bf16=True evaluates under autocast"
            )
        if self.label_smoothing_factor:
            raise ValueError("label_smoothing_factor is not supported: the trainers own the loss")
        if self.max_example_loss is not None and not self.max_example_loss > 0:
            raise ValueError(f"max_example_loss must be above 0 or None, got {self.max_example_loss}")

    def schedule(self, *, small_batch_until: float = 0.0) -> BatchSchedule:
        """The batch schedule of this run.

        Args:
            small_batch_until: default of the argument of that name: `pl_start` where there is one.
        """
        assert self.reference_batch_size is not None
        if self.batch_schedule is not None:
            text = self.batch_schedule
            if isinstance(text, str) and not text.lstrip().startswith(("[", "{")):
                try:
                    text = Path(text).read_text(encoding="utf-8")
                except OSError as error:
                    raise ValueError(f"batch_schedule={text!r} is neither a JSON list nor a file with one") from error
            return BatchSchedule.from_json(text)
        if self.batch_size is not None:
            return BatchSchedule.constant(self.batch_size)
        until = small_batch_until if self.small_batch_until is None else self.small_batch_until
        kappa = 1.0 if self.kappa is None else self.kappa
        if kappa == 1.0:
            return BatchSchedule.constant(self.reference_batch_size)
        return BatchSchedule.two_stage(self.reference_batch_size, kappa, until)

    def momentum(self, steps_per_epoch: float) -> float:
        """rho per reference step, from whichever argument states it.

        Args:
            steps_per_epoch: reference steps in one pass over the labelled set, for `ema_epoch_weight`.
        """
        assert self.reference_batch_size is not None
        if self.ema_half_life is not None:
            if not math.isfinite(self.ema_half_life):
                raise ValueError(f"ema_half_life must be a finite number of units, got {self.ema_half_life}")
            return momentum_from_half_life(self.ema_half_life, self.reference_batch_size)
        if self.ema_epoch_weight is not None:
            return momentum_from_epoch_weight(self.ema_epoch_weight, steps_per_epoch)
        return 0.999 if self.ema_momentum is None else self.ema_momentum

    def half_life(self, steps_per_epoch: float) -> float:
        """Half-life of the average in units."""
        assert self.reference_batch_size is not None
        return half_life_from_momentum(self.momentum(steps_per_epoch), self.reference_batch_size)

    def to_dict(self) -> dict[str, Any]:
        """As `TrainingArguments.to_dict`; every value can be written as JSON."""
        values = super().to_dict()
        if values.get("batch_schedule") is not None and not isinstance(values["batch_schedule"], str):
            values["batch_schedule"] = json.dumps(values["batch_schedule"])
        return values
