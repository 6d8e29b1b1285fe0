"""Writes the plan's values of each step into the optimizer; stands where Trainer keeps its learning-rate scheduler."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import get_scheduler

from hf_ema_scaling.data.sampler import SampledStep
from hf_ema_scaling.scaling import OptimizerValues, ScalingPlan


def lr_multiplier(
    name: str, *, learning_rate: float, warmup_steps: int, reference_steps: int, specific: dict[str, Any] | None
) -> Callable[[int], float]:
    """Learning rate of a reference step as a share of the peak, from a transformers schedule.

    Args:
        name: `lr_scheduler_type`.
        learning_rate: the peak, of which some schedules state an absolute end (`lr_end`, `min_lr`).
        warmup_steps: in reference steps.
        reference_steps: length of the run.
        specific: `lr_scheduler_kwargs`.

    Raises:
        ValueError: for schedules that are no function of the step.
    """
    probe = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=learning_rate or 1.0)
    schedule = get_scheduler(
        name,
        optimizer=probe,
        num_warmup_steps=warmup_steps,
        num_training_steps=reference_steps,
        scheduler_specific_kwargs=dict(specific or {}),
    )
    functions = getattr(schedule, "lr_lambdas", None)
    if not functions:
        raise ValueError(f"lr_scheduler_type={name} is no function of the step: choose another")
    return functions[0]


class PlanScheduler:
    """Sets learning rate, weight decay, and betas, alpha, eps, momentum of every param group at the start of a step.

    At a change of batch stage it also rescales the optimizer's state (Adam's second moment and step count, buffers,
    Adagrad's sum). It has the methods that Trainer calls on a scheduler; `step()` does nothing, because values belong
    to the clock, not to a count of calls.

    Args:
        plan: the run's plan.
        optimizer: the optimizer, prepared or not, not yet loaded from a checkpoint. A state that it already has is
            that of the reference batch (Adagrad's first sum, for one).
        reference: values of each param group at the reference batch.
    """

    def __init__(self, plan: ScalingPlan, optimizer: Any, reference: list[OptimizerValues]) -> None:
        self.plan = plan
        self.optimizer = optimizer
        self.reference = reference
        self.stage_kappa = 1.0

    def begin(self, step: SampledStep) -> None:
        """Write the values of `step` into the optimizer."""
        if step.stage_kappa != self.stage_kappa:
            self._rescale_state(step.stage_kappa)
        for group, reference in zip(self.optimizer.param_groups, self.reference, strict=True):
            values = self.plan.optimizer_values(
                reference, start=step.start, end=step.end, stage_kappa=step.stage_kappa
            )
            self._write(group, values)

    @staticmethod
    def _write(group: dict[str, Any], values: OptimizerValues) -> None:
        group["lr"] = values.learning_rate
        group["weight_decay"] = values.weight_decay
        for name in ("betas", "alpha", "eps", "momentum"):
            value = getattr(values, name)
            if value is not None:
                group[name] = value

    def end(self) -> None:
        """Put the optimizer back to the reference batch, where whoever uses it next takes it to be."""
        if self.stage_kappa != 1.0:
            self._rescale_state(1.0)
        for group, reference in zip(self.optimizer.param_groups, self.reference, strict=True):
            self._write(group, reference)

    def _rescale_state(self, stage_kappa: float) -> None:
        for group, reference in zip(self.optimizer.param_groups, self.reference, strict=True):
            for parameter in group["params"]:
                if parameter in self.optimizer.state:
                    self.plan.rule.rescale_state(
                        self.optimizer.state[parameter],
                        old_kappa=self.stage_kappa,
                        new_kappa=stage_kappa,
                        reference=reference,
                    )
        self.stage_kappa = stage_kappa

    def step(self) -> None:
        """Nothing: `begin` writes the values when a step starts."""

    def get_last_lr(self) -> list[float]:
        """Learning rate of each param group, as it stands."""
        return [group["lr"] for group in self.optimizer.param_groups]

    def state_dict(self) -> dict[str, float]:
        """The kappa that the optimizer's state is scaled for."""
        return {"stage_kappa": self.stage_kappa}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Restore `state_dict`.

        Raises:
            ValueError: for the state of another scheduler.
        """
        if set(state) != {"stage_kappa"}:
            raise ValueError(
                f"scheduler.pt holds {sorted(state)}, not the state of this library's scheduler: the checkpoint was "
                "written by another trainer and cannot be resumed here; start from its weights instead"
            )
        self.stage_kappa = float(state["stage_kappa"])
