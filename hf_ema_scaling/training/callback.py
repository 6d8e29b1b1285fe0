"""`EMACallback`: keeps, saves, resumes and exports the average of the weights in the stock `Trainer`."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import SaveStrategy
from transformers.utils import logging

from hf_ema_scaling.ema import EMATeacher, WeightAverage, check_before_labelling
from hf_ema_scaling.ema.adapter_storage import check_adapters
from hf_ema_scaling.ema.export import export_average
from hf_ema_scaling.ema.half_precision import warn_of_half_precision
from hf_ema_scaling.ema.names import unwrap
from hf_ema_scaling.ema.shadow import BufferPolicy
from hf_ema_scaling.ema.skipped import SkipWatch
from hf_ema_scaling.ema.storage import OnMissing
from hf_ema_scaling.ema.swap import is_swapped
from hf_ema_scaling.scaling import ReferenceClock, ema_weight, momentum_from_half_life, scale_momentum
from hf_ema_scaling.training.callback_checkpoints import RUNS, CheckpointedAverage
from hf_ema_scaling.training.callback_files import holds_state, written_checkpoint
from hf_ema_scaling.training.checks import LivenessWatch, has_batch_statistics, share_statistics
from hf_ema_scaling.training.signals import shield_evaluations, shield_workers
from hf_ema_scaling.training.stock import learns, nonfinite_parameter, refuse_unsupported, rows_of_a_batch
from hf_ema_scaling.training.stock_records import stock_plan, write_stock_metrics, write_stock_start

logger = logging.get_logger(__name__)

_DUST = 1e-9


class EMACallback(CheckpointedAverage):
    """Exponential moving average of the weights for the stock `Trainer`, with a momentum that follows the batch size.

    ```python
    average = EMACallback(momentum=0.999, reference_batch_size=64)
    trainer = Trainer(model, args, train_dataset=data, callbacks=[average])
    trainer.train()
    average.export("my-model-ema")
    ```

    After every real optimizer step the average moves by `rho ** kappa`, where `kappa` is the batch of one optimizer
    step (the prepared loader's total batch size x the batches that the step accumulated) over `reference_batch_size`.
    The smaller last batch of an epoch counts as a full one. A step that fp16 loss scaling skipped moves nothing.
    Weights that are not finite raise before they reach the average.

    **Only the momentum is scaled.** Learning rate, betas, weight decay and warm-up stay as they are in
    `TrainingArguments`; with `kappa != 1` a warning says so once.

    Checkpoints: `checkpoint-N/ema/` is a complete `from_pretrained` folder of the average plus `ema_state.json`;
    `checkpoint-N/` itself stays the student. `train(resume_from_checkpoint=...)` continues the average bit for bit.
    (Of a model of sentence-transformers, whose folders have a layout of their own, the weights alone are there:
    `model.load_state_dict(load_file("checkpoint-N/ema/model.safetensors"))`. `export` writes what that library loads.)
    Just-in-time checkpoints and the checkpoints in the trial folders of a hyper-parameter search have it too; with
    `enable_jit_checkpoint` the workers that load data for training and evaluations survive a SIGTERM to the whole
    process group. After a
    crash, `train(resume_from_checkpoint=average.newest_checkpoint(output_dir))` goes on from the newest complete one.
    `checksums.json` in a checkpoint tells whether Trainer's own files are as they were saved: `newest_checkpoint`
    verifies all of them before anything is loaded, and a resume (also of another path) before its first step, so that
    a flipped bit stops it. Who changed a file on purpose deletes `checksums.json`. `load_best_model_at_end` does not
    load a damaged best.

    For the model card of `hf-ema-scaling push`, the run's `scaling_plan.json`, `run.json` and `metrics.json` are
    written into `output_dir` (by a callback without a `name`). To have the average's scores there, evaluate it after
    training: `with callback.averaged_weights(): trainer.evaluate(metric_key_prefix="eval_ema")`.

    Several averages of one run: give each callback but one a `name`, and so a folder `ema-<name>`; each resumes,
    exports and teaches on its own.

    A second `train()` restarts the clock (and so `ema_start`) and continues the average if the model's parameters are
    the same objects; otherwise (`model_init`, hyper-parameter search) the average is rebuilt, with a warning outside
    a search. When `auto_find_batch_size` starts again with a smaller batch, the average restarts from the model as
    Trainer leaves it, and clock and kappa follow the new batch.

    **What a callback cannot do**, because Trainer hands it neither the trainer nor its metrics:

    - evaluate the average inside Trainer's own evaluation, or choose the best model by it
      (`with callback.averaged_weights(): trainer.evaluate()` works between training runs);
    - log: keys that a callback adds in `on_log` reach no reporter and no `log_history`;
    - write `ema/` before older checkpoints are rotated away, which `on_save` comes after, unless the checkpoint is
      pushed to the Hub: `hub_strategy="checkpoint"` and `"all_checkpoints"` push it with its `ema/`, but for sharded
      averages (FSDP2);
    - learn from which folder training resumes: outside `output_dir`, name it in `resume_from`.

    `EMATrainer` does all of it, and scales the optimizer too.

    The unit is what the loader draws: a row of the data set. Where a row is a packed sequence (TRL's `packing`),
    `reference_batch_size` counts packed sequences; kappa is right as long as they are as long as they were at the
    reference. In TRL's trainers that generate (GRPO, RLOO) it is a completion that a step trains on. Parameters of a
    loss module (sentence-transformers) are not the model's and are not averaged.
    **Shards**: under FSDP2 every process keeps and updates the average of its own shards; saving, exporting and the
    teacher gather it. FSDP1 and DeepSpeed ZeRO-3 are refused. Under ZeRO-1 and 2, which step inside `backward()`, the
    callback sees the weights after that step, and accelerate's `step_was_skipped` tells an overflow; with bf16 or fp16
    what is averaged (in float32) are the module's rounded copies of DeepSpeed's float32 weights. This follows from
    accelerate's source and has not been run.

    Args:
        momentum: rho of one reference step, strictly between 0 and 1. Give this or `half_life`.
        half_life: Samples after which half of the average has been replaced.
        reference_batch_size: B, samples per optimizer step for which the momentum was tuned.
        ema_start: In reference steps; a step that begins before it makes the average equal to the student.
        buffers: `"average"` or `"copy"`, for floating-point buffers such as running statistics.
        dtype: `torch.float32`, or `torch.float64` for momenta so close to 1 that float32 loses updates.
        name: Tells several averages of one run apart; None for the folder `ema`.
        resume_from: Where the average to resume lies (a checkpoint or the folder of the average in it), if it is not
            in `output_dir/checkpoint-N` of the step `N` that is resumed.
        on_missing_average: What to do when the average to resume is missing or damaged: `"raise"`, or `"rebuild"` it
            from the weights that are resumed, with a warning.
        teacher_factory: Returns a new module of the student's architecture, for `teacher`; needed where class and
            configuration do not give all of it.

    Raises:
        ValueError: An argument is out of range, or not exactly one of `momentum` and `half_life` is given.

    Source: "How to Scale Your EMA", arXiv 2307.13813 (EMA scaling rule).
    """

    def __init__(
        self,
        momentum: float | None = None,
        *,
        half_life: float | None = None,
        reference_batch_size: float,
        ema_start: float = 0,
        buffers: BufferPolicy = "average",
        dtype: torch.dtype = torch.float32,
        name: str | None = None,
        resume_from: str | Path | None = None,
        on_missing_average: OnMissing = "raise",
        teacher_factory: Callable[[], nn.Module] | None = None,
    ) -> None:
        if (momentum is None) == (half_life is None):
            raise ValueError(f"give exactly one of momentum and half_life, got {momentum!r} and {half_life!r}")
        given = f"{momentum=!r}" if half_life is None else f"{half_life=!r} samples"
        if half_life is not None:
            momentum = momentum_from_half_life(half_life, reference_batch_size)
        if momentum is None or not 0 < momentum < 1:
            raise ValueError(
                f"the momentum must be strictly between 0 and 1, got {momentum!r} from {given}: 0 is the student, 1 "
                "never moves. It is the share of the average that is kept (0.999), not that of the new weights (0.001)"
            )
        if not (math.isfinite(ema_start) and ema_start >= 0):
            raise ValueError(f"ema_start must be a number of reference steps of at least 0, got {ema_start!r}")
        if buffers not in ("average", "copy"):
            raise ValueError(f"buffers must be 'average' or 'copy', got {buffers!r}")
        if dtype not in (torch.float32, torch.float64):
            raise ValueError(f"dtype must be torch.float32 or torch.float64, got {dtype!r}")
        super().__init__(
            float(momentum), float(reference_batch_size), float(ema_start), name, resume_from, on_missing_average
        )
        self.buffers: BufferPolicy = buffers
        self.dtype = dtype
        self.teacher_factory = teacher_factory
        self._half: torch.dtype | None = None
        self._warned_at: float | None = None
        self._batch = 0
        self._accumulated = 0
        self._skip_watch = SkipWatch()
        self._alive = False
        self._watch: LivenessWatch | None = None
        self._recorded = False
        self._pushed_step = -1
        self._holding = False
        self._others: dict[int, bool] = {}
        """Places of evaluations in the log that are not the student's: True for the average's."""

    def __repr__(self) -> str:
        name = "" if self.name is None else f", name={self.name!r}"
        return f"EMACallback(momentum={self.momentum:g}, reference_batch_size={self.reference_batch_size:g}{name})"

    @property
    def teacher(self) -> EMATeacher:
        """A frozen model in eval mode over the average's own storage; built once, always up to date.

        `check_teacher` tests it; `PseudoLabelCollator` calls that before the first label, others do it themselves.

        Of a sharded average (FSDP2) it is a gathered copy on every process, which all of them must ask for at the same
        moment the first time; after that each update gathers it anew.

        Raises:
            RuntimeError: Training has not begun.
            TypeError: The model is not a transformers model that can be built from its configuration, and there is no
                `teacher_factory`.
        """
        if self._teacher is None:
            self._teacher = EMATeacher(self._student, self.average, factory=self.teacher_factory)
        return self._teacher

    def check_teacher(self, inputs: Mapping[str, Any]) -> None:
        """Tests on one small batch that `teacher` is the student with other weights, and weights of its own.

        Not while a graph of the student is alive, between its forward and its backward pass: the student's weights
        are changed meanwhile. See `check_before_labelling`. With shards on every process together.

        Args:
            inputs: Keyword inputs of the model without labels, on the teacher's device.

        Raises:
            RuntimeError: Training has not begun.
            DeadTeacherError: It is not.
        """
        teacher = self.teacher
        autocast = partial(torch.autocast, teacher.device.type, dtype=self._half, enabled=self._half is not None)
        check_before_labelling(self._student, self.average, teacher, inputs, autocast=autocast)

    @property
    def has_begun(self) -> bool:
        """Whether there is an average: training has begun."""
        return self._average is not None

    @property
    def kappa(self) -> float:
        """Samples of one full optimizer step over `reference_batch_size`; 0.0 before training."""
        return self._units / self.reference_batch_size

    @property
    def clock(self) -> float:
        """Data seen in this run, in reference steps; skipped steps count."""
        return self._clock.position

    @property
    def global_step(self) -> int:
        """Optimizer steps done, as Trainer counts them: skipped ones included."""
        return self._step

    @contextmanager
    def averaged_weights(self, model: nn.Module | None = None) -> Iterator[None]:
        """Lets the model hold the average inside a `with` block.

        The student's own bits return on exit and on any exception. An optimizer step inside the block raises.

        Args:
            model: The model that was trained, wrapped or not; None for the one the average was built from.

        Raises:
            RuntimeError: Training has not begun, or the model already holds swapped-in weights.
            ValueError: Names or shapes do not match.
        """
        with self.average.swapped(self._student if model is None else model):
            self._holding = True
            try:
                yield
            finally:
                self._holding = False

    def export(self, folder: str | Path, model: nn.Module | None = None, processing_class: Any = None) -> None:
        """Writes the average as a folder that `from_pretrained` loads, in float32, with `ema_state.json`.

        A model of another library (sentence-transformers) is saved as that library does it, in the model's dtype. Call
        it on every process; one writes.

        Args:
            folder: Where to write; an older folder of that name is replaced.
            model: Gives the architecture and configuration; None for the model the average was built from.
            processing_class: Tokenizer, feature extractor or processor to save along; None for the Trainer's.

        Raises:
            RuntimeError: Training has not begun.
        """
        export_average(
            folder,
            self._student if model is None else model,
            self.average,
            state=self._state(),
            processing_class=self._processing_class if processing_class is None else processing_class,
            write=self._writes,
        )

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """With `enable_jit_checkpoint`: an evaluation before training may start workers that stay."""
        if args.enable_jit_checkpoint:
            shield_evaluations(state)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Builds, continues, restarts or resumes the average, on every process.

        Raises:
            ValueError: The batch size is unknown, the optimizer is schedule-free, two callbacks have the same name or
                are one, or `resume_from` meets step 0.
            NotImplementedError: The parameters are partitioned by DeepSpeed ZeRO-3.
            AverageStateError: The average to resume is missing, damaged, or of another step or run.
        """
        model: nn.Module = kwargs["model"]
        refuse_unsupported(args, model, kwargs.get("optimizer"))
        if (run := RUNS.get(self)) is not None and run() is state:
            raise ValueError(
                f"{self!r} is twice in this Trainer's callbacks, and would move its average twice per step: give it "
                "either to callbacks= or to add_callback()."
            )
        self._claim_folder(state)
        if args.save_total_limit == 1 and args.should_save:
            warnings.warn(
                "save_total_limit=1: Trainer deletes the older checkpoint before the average of the new one is "
                "written, so a full disk or a crash in between leaves none that is complete. Keep at least two.",
                stacklevel=2,
            )
        if args.enable_jit_checkpoint:
            # Schedulers send SIGTERM to every process there is; a worker's death would come before the checkpoint.
            shield_evaluations(state)
            if isinstance(kwargs.get("train_dataloader"), DataLoader):
                shield_workers(kwargs["train_dataloader"])
        batch = rows_of_a_batch(args, state, kwargs.get("train_dataloader"))
        # Nothing else tells a new attempt after an out-of-memory error from a second train().
        attempt = bool(self._running and args.auto_find_batch_size and batch < self._batch)
        self._running = True
        self._batch = batch
        self._units = batch * args.gradient_accumulation_steps
        self._accumulated = 0
        self._writes = args.should_save
        self._saved_step = self._pushed_step = -1
        self._processing_class = kwargs.get("processing_class")
        self._half = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None
        self._step = state.global_step
        self._clock = ReferenceClock(self.reference_batch_size)
        self._alive, self._watch, self._skip_watch = False, None, SkipWatch()
        if not args.auto_find_batch_size:  # else batch after batch may be tried until one fits
            self._warn_about_learning_rate(state)
        if state.global_step == 0 and self.resume_from is not None and not self._resumed:
            raise ValueError(
                f"resume_from={str(self.resume_from)!r} is given, but training starts at step 0: pass "
                "resume_from_checkpoint to train(), or drop resume_from."
            )
        if self._average is not None and not self._average.same_parameters(model):
            if state.global_step == 0 and not state.is_hyper_param_search:
                warnings.warn(
                    "EMACallback: the model's parameters are not those of the last train(); the average is rebuilt "
                    "from the model as it is now.",
                    stacklevel=2,
                )
            self._average = self._teacher = None
        if self._average is None:
            warn_of_half_precision(model)
            average = WeightAverage(model, buffers=self.buffers, dtype=self.dtype)
            if args.save_strategy != SaveStrategy.NO:
                check_adapters(unwrap(model), average)
            self._average = average
        self._model = model
        if state.global_step > 0:
            try:
                self._resume(args, state, attempt)
            except BaseException:
                # Not to be mistaken for an average that training has moved, should train() be called again.
                self._average = self._teacher = None
                raise
        elif attempt:
            self._restart()
        self._write_start(args, state, kwargs)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Notes that the run came to its end, and writes its metrics for a model card."""
        super().on_train_end(args, state, control, **kwargs)
        self._write_metrics(args, state)

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Notes whose metrics they are, and writes those of an evaluation after training."""
        if self._average is None:
            return
        if is_swapped(self._student):
            self._others[len(state.log_history) - 1] = self._holding
        if not self._running:
            self._write_metrics(args, state)

    def on_push_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Writes the average into a checkpoint that is about to be pushed; threads read the folder from here on."""
        # Trainer calls this on one process: what all of them must gather waits for `on_save`.
        if not self._running or self._average is None or self._average.sharded:
            return
        try:
            checkpoint = written_checkpoint(args, state)
        except FileNotFoundError:
            return  # something else is pushed
        if holds_state(checkpoint, state):
            super().on_save(args, state, control, **kwargs)
            self._pushed_step = state.global_step

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Writes the average into the checkpoint, if that was not done before a push; see `CheckpointedAverage`."""
        if self._pushed_step != state.global_step:
            super().on_save(args, state, control, **kwargs)
        self._pushed_step = -1

    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Counts a batch that the step accumulates: at the end of an epoch there may be fewer of them."""
        self._accumulated += 1

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Remembers the fp16 loss scale, notices unfrozen parameters, and follows a just-in-time checkpoint."""
        self._follow_just_in_time(args, state, control, kwargs["model"])
        self.average.prepare(kwargs["model"])
        self._skip_watch.before_step(kwargs.get("optimizer"))

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Moves the average once, with the weights after the step.

        Raises:
            FloatingPointError: A weight is not finite; the average has not moved.
            DeadTeacherError: The average does not move, or is the student, after three updates with a learning rate
                above 0.
        """
        model, optimizer = kwargs["model"], kwargs.get("optimizer")
        if args.world_size > 1 and has_batch_statistics(model):
            share_statistics(model)
        begin = self._clock.position
        kappa = self._clock.advance(self._batch * (self._accumulated + 1))
        self._accumulated = 0
        self._step = state.global_step + 1
        self._warn_about_learning_rate(state)
        if self._skip_watch.was_skipped(optimizer):
            return
        # The weights are judged and not the gradients: they are what would enter the average, whatever the optimizer
        # made of a NaN. This costs one synchronisation; Trainer's own look at the loss costs another.
        broken = nonfinite_parameter(model)
        if broken is not None:
            raise FloatingPointError(
                f"{broken!r} is not finite after optimizer step {self._step}; the average stays at its "
                f"{self.average.num_updates} updates. Resume from the last checkpoint with a lower learning rate or "
                "max_grad_norm, and look at this step's batch; EMATrainer can skip such a step (on_nonfinite='skip')."
            )
        if begin < self.ema_start - _DUST:
            self.average.update(model, 0.0)
            self._refresh_teacher()
            return
        watched = not self._alive and learns(optimizer)
        if watched and self._watch is None:
            self._watch = LivenessWatch(self.average)
        self.average.update(model, self.momentum, kappa)
        self._refresh_teacher()
        if watched and self._watch is not None:
            self._alive = self._watch.after_update(model, self.average, ema_weight(self.momentum, kappa))

    def meet_teacher(self) -> bool:
        """Builds the teacher of a sharded average, also on a process that has nothing to label; else nothing.

        Returns:
            Whether the average is sharded, and so all processes must do the same at the same moment.
        """
        if self._average is None or not self._average.sharded:
            return False
        if self._teacher is None:
            self._teacher = EMATeacher(self._student, self._average, factory=self.teacher_factory)
        return True

    def _write_start(self, args: TrainingArguments, state: TrainerState, run: Mapping[str, Any]) -> None:
        """Plan and start of the run; a model card is worth no error."""
        self._recorded, self._others = False, {}
        # Only one average of a run is pushed, and the folders of a search's trials are not known here.
        if self.name is not None or not args.should_save or state.is_hyper_param_search:
            return
        try:
            plan = stock_plan(
                args,
                run["optimizer"],
                steps=state.max_steps,
                units=self._units,
                momentum=self.momentum,
                reference_batch_size=self.reference_batch_size,
                ema_start=self.ema_start,
            )
            write_stock_start(args, plan, **run)
        except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
            logger.warning(f"EMACallback writes no plan of this run, so its model card will have none: {error}")
            return
        self._recorded = True

    def _write_metrics(self, args: TrainingArguments, state: TrainerState) -> None:
        if not self._recorded or not args.should_save:
            return
        try:
            write_stock_metrics(args, state, state.max_steps * self.kappa, self._others)
        except OSError as error:
            logger.warning(f"EMACallback could not write the metrics of this run: {error}")

    def _refresh_teacher(self) -> None:
        if self._teacher is not None:
            self._teacher.refresh()

    def _warn_about_learning_rate(self, state: TrainerState) -> None:
        kappa = self.kappa
        if kappa in (1, self._warned_at) or not state.is_world_process_zero:
            return
        self._warned_at = kappa
        warnings.warn(
            f"EMACallback scales only the momentum: at kappa={kappa:g} ({self._units} samples per optimizer step over "
            f"reference_batch_size={self.reference_batch_size:g}) it is {scale_momentum(self.momentum, kappa):.6g}. "
            "The learning rate and the rest of the optimizer stay yours: scale them with hf_ema_scaling.scaling."
            f"scaling_rule (learning rate times {math.sqrt(kappa):.3g} for Adam and AdamW, times {kappa:g} for SGD "
            "without momentum), or use EMATrainer, which does it.",
            stacklevel=3,
        )
