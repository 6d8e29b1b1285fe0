"""Looks for collapse while a trainer runs, and warns, stops or rolls back."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate.utils import broadcast_object_list
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, SaveStrategy
from transformers.utils import logging

from hf_ema_scaling.data.collator import LABEL_COLUMNS
from hf_ema_scaling.data.passes import CLOCK_DUST
from hf_ema_scaling.data.sampler import SampledStep
from hf_ema_scaling.data.stream import UNLABELLED
from hf_ema_scaling.data.streaming import is_stream
from hf_ema_scaling.ema.durable import rename
from hf_ema_scaling.scaling import ReferenceClock
from hf_ema_scaling.training.arguments import EMATrainingArguments, PseudoLabelArguments
from hf_ema_scaling.training.checkpoints import checkpoint_step, what_is_missing
from hf_ema_scaling.training.classes_by_step import labelled_minority
from hf_ema_scaling.training.collapse import (
    LABELLESS_ROWS,
    LEAST_ROWS,
    MOST_ROLLBACKS,
    WITHIN,
    CollapseError,
    CollapseGuard,
    RollBack,
)
from hf_ema_scaling.training.label_counts import MASS

if TYPE_CHECKING:
    from hf_ema_scaling.training.trainer import PseudoLabelTrainer

logger = logging.get_logger(__name__)

COLLAPSED_PREFIX = "collapsed-"
"""Put before the names of checkpoints that a rollback leaves behind, so that nothing resumes from them."""


def check_rollback(args: EMATrainingArguments, pseudo: PseudoLabelArguments) -> None:
    """Refuses `on_collapse="rollback"` for a run that may have no checkpoint to roll back to.

    Raises:
        ValueError: naming the argument.
    """
    if pseudo.on_collapse != "rollback":
        return
    if args.save_strategy in (SaveStrategy.NO, SaveStrategy.BEST) or args.save_only_model:
        raise ValueError(
            "on_collapse=rollback goes back to a checkpoint: save whole ones in regular intervals (save_strategy "
            f"steps or epoch, save_only_model false), got save_strategy={args.save_strategy}"
        )
    if args.save_total_limit is None:
        return
    by_steps = args.save_strategy == SaveStrategy.STEPS and args.save_steps >= 1
    # A checkpoint from before the window, and all that are saved until it ends.
    needed = 1 + math.ceil(pseudo.collapse_window / args.save_steps) if by_steps else math.inf
    if args.save_total_limit < needed:
        saved = f"up to {needed} checkpoints belong to" if by_steps else "nobody knows how many are saved in"
        raise ValueError(
            f"save_total_limit={args.save_total_limit} may delete the checkpoint that on_collapse=rollback goes back "
            f"to: {saved} its window of {pseudo.collapse_window:g} reference steps; raise the limit, or leave it out"
        )


class CollapseWatch(TrainerCallback):
    """Judges pseudo-labels at the end of each window and acts on what it finds.

    Args:
        trainer: the trainer that it is a callback of.
        action: off, warn, stop or rollback.
        window: in reference steps.
        pl_start: reference step at which pseudo-labels begin.

    Attributes:
        guard: what it knows.
        error: how a run that was stopped ends.
    """

    def __init__(self, trainer: PseudoLabelTrainer, action: str, window: float, pl_start: float) -> None:
        self.trainer = trainer
        self.action = action
        self.window = window
        self.guard = CollapseGuard(pl_start)
        self.error: CollapseError | None = None
        self._warned: set[tuple[str, ...]] = set()
        self._usual: tuple[float | None] | None = None

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Look at the window that ends here, if one does, and whether any label is kept at all."""
        number = state.global_step - 1
        step = self.trainer.sampler.step(number)
        if step.end <= self.guard.pl_start + CLOCK_DUST:
            return control
        if self.action != "off" and (signs := self._look_at_window(step)):
            return self._act(self.action, signs, step.end, control)
        if signs := self._look_for_labels(number, step.end):
            # There is nothing to train on: that is an error whatever collapses may be.
            return self._act("rollback" if self.action == "rollback" else "stop", signs, step.end, control)
        return control

    def _look_at_window(self, step: SampledStep) -> list[str]:
        """Signs in the window that ends with this step; windows are joined until they hold `LEAST_ROWS`."""
        if not ReferenceClock.crosses(step.start, step.end, self.window):
            return []
        counts, metrics = self.trainer.window_metrics()
        if counts.counts["rows"] < LEAST_ROWS:
            return []
        self.trainer.label_statistics.new_window()
        kept = counts.counts["kept"]
        sizes = {"targets": float(counts.targets.sum()) / MASS, "yes_rows": kept, "no_rows": kept}
        sizes["rows"] = counts.counts["rows"]
        if WITHIN in metrics and (usual := self._usual_minority()) is not None:
            sizes[f"{WITHIN}_labelled"] = usual
        return self.guard.look({**metrics, **sizes}, step.end)

    def _usual_minority(self) -> float | None:
        """`labelled_minority` of this run.

        None where classes of labelled rows are not known beforehand, or unlabelled rows come in an order of their own.
        """
        if self._usual is None:
            dataset: Any = self.trainer.train_dataset
            streams = is_stream(dataset) or is_stream(self.trainer.unlabeled_dataset)
            columns = [] if streams else getattr(dataset, "column_names", None) or []
            column = next((name for name in LABEL_COLUMNS if name in columns), None)
            share = None
            if column is not None:
                share = labelled_minority(self.trainer.sampler, dataset.with_format("numpy")[column][:])
            self._usual = (share,)
        return self._usual[0]

    def _look_for_labels(self, number: int, clock: float) -> list[str]:
        """The sign that the teacher labels nothing: long windows would tell of it too late.

        How many rows all processes have drawn is known on each of them, so they ask each other only when it is due.
        """
        drawn = self.trainer.sampler.drawn_of(UNLABELLED, number)[1]
        if drawn - self.guard.labelless_from < LABELLESS_ROWS:
            return []
        self.guard.labelless_from = drawn
        counts = self.trainer.record.stretch(self.trainer.gather).counts
        if counts["kept"] > 0 or counts["rows"] < LABELLESS_ROWS:
            return []
        dropped = {name.removeprefix("dropped_"): n for name, n in counts.items() if name.startswith("dropped_")}
        return self.guard.labelless(dropped, clock)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Note the checkpoint."""
        clock = self.trainer.sampler.step(state.global_step - 1).end
        self.guard.saved(f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}", clock)

    def resumed(self, checkpoint: Path, clock: float) -> None:
        """Note the checkpoint that the run goes on from."""
        self.guard.saved(os.path.relpath(checkpoint, self._folder), clock)

    @property
    def _folder(self) -> Path:
        return Path(str(self.trainer.args.output_dir))

    def _act(self, action: str, signs: list[str], clock: float, control: TrainerControl) -> TrainerControl:
        said = f"Pseudo-labels seem to have collapsed at reference step {clock:g}: {'; '.join(signs)}."
        if action == "warn":
            # Once for each set of signs: figures in them change from window to window.
            kinds = tuple("".join(c for c in sign if not c.isdigit()) for sign in signs)
            if kinds not in self._warned:
                logger.warning(f"{said} on_collapse can stop the run or roll it back.")
            self._warned.add(kinds)
            return control
        good = self._good_checkpoint()
        rollbacks = len(self.guard.pauses)
        if action == "rollback" and good is not None and rollbacks < MOST_ROLLBACKS:
            logger.warning(f"{said} Going back to {good[0]}, without pseudo-labels up to this point of the clock.")
            self.guard.roll_back(good[1], clock)
            raise RollBack(good[0])
        if action == "rollback" and good is not None:
            said += f" {rollbacks} rollbacks have not helped."
        # Nothing is saved any more: a checkpoint of collapsed weights could push out a good one.
        control.should_training_stop = True
        control.should_save = control.should_evaluate = False
        self.error = CollapseError(
            f"{said} Training stopped; the weights are as they were. "
            + (
                "There is no checkpoint from before the collapse: begin pseudo-labels later (pl_start)"
                if good is None
                else f"The last good checkpoint is {good[0]} (reference step {good[1]:g}): go on from it by "
                f"train(resume_from_checkpoint={good[0]!r}) or --resume_from_checkpoint {good[0]}"
            )
            + ", with a higher min_confidence, more filters, a lower unlabeled_weight or a lower learning rate."
        )
        return control

    def _good_checkpoint(self) -> tuple[str, float] | None:
        """The last good checkpoint that is still there and complete; the main process decides for all."""
        answer: list[Any] = [None]
        if self.trainer.accelerator.is_main_process:
            average = self.trainer.args.on_missing_average == "raise"
            for name, clock in self.guard.good():
                path = os.path.normpath(self._folder / name)
                if not what_is_missing(path, average=average):
                    answer = [(path, clock)]
                    break
        if self.trainer.accelerator.num_processes > 1:
            broadcast_object_list(answer)
        return answer[0]

    def train(self, train: Callable[..., Any], checkpoint: str | bool | None, *args: Any, **kwargs: Any) -> Any:
        """Train, from earlier checkpoints again as often as there are rollbacks.

        A rollback is what a crash and `train(resume_from_checkpoint=...)` would be: weights, optimizer, average,
        label cache, counters and random states are those of the checkpoint.

        Raises:
            CollapseError: the run was stopped.
        """
        self.error = None
        while True:
            try:
                result = train(checkpoint, *args, **kwargs)
            except RollBack as back:
                checkpoint = back.checkpoint
            else:
                break
            self._set_aside(checkpoint_step(Path(checkpoint)))
        if self.error is not None:
            raise self.error
        return result

    def _set_aside(self, step: int) -> None:
        """Rename checkpoints after `step`: nothing may resume from them, and nothing is lost."""
        if self.trainer.args.should_save:
            for path in sorted(self._folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*")):
                if path.is_dir() and checkpoint_step(path) > step:
                    rename(path, _free(path.with_name(COLLAPSED_PREFIX + path.name)))
        self.trainer.accelerator.wait_for_everyone()


def _free(path: Path) -> Path:
    """The path, with a number after it where it is taken."""
    number, free = 1, path
    while free.exists():
        number += 1
        free = path.with_name(f"{path.name}.{number}")
    return free
