"""Scaling rules of Adam and AdamW."""

from __future__ import annotations

import math
import sys
from collections.abc import MutableMapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from ..momentum import scale_momentum
from .base import NoiseDominatedRule, OptimizerValues, noise_dominated_rate

__all__ = ["AdamRule", "AdamWRule"]


@dataclass(frozen=True)
class AdamRule(NoiseDominatedRule):
    """Square-root rule for Adam with L2 weight decay in the gradient.

    - learning rate `sqrt(k) * lr` and eps `eps / sqrt(k)` (published: arXiv 2205.10287), `k = stage_kappa`. The rule
      needs gradient noise to dominate the mean gradient (arXiv 2402.18824): it fails first early in training and at
      very large batches. A step that draws a little more or less than its stage's batch (seconds, tokens) moves in
      proportion, `sqrt(k) * lr * kappa / k`, since the second moment is that of the stage (derived).
    - betas `beta ** k` (published for beta2: arXiv 2507.07101). The linear form `1 - k (1 - beta)` of arXiv 2205.10287
      is its first order and negative past `1 / (1 - beta)`.
    - weight decay: unchanged (derived by algebra).
    - clip norm: `/ sqrt(kappa)` (derived).
    - state at a switch of ratio q: second moments `/ q`, since noise variance falls like that; `step / q`, so that the
      bias correction `beta' ** step'` equals `beta ** step` (derived).
    """

    hyper_parameters: ClassVar[tuple[str, ...]] = ("betas", "eps")

    def _scale(self, reference: OptimizerValues, kappa: float, stage_kappa: float) -> OptimizerValues:
        betas, eps = reference.betas, reference.eps
        if betas is not None:
            betas = (scale_momentum(betas[0], stage_kappa), scale_momentum(betas[1], stage_kappa))
        if eps is not None:
            eps = eps / math.sqrt(stage_kappa)
        learning_rate = noise_dominated_rate(reference.learning_rate, kappa, stage_kappa)
        return replace(reference, learning_rate=learning_rate, betas=betas, eps=eps)

    def _rescale_state(
        self, state: MutableMapping[str, Any], old_kappa: float, new_kappa: float, reference: OptimizerValues
    ) -> None:
        ratio = new_kappa / old_kappa
        for key in ("exp_avg_sq", "max_exp_avg_sq"):
            if state.get(key) is not None:
                state[key].div_(ratio)
        step = state.get("step")
        if step is None:
            return
        if hasattr(step, "div_"):
            step.div_(ratio)
        else:
            state["step"] = step / ratio


@dataclass(frozen=True)
class AdamWRule(AdamRule):
    """Square-root rule for AdamW, whose decay is `theta <- (1 - lr * weight_decay) * theta`.

    As `AdamRule`, and weight decay `lam' = (1 - (1 - lr * lam) ** kappa) / lr'` at the current learning rate, lr' the
    scaled one (derived), so that one step shrinks the weights exactly as `kappa` reference steps do; its limit at
    learning rate 0 is `sqrt(k) * lam`.
    """

    def _scale(self, reference: OptimizerValues, kappa: float, stage_kappa: float) -> OptimizerValues:
        scaled = super()._scale(reference, kappa, stage_kappa)
        shrink = reference.learning_rate * reference.weight_decay
        if shrink >= 1:
            raise ValueError(
                f"learning_rate * weight_decay is {shrink:g} (learning_rate={reference.learning_rate:g}, "
                f"weight_decay={reference.weight_decay:g}): one step would erase the weights; it must be below 1"
            )
        if kappa == stage_kappa == 1:
            return scaled
        # Below the normal range the product has lost its digits, and the limit is exact to float64.
        if shrink < sys.float_info.min:
            return replace(scaled, weight_decay=math.sqrt(stage_kappa) * reference.weight_decay)
        lost = -math.expm1(kappa * math.log1p(-shrink))
        return replace(scaled, weight_decay=lost / scaled.learning_rate)
