"""When things happen: log, evaluate and save on the reference clock, and the average's one update per step."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import DefaultFlowCallback, TrainerCallback

from hf_ema_scaling.data.sampler import SampledStep
from hf_ema_scaling.scaling import ReferenceClock

if TYPE_CHECKING:
    from hf_ema_scaling.training.mixin import EMATrainerMixin


class ReferenceFlow(DefaultFlowCallback):
    """Trainer's default flow with intervals in reference steps.

    An event fires at the first optimizer step whose clock reaches or crosses a multiple of its interval. Intervals
    below 1 are shares of the run. The `epoch` strategies fire after each pass over the labelled set.
    """

    def __init__(self, trainer: EMATrainerMixin) -> None:
        self.trainer = trainer

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Raise the flags whose multiple the step just finished crossed."""
        step = self.trainer.sampler.step(state.global_step - 1)

        def crosses(every: float | None) -> bool:
            return _crosses(self.trainer, step, every)

        after = self.trainer.sampler.labelled_passes(state.global_step)
        last = state.global_step >= state.max_steps
        epoch = _ends_pass(self.trainer, state.global_step - 1)
        position = after if args.eval_strategy == "epoch" else step.end

        if log_is_due(self.trainer, state.global_step - 1):
            control.should_log = True
        if _fires(args.eval_strategy, crosses(args.eval_steps) or last, epoch) and position >= args.eval_delay:
            control.should_evaluate = True
        if _fires(args.save_strategy, crosses(args.save_steps) or last, epoch):
            control.should_save = True
        if last:
            control.should_training_stop = True
        return control

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Nothing: the end of the virtual epoch is the end of the run."""
        return control


def log_is_due(trainer: EMATrainerMixin, number: int) -> bool:
    """Whether optimizer step `number` (from 0) ends with a log, which is known before it."""
    args = trainer.args
    crosses = _crosses(trainer, trainer.sampler.step(number), args.logging_steps)
    first = number == 0 and args.logging_first_step
    return first or _fires(args.logging_strategy, crosses, _ends_pass(trainer, number))


def _crosses(trainer: EMATrainerMixin, step: SampledStep, every: float | None) -> bool:
    """Whether a step reaches or crosses a multiple of `every` reference steps, below 1 of the run's length."""
    if not every:
        return False
    interval = every * trainer.plan.recipe.max_steps if every < 1 else every
    return ReferenceClock.crosses(step.start, step.end, interval)


def _ends_pass(trainer: EMATrainerMixin, number: int) -> bool:
    """Whether a step ends a pass over the labelled set, or the run."""
    before, after = (trainer.sampler.labelled_passes(number + i) for i in (0, 1))
    return ReferenceClock.crosses(before, after, 1.0) or number + 1 >= trainer.sampler.num_steps


def _fires(strategy: str, step: bool, epoch: bool) -> bool:
    """Whether an event with this strategy is due."""
    return (strategy == "steps" and step) or (strategy == "epoch" and epoch)


class StopAt(TrainerCallback):
    """Saves and stops at the first step at which the clock has reached `clock`, for runs that branch from there.

    Args:
        clock: in reference steps.
    """

    def __init__(self, clock: float) -> None:
        self.clock = clock
        self.trainer: EMATrainerMixin | None = None
        """The trainer that the callback was added to; set it before training."""

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Raise the flags at the clock's position."""
        assert self.trainer is not None
        if self.trainer.sampler.step(state.global_step - 1).end >= self.clock:
            control.should_save = control.should_training_stop = True
        return control


class AverageUpdate(TrainerCallback):
    """Moves the trainer's average around each real optimizer step."""

    def __init__(self, trainer: EMATrainerMixin) -> None:
        self.trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Make sure that there is an average, and take up the log where the checkpoint left it."""
        self.trainer.begin_training()

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """What an update does with the weights before the step; gradients are known to be finite or dropped by now."""
        assert self.trainer.average is not None
        self.trainer.average.prepare(self.trainer.model)
        self.trainer.lead_average()

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """One update with the weights after the step."""
        self.trainer.update_average()
