"""An optimizer that the library does not know, and the rule that makes it known."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch

from hf_ema_scaling.scaling import AdamRule, OptimizerValues


class Lamb(torch.optim.Optimizer):
    """Adam's update and the decay, made as long as the weights of their layer."""

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            first, second = group["betas"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["step"] = torch.zeros(())
                    state["exp_avg"] = torch.zeros_like(parameter)
                    state["exp_avg_sq"] = torch.zeros_like(parameter)
                state["step"] += 1
                step = float(state["step"])
                mean = state["exp_avg"].lerp_(parameter.grad, 1 - first) / (1 - first**step)
                square = state["exp_avg_sq"].lerp_(parameter.grad**2, 1 - second) / (1 - second**step)
                update = mean / (square.sqrt() + group["eps"]) + group["weight_decay"] * parameter
                length, weight = update.norm(), parameter.norm()
                trust = weight / length if weight > 0 and length > 0 else 1.0
                parameter.sub_(group["lr"] * trust * update)


class LAMBRule(AdamRule):
    """The example of `register_scaling_rule`."""

    def scale(self, reference: OptimizerValues, *, kappa: float, stage_kappa: float) -> OptimizerValues:
        scaled = super().scale(reference, kappa=kappa, stage_kappa=stage_kappa)
        assert reference.betas is not None and scaled.betas is not None
        before, after = reference.betas[0], scaled.betas[0]
        longer = math.sqrt((1 - after) / (1 + after) * (1 + before) / (1 - before))
        return dataclasses.replace(
            scaled,
            learning_rate=scaled.learning_rate * longer,
            weight_decay=math.sqrt(stage_kappa) * reference.weight_decay,
        )
