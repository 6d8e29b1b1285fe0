"""When the average moves, and by what weight."""

from __future__ import annotations

import math

import torch
from torch import nn

from hf_ema_scaling.data.sampler import SampledStep
from hf_ema_scaling.ema import WeightAverage
from hf_ema_scaling.ema.adapter_storage import check_adapters
from hf_ema_scaling.ema.half_precision import warn_of_half_precision
from hf_ema_scaling.ema.names import unwrap
from hf_ema_scaling.scaling import ScalingPlan, weight_from_log_momentum
from hf_ema_scaling.training.arguments import EMATrainingArguments


def new_average(model: nn.Module, args: EMATrainingArguments) -> WeightAverage:
    """The average that the arguments ask for; warns of a student in half precision."""
    warn_of_half_precision(model)
    average = WeightAverage(
        model,
        buffers=args.ema_buffers,  # type: ignore[arg-type]
        dtype=getattr(torch, args.ema_dtype),
    )
    check_adapters(unwrap(model), average)
    return average


class AverageMover:
    """Carries out a plan's updates of an average, around every optimizer step that is taken.

    With `ema_update_every = n` the average moves after the optimizer steps n, 2n, ... (counted from 1) and after the
    run's last one, by the sum of the log-momenta of the steps taken since the last update: `rho ** n` at kappa 1. The
    sum spans stage ends, where nothing special happens. A skipped step adds nothing to it, and where the step that is
    due is skipped the next one that is due includes its share. Steps before `ema_start`, whose momentum is 0, each
    make the average equal to the student, whatever n is. Costs no memory and saves n - 1 of n passes over the weights;
    in between, the average is that of the last update. It is off the average of every step as kappa = n would be.

    With `ema_correction = "path"` each update is two moves, see `path_correction`. Averaged buffers (BatchNorm
    statistics) are not moved by the optimizer and follow the ordinary update, in the second move.

    Attributes:
        pending: Sum of the log-momenta of the steps taken since the last update; part of a checkpoint.
    """

    def __init__(self) -> None:
        self.pending = 0.0

    def before_step(self, plan: ScalingPlan, average: WeightAverage, model: nn.Module, step: SampledStep) -> None:
        """The first move of an update, with the weights before the optimizer step, which must then be taken."""
        if plan.ema_correction == "path":
            average.lead(model, plan.path_weights(step.start, step.end).before)

    def after_step(
        self,
        plan: ScalingPlan,
        average: WeightAverage,
        model: nn.Module,
        step: SampledStep,
        *,
        number: int,
        last: bool,
    ) -> float | None:
        """The update after an optimizer step that was taken.

        Args:
            plan: The run's plan.
            average: What to move.
            model: The student after the step.
            step: What the step drew.
            number: Optimizer steps of the run so far, this one included.
            last: Whether this is the run's last.

        Returns:
            The weight `1 - rho ** kappa` of the update, or None if none was due.
        """
        self.pending += plan.log_momentum(step.start, step.end)
        if not (number % plan.ema_update_every == 0 or last or self.pending == -math.inf):
            return None
        weight, self.pending = weight_from_log_momentum(self.pending), 0.0
        if plan.ema_correction == "path":
            average.blend(model, plan.path_weights(step.start, step.end).after, buffer_weight=weight)
        else:
            average.blend(model, weight)
        return weight
