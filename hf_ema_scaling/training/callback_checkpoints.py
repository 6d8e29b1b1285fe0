"""An average in the stock Trainer's checkpoints: saved, resumed, rebuilt, and kept apart from others of the run."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import gather_object
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

from hf_ema_scaling.ema import EMATeacher, WeightAverage, save_average
from hf_ema_scaling.ema.durable import free_at
from hf_ema_scaling.ema.folders import folder_name
from hf_ema_scaling.ema.storage import OnMissing
from hf_ema_scaling.scaling import ReferenceClock
from hf_ema_scaling.training.callback_files import (
    NoAverageError,
    average_faults,
    average_to_resume,
    best_faults,
    check_same_run,
    files_faults,
    holds_state,
    read_average,
    refuse_best,
    refuse_damaged_files,
    refuse_other_student,
    written_checkpoint,
)
from hf_ema_scaling.training.checkpoints import checkpoints_in, what_is_missing
from hf_ema_scaling.training.student_files import RANDOM_STATES, student_checksums, write_checksums

logger = logging.get_logger(__name__)

# The last run of every callback, to find two that keep their averages in the same folder of one. A run is one state.
RUNS: weakref.WeakKeyDictionary[CheckpointedAverage, weakref.ref[TrainerState]] = weakref.WeakKeyDictionary()


class CheckpointedAverage(TrainerCallback):
    """The part of `EMACallback` that deals with checkpoints; when the average moves is the other part's business.

    Args:
        momentum: rho of one reference step.
        reference_batch_size: B, in samples.
        ema_start: In reference steps.
        name: Names the folder of the average.
        resume_from: Where the average to resume lies, if not in Trainer's checkpoint.
        on_missing_average: What to do when it is missing or damaged.

    Raises:
        ValueError: `name`, `reference_batch_size` or `on_missing_average` is not a possible one.
    """

    def __init__(
        self,
        momentum: float,
        reference_batch_size: float,
        ema_start: float,
        name: str | None,
        resume_from: str | Path | None,
        on_missing_average: OnMissing,
    ) -> None:
        if on_missing_average not in ("raise", "rebuild"):
            raise ValueError(f"on_missing_average must be 'raise' or 'rebuild', got {on_missing_average!r}")
        self.momentum = momentum
        self.reference_batch_size = reference_batch_size
        self.ema_start = ema_start
        self.name = name
        self.folder = folder_name(name)
        self.resume_from = None if resume_from is None else Path(resume_from)
        self.on_missing_average: OnMissing = on_missing_average
        self._clock = ReferenceClock(reference_batch_size)
        self._step = 0
        self._units = 0
        self._model: nn.Module | None = None
        self._processing_class: Any = None
        self._average: WeightAverage | None = None
        self._teacher: EMATeacher | None = None
        self._running = False
        self._resumed = False
        self._writes = True
        self._saved_step = -1
        self._state_written = -1

    @property
    def average(self) -> WeightAverage:
        """The average.

        Raises:
            RuntimeError: Training has not begun.
        """
        if self._average is None:
            raise RuntimeError("there is no average yet: it is created when Trainer.train() begins")
        return self._average

    def newest_checkpoint(self, output_dir: str | Path, *others: CheckpointedAverage) -> Path | None:
        """The newest `checkpoint-N` that a run can resume from, with this average; for `resume_from_checkpoint`.

        After a crash Trainer's own search takes the one with the highest number, though its saving may not have
        finished. Trainer deletes older checkpoints before the average is written: keep at least two
        (`save_total_limit`).

        Args:
            output_dir: Where the checkpoints lie.
            others: Further callbacks of the run, whose averages are to be there, too: a crash may come between two.

        Returns:
            The folder, with a warning of what newer ones lack; None if none is complete.
        """
        passed_over: list[str] = []
        for checkpoint in reversed(checkpoints_in(Path(output_dir))):
            missing = what_is_missing(checkpoint, average=False)
            if not missing:
                needed = [average.folder for average in (self, *others) if average.on_missing_average == "raise"]
                missing = [fault for folder in needed for fault in average_faults(checkpoint, folder)]
            if not missing:
                if passed_over:
                    logger.warning(
                        f"Resuming from {checkpoint}. Newer but not complete: {' | '.join(passed_over)}. Delete them: "
                        "save_total_limit would count them, and delete complete ones."
                    )
                return checkpoint
            passed_over.append(f"{checkpoint.name}: {'; '.join(missing)}")
        if passed_over:
            logger.warning(f"No checkpoint in {output_dir} is complete: {' | '.join(passed_over)}.")
        return None

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Writes the average into a just-in-time checkpoint, if one was saved now."""
        self._follow_just_in_time(args, state, control, kwargs["model"])

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Writes the average into a just-in-time checkpoint, if one was saved now."""
        self._follow_just_in_time(args, state, control, kwargs["model"])

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Writes the average into a just-in-time checkpoint, if one was saved now."""
        self._follow_just_in_time(args, state, control, kwargs["model"])

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, Any] | None = None,
        **_: Any,
    ) -> None:
        """At the last log, before Trainer loads the best model and deletes others: refuses a best that is damaged.

        Raises:
            AverageStateError: Its files are not as they were saved. Trainer would load a flipped bit, and without the
                files go on with the last weights.
        """
        best = state.best_model_checkpoint
        if args.load_best_model_at_end and best is not None and "train_runtime" in (logs or {}):
            refuse_best(best, gather_object(best_faults(Path(best)) if args.should_save else []))

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Notes that the run came to its end: the next one is no new attempt at it."""
        self._running = False

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Writes the average into the checkpoint; older checkpoints, and so their order by time, are not touched.

        Raises:
            FileNotFoundError: The checkpoint is not where Trainer writes checkpoints.
            OSError, SafetensorError: It could not be written, for example for want of space; a note says from which
                checkpoint to go on.
        """
        # Where nothing is written the folder need not be known, or visible.
        checkpoint = written_checkpoint(args, state) if args.should_save else Path(str(args.output_dir))
        if args.world_size > 1:
            # Every process writes random states of its own into the checkpoint.
            PartialState().wait_for_everyone()
        try:
            self._save(checkpoint, kwargs["model"], state, write=args.should_save)
        except Exception as error:
            if args.should_save:
                error.add_note(self._not_saved(checkpoint))
            raise

    def _save(
        self,
        checkpoint: Path,
        model: nn.Module,
        state: TrainerState,
        *,
        write: bool,
        random_states: str = RANDOM_STATES,
    ) -> None:
        # Tells a resume whether this average and the weights it finds there belong together.
        state_of_run = self._state() | {"student_distance": self.average.distance(model)}
        if write:
            student = student_checksums(checkpoint)
            # Before the average: with that a checkpoint is complete.
            self._write_checksums(checkpoint, student, random_states)
            state_of_run |= {"student": student, "checksums": True}
        save_average(
            checkpoint / self.folder,
            model,
            self.average,
            state=state_of_run,
            processing_class=self._processing_class,
            write=write,
        )
        self._saved_step = state.global_step

    def _write_checksums(self, checkpoint: Path, student: Mapping[str, str], random_states: str) -> None:
        trainers = checkpoint / TRAINER_STATE_NAME
        self._state_written = trainers.stat().st_mtime_ns
        write_checksums(checkpoint, trainers, student=student, random_states=random_states)

    def _not_saved(self, checkpoint: Path) -> str:
        newest = self.newest_checkpoint(checkpoint.parent)
        found = f"{checkpoint} has the student, but nothing of the average; {free_at(checkpoint)}. "
        if newest is None:
            way_out = f"EMACallback(on_missing_average='rebuild') resumes {checkpoint.name} with a new average."
            return f"{found}No checkpoint is complete: {way_out}"
        way_out = f"train(resume_from_checkpoint=callback.newest_checkpoint({str(checkpoint.parent)!r}))"
        return f"{found}{newest.name} is complete: {way_out} continues from it."

    def _follow_just_in_time(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module
    ) -> None:
        # That callback comes before the user's in every event, saves without on_save and then asks to stop.
        if not (args.enable_jit_checkpoint and control.should_training_stop):
            return
        checkpoint = Path(str(args.output_dir)) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        write = args.should_save and holds_state(checkpoint, state)
        # Others may not have written theirs yet.
        own = RANDOM_STATES if args.world_size == 1 else f"rng_state_{args.process_index}.pth"
        if self._saved_step == state.global_step:
            # Into a checkpoint that had its average: the weights are the same, random states may be others.
            if write and (checkpoint / TRAINER_STATE_NAME).stat().st_mtime_ns != self._state_written:
                self._write_checksums(checkpoint, student_checksums(checkpoint), own)
            return
        # The signal reaches processes at moments of their own, so they wait for each other only where they must.
        if write or any(isinstance(tensor, DTensor) for tensor in self.average.tensors().values()):
            self._save(checkpoint, model, state, write=write, random_states=own)

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

    def _claim_folder(self, state: TrainerState) -> None:
        """Refuses a second callback with this folder in the same run."""
        RUNS[self] = weakref.ref(state)
        for other, run in RUNS.items():
            if other is not self and other.folder == self.folder and run() is state:
                raise ValueError(
                    f"{other!r} and {self!r} would save their averages in the same folder {self.folder!r} of each "
                    "checkpoint: give one of them another name=."
                )

    def _restart(self) -> None:
        """Makes the average the model as it is, in place: a teacher stays valid."""
        if self.average.num_updates:
            warnings.warn(
                f"EMACallback: auto_find_batch_size starts again with {self._units} samples per optimizer step; the "
                "average restarts from the model as it is now.",
                stacklevel=3,
            )
        self.average.blend(self._student, 1.0)
        self.average.num_updates = 0

    def _resume(self, args: TrainingArguments, state: TrainerState, attempt: bool) -> None:
        step, model = state.global_step, self._student
        folder = average_to_resume(args, state, self.folder, self.resume_from)
        problem: NoAverageError | None = None
        saved: dict[str, Any] = {}
        try:
            saved = read_average(folder, model, self.average, step=step, keys=self._state())
        except NoAverageError as error:
            problem = error
        # A new attempt after an out-of-memory error finds the weights that the last attempt left.
        if not attempt:
            # One process of each machine reads them, all of them stop.
            reads = args.local_process_index == 0
            found = gather_object(files_faults(folder.parent) if reads else [])
            refuse_damaged_files(folder.parent, sorted(set(found)))
        if self.on_missing_average == "rebuild":
            # All processes do the same, though some may not see the folder.
            problems = [str(text) for text in gather_object([problem and str(problem)]) if text]
            if problems:
                self._rebuild(step, problems[0])
                return
        elif problem is not None:
            raise NoAverageError(
                f"{problem} If it lies elsewhere, name its place in EMACallback(resume_from=...); set "
                "on_missing_average='rebuild' if the average was there and is lost, or resume from a checkpoint that "
                "newest_checkpoint finds."
            ) from problem
        if not attempt:
            refuse_other_student(folder.parent, self.folder, saved)
            check_same_run(folder, saved, model, self.average)
        self._clock = ReferenceClock(self.reference_batch_size, saved["units_seen"])
        for name in ("momentum", "reference_batch_size", "ema_start"):
            if saved[name] != getattr(self, name):
                warnings.warn(
                    f"EMACallback: {name} was {saved[name]:g} in the run that is resumed and is now "
                    f"{getattr(self, name):g}; the new value is used from here on.",
                    stacklevel=3,
                )
        self._resumed = True

    def _rebuild(self, step: int, problem: str) -> None:
        self._clock = ReferenceClock(self.reference_batch_size, step * self._units)
        warnings.warn(
            f"EMACallback: the average is rebuilt from the student's weights of step {step}, and its clock is put at "
            f"{self._clock.position:g} reference steps ({step} steps of {self._units} samples): {problem}",
            stacklevel=4,
        )
        self.average.blend(self._student, 1.0)
        self.average.num_updates = 0
        self._resumed = True
