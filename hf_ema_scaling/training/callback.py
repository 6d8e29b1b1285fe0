"""`EMACallback`: keeps, saves, resumes and exports the average of the weights in the stock `Trainer`."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from hf_ema_scaling.ema import AverageStateError, EMATeacher, WeightAverage, load_average, save_average
from hf_ema_scaling.ema.average import BufferPolicy
from hf_ema_scaling.scaling import ReferenceClock, ema_weight, momentum_from_half_life, scale_momentum
from hf_ema_scaling.training.checks import LivenessWatch
from hf_ema_scaling.training.stock import (
    SkipWatch,
    learns,
    loader_batch_size,
    nonfinite_parameter,
    refuse_unsupported,
    warn_of_half_precision,
)

EMA_FOLDER = "ema"
"""Folder of the average inside a checkpoint."""
_DUST = 1e-9


class EMACallback(TrainerCallback):
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
    A second `train()` restarts the clock (and so `ema_start`) and continues the average if the model's parameters are
    the same objects; otherwise (`model_init`, hyper-parameter search) the average is rebuilt with a warning.

    **What a callback cannot do**, because Trainer hands it neither the trainer nor its metrics:

    - evaluate the average inside Trainer's own evaluation, or choose the best model by it
      (`with callback.averaged_weights(): trainer.evaluate()` works between training runs);
    - log: keys that a callback adds in `on_log` reach no reporter and no `log_history`;
    - put `ema/` into what Trainer pushes to the Hub for a checkpoint, or write it before older checkpoints are
      rotated away: `on_save` comes after both. Checkpoints written without `on_save` (just-in-time checkpoints) have
      no `ema/`, and resuming from one raises;
    - save inside the trial folders of a hyper-parameter search: use `save_strategy="no"` there.

    `EMATrainer` does all of it, and scales the optimizer too.

    Args:
        momentum: rho of one reference step, strictly between 0 and 1. Give this or `half_life`.
        half_life: Samples after which half of the average has been replaced.
        reference_batch_size: B, samples per optimizer step for which the momentum was tuned.
        ema_start: In reference steps; a step that begins before it makes the average equal to the student.
        buffers: `"average"` or `"copy"`, for floating-point buffers such as running statistics.
        dtype: `torch.float32`, or `torch.float64` for momenta so close to 1 that float32 loses updates.
        resume_from: Where the average to resume lies (a checkpoint or its `ema` folder), if it is not
            `output_dir/checkpoint-N/ema` of the step `N` that is resumed.

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
        resume_from: str | Path | None = None,
    ) -> None:
        if (momentum is None) == (half_life is None):
            raise ValueError(f"give exactly one of momentum and half_life, got {momentum!r} and {half_life!r}")
        self._clock = ReferenceClock(reference_batch_size)
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
        self.momentum = float(momentum)
        self.reference_batch_size = float(reference_batch_size)
        self.ema_start = float(ema_start)
        self.buffers: BufferPolicy = buffers
        self.dtype = dtype
        self.resume_from = None if resume_from is None else Path(resume_from)
        self._resumed = False
        self._warned = False
        self._writes = True
        self._step = 0
        self._units = 0
        self._batch = 0
        self._accumulated = 0
        self._model: nn.Module | None = None
        self._processing_class: Any = None
        self._average: WeightAverage | None = None
        self._teacher: EMATeacher | None = None
        self._skip_watch = SkipWatch()
        self._alive = False
        self._watch: LivenessWatch | None = None

    @property
    def average(self) -> WeightAverage:
        """The average.

        Raises:
            RuntimeError: Training has not begun.
        """
        if self._average is None:
            raise RuntimeError("there is no average yet: it is created when Trainer.train() begins")
        return self._average

    @property
    def teacher(self) -> EMATeacher:
        """A frozen model in eval mode over the average's own storage; built once, always up to date.

        Raises:
            RuntimeError: Training has not begun.
            TypeError: The model is not a transformers model that can be built from its configuration.
        """
        if self._teacher is None:
            self._teacher = EMATeacher(self._student, self.average)
        return self._teacher

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
            yield

    def export(self, folder: str | Path, model: nn.Module | None = None, processing_class: Any = None) -> None:
        """Writes the average as a folder that `from_pretrained` loads, in float32, with `ema_state.json`.

        Call it on every process; one writes.

        Args:
            folder: Where to write; an older folder of that name is replaced.
            model: Gives the architecture and configuration; None for the model the average was built from.
            processing_class: Tokenizer, feature extractor or processor to save along; None for the Trainer's.

        Raises:
            RuntimeError: Training has not begun.
        """
        save_average(
            folder,
            self._student if model is None else model,
            self.average,
            state=self._state(),
            processing_class=self._processing_class if processing_class is None else processing_class,
            write=self._writes,
        )

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Builds, continues or resumes the average, on every process.

        Raises:
            ValueError: The batch size is unknown, the optimizer is schedule-free, or `resume_from` meets step 0.
            NotImplementedError: The parameters are partitioned by DeepSpeed ZeRO-3.
            AverageStateError: The average to resume is missing, damaged, or of another step or run.
        """
        model: nn.Module = kwargs["model"]
        refuse_unsupported(args, model)
        self._batch = loader_batch_size(kwargs.get("train_dataloader"), args.world_size)
        self._units = self._batch * args.gradient_accumulation_steps
        self._accumulated = 0
        self._writes = args.should_save
        self._processing_class = kwargs.get("processing_class")
        self._step = state.global_step
        self._clock = ReferenceClock(self.reference_batch_size)
        self._alive, self._watch, self._skip_watch = False, None, SkipWatch()
        if state.is_world_process_zero:
            self._warn_about_learning_rate()
        if state.global_step == 0 and self.resume_from is not None and not self._resumed:
            raise ValueError(
                f"resume_from={str(self.resume_from)!r} is given, but training starts at step 0: pass "
                "resume_from_checkpoint to train(), or drop resume_from."
            )
        if self._average is not None and not self._average.same_parameters(model):
            if state.global_step == 0:
                warnings.warn(
                    "EMACallback: the model's parameters are not those of the last train(); the average is rebuilt "
                    "from the model as it is now.",
                    stacklevel=2,
                )
            self._average = self._teacher = None
        if self._average is None:
            warn_of_half_precision(model)
            self._average = WeightAverage(model, buffers=self.buffers, dtype=self.dtype)
        self._model = model
        if state.global_step > 0:
            try:
                self._resume(args, state.global_step)
            except BaseException:
                # Not to be mistaken for an average that training has moved, should train() be called again.
                self._average = self._teacher = None
                raise

    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Counts a batch that the step accumulates: at the end of an epoch there may be fewer of them."""
        self._accumulated += 1

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Remembers the fp16 loss scale, which an overflow lowers, and notices parameters that were unfrozen."""
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
        begin = self._clock.position
        kappa = self._clock.advance(self._batch * (self._accumulated + 1))
        self._accumulated = 0
        self._step = state.global_step + 1
        if self._skip_watch.was_skipped(optimizer):
            return
        # The weights are judged and not the gradients: they are what would enter the average, whatever the optimizer
        # made of a NaN. This costs one synchronisation; Trainer's own look at the loss costs another.
        broken = nonfinite_parameter(model)
        if broken is not None:
            raise FloatingPointError(
                f"parameter {broken!r} is not finite after optimizer step {self._step}; the average stays at its "
                f"{self.average.num_updates} updates. Resume from the last checkpoint with a lower learning rate or "
                "max_grad_norm, and look at this step's batch; EMATrainer can skip such a step (on_nonfinite='skip')."
            )
        if begin < self.ema_start - _DUST:
            self.average.update(model, 0.0)
            return
        watched = not self._alive and learns(optimizer)
        if watched and self._watch is None:
            self._watch = LivenessWatch(self.average)
        self.average.update(model, self.momentum, kappa)
        if watched and self._watch is not None:
            self._alive = self._watch.after_update(model, self.average, ema_weight(self.momentum, kappa))

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Writes `checkpoint-N/ema/`; older checkpoints, and so their order by time, are not touched.

        Raises:
            FileNotFoundError: The checkpoint is not in `output_dir`.
        """
        checkpoint = _checkpoint(args, state.global_step)
        if args.should_save and not checkpoint.is_dir():
            raise FileNotFoundError(
                f"EMACallback saves the average into {checkpoint}, which does not exist: it was deleted, or this is a "
                "hyper-parameter search, whose trial folders a callback does not know. Use save_strategy='no' there."
            )
        model = kwargs["model"]
        # Tells a resume whether this average and the weights it finds there belong together.
        state_of_run = self._state() | {"student_distance": self.average.distance(model)}
        save_average(
            checkpoint / EMA_FOLDER,
            model,
            self.average,
            state=state_of_run,
            processing_class=self._processing_class,
            write=args.should_save,
        )

    @property
    def _student(self) -> nn.Module:
        if self._model is None:
            raise RuntimeError("there is no average yet: it is created when Trainer.train() begins")
        return self._model

    def _state(self) -> dict[str, Any]:
        return {
            "global_step": self._step,
            "units_seen": self._clock.units,
            "momentum": self.momentum,
            "reference_batch_size": self.reference_batch_size,
            "ema_start": self.ema_start,
        }

    def _resume(self, args: TrainingArguments, step: int) -> None:
        folder = self.resume_from or _checkpoint(args, step)
        if (folder / EMA_FOLDER).is_dir() or self.resume_from is None:
            folder = folder / EMA_FOLDER
        if not folder.is_dir():
            raise AverageStateError(
                f"training resumes at step {step}, but there is no saved average in {folder}. Give its place with "
                "EMACallback(resume_from=...), or resume from a checkpoint that was written with the callback. To "
                "start a new average from this checkpoint's weights on purpose, load them with from_pretrained and "
                "call train() without resume_from_checkpoint."
            )
        saved = load_average(folder, self._student, self.average)
        missing = sorted(self._state().keys() - saved.keys())
        if missing:
            raise AverageStateError(f"{folder} was not written by EMACallback: its state lacks {', '.join(missing)}.")
        if saved["global_step"] != step:
            raise AverageStateError(
                f"the average in {folder} is of step {saved['global_step']}, but training resumes at step {step}: "
                "resume both from the same checkpoint."
            )
        then, now = saved.get("student_distance"), self.average.distance(self._student)
        if then is not None and not math.isclose(then, now, rel_tol=1e-3, abs_tol=1e-6):
            raise AverageStateError(
                f"the average in {folder} is of another run: its distance to the student was {then:.6g} when it was "
                f"saved and is {now:.6g} to the weights that are resumed. Name the right folder in resume_from."
            )
        self._clock = ReferenceClock(self.reference_batch_size, saved["units_seen"])
        for name in ("momentum", "reference_batch_size", "ema_start"):
            if saved[name] != getattr(self, name):
                warnings.warn(
                    f"EMACallback: {name} was {saved[name]:g} in the run that is resumed and is now "
                    f"{getattr(self, name):g}; the new value is used from here on.",
                    stacklevel=3,
                )
        self._resumed = True

    def _warn_about_learning_rate(self) -> None:
        kappa = self.kappa
        if self._warned or kappa == 1:
            return
        self._warned = True
        warnings.warn(
            f"EMACallback scales only the momentum: at kappa={kappa:g} ({self._units} samples per optimizer step over "
            f"reference_batch_size={self.reference_batch_size:g}) it is {scale_momentum(self.momentum, kappa):.6g}. "
            "The learning rate and the rest of the optimizer stay yours: scale them with hf_ema_scaling.scaling."
            f"scaling_rule (learning rate times {math.sqrt(kappa):.3g} for Adam and AdamW, times {kappa:g} for SGD "
            "without momentum), or use EMATrainer, which does it.",
            stacklevel=3,
        )


def _checkpoint(args: TrainingArguments, step: int) -> Path:
    return Path(str(args.output_dir)) / f"{PREFIX_CHECKPOINT_DIR}-{step}"
