"""The average that a run owns: made from the student, moved once by every optimizer step that is taken."""

from __future__ import annotations

from typing import Any

from transformers.utils import logging

from hf_ema_scaling.ema import WeightAverage
from hf_ema_scaling.ema.skipped import SkipWatch, loss_scale
from hf_ema_scaling.training.average_update import AverageMover, new_average
from hf_ema_scaling.training.checks import LivenessWatch, share_statistics
from hf_ema_scaling.training.split_step import SplitSteps
from hf_ema_scaling.training.stock import learns, nonfinite_parameter

logger = logging.get_logger(__name__)


class AveragedSteps(SplitSteps):
    """Moves an average of the student after each of `SplitSteps`, and watches that it is alive.

    `flow.AverageUpdate` calls the methods when they are due.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.average: WeightAverage | None = None
        self._mover = AverageMover()
        self._watch: LivenessWatch | None = None
        self._skip_watch = SkipWatch()

    def ensure_average(self) -> WeightAverage:
        """The run's average; a new one where there is none, or where its parameters are no longer the model's."""
        if self.average is not None and not self.average.same_parameters(self.model):
            if not self.state.is_hyper_param_search:
                logger.warning(
                    "The model's parameters are other objects than before: the average is rebuilt from them."
                )
            self.average = None
        if self.average is None:
            self.average = new_average(self.model, self.args)
        return self.average

    def lead_average(self) -> None:
        """What the average takes from the weights before the optimizer step; nothing if the step is dropped."""
        assert self.average is not None and self._last_step is not None
        self._skip_watch.before_step(self.optimizer)
        if not self._skipped:
            self._mover.before_step(self.plan, self.average, self.model, self._last_step)

    def update_average(self) -> None:
        """Move the average by what the step just taken drew; a skipped step moves nothing.

        Raises:
            FloatingPointError: A weight is not finite, though the gradient was; it is not averaged. Or it is one
                skipped step too many in a row.
        """
        assert self.average is not None and self._last_step is not None
        # Under a gradient scaler only the scaler knows: it steps on finite gradients whose norm overflows.
        dropped = self._skipped and getattr(self.accelerator, "scaler", None) is None
        overflowed = self._skip_watch.was_skipped(self.optimizer)
        if overflowed:
            self._forward_state.restore()
        if self.batch_statistics and self.accelerator.num_processes > 1:
            share_statistics(self.model)
        number = self.state.global_step + 1
        if dropped or overflowed:
            why = f"an overflow at loss scale {loss_scale(self.optimizer)}" if overflowed else "its gradient"
            self._skips.skipped(number, self._last_step.start, why)
            return
        self._skips.taken()
        if (broken := nonfinite_parameter(self.model)) is not None:
            raise FloatingPointError(
                f"{broken!r} is not finite after optimizer step {number}, though its gradient was: it is not "
                "averaged, and nothing of this step is saved. Go on from the last checkpoint with a lower "
                "learning_rate, and look at adam_epsilon and at the optimizer's precision"
            )
        moved = (self.plan, self.average, self.model, self._last_step)
        weight = self._mover.after_step(*moved, number=number, last=number == self.sampler.num_steps)
        if self._watch is None or weight is None or weight == 1 or not learns(self.optimizer):
            return
        if self._watch.after_update(self.model, self.average, weight):
            self._watch = None
