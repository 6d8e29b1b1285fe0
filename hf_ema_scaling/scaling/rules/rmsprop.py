"""Scaling rule of RMSprop."""

from __future__ import annotations

import math
from collections.abc import MutableMapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from ..momentum import ema_weight, scale_momentum
from .base import NoiseDominatedRule, OptimizerValues, noise_dominated_rate

__all__ = ["RMSpropRule"]


@dataclass(frozen=True)
class RMSpropRule(NoiseDominatedRule):
    """Square-root rule for RMSprop in PyTorch's form, `v <- alpha v + (1 - alpha) g ** 2`, step `g / (sqrt(v) + eps)`.

    With `k = stage_kappa`, a gradient of mean m and noise variance `sigma ** 2 / k`, noise dominating:

    - learning rate `sqrt(k) * lr` and eps `eps / sqrt(k)` (published: arXiv 2205.10287), in proportion for a step that
      draws a little more or less, `sqrt(k) * lr * kappa / k` (derived); `alpha ** k` (derived; the published
      `1 - k (1 - alpha)` is its first order and negative past `1 / (1 - alpha)`).
    - momentum `mu`, whose buffer sums normalised gradients (`b <- mu b + g / (sqrt(v) + eps)`): `mu ** k`, that
      learning rate times `(1 - mu ** k) / (1 - mu)` (derived): each gradient moves the weights by
      `lr / (1 - mu)` normalised gradients in all, and the time constant of the buffer, counted in data, stays.
    - weight decay is L2 in the gradient and normalised with it. It moves the weights by
      `sqrt(k) * lr * lam * theta / (sigma / sqrt(k))` per step, which is that of `k` reference steps: it stays
      (derived).
    - clip norm: `/ sqrt(kappa)` (derived).
    - state at a switch of ratio q (derived): `square_avg / q`. Centered, only the variance is divided,
      `(square_avg - grad_avg ** 2) / q + grad_avg ** 2`, since the mean gradient does not depend on the batch;
      dividing all of it would leave less than `grad_avg ** 2`, whose square root is no number. `momentum_buffer`
      becomes `sqrt(q) * (1 - mu ** k_old) / (1 - mu ** k_new)` of itself, which keeps the displacement per unit of
      data: the mean of what it sums is `m * sqrt(k) / sigma`.
    """

    hyper_parameters: ClassVar[tuple[str, ...]] = ("alpha", "eps", "momentum")

    def _scale(self, reference: OptimizerValues, kappa: float, stage_kappa: float) -> OptimizerValues:
        learning_rate = noise_dominated_rate(reference.learning_rate, kappa, stage_kappa)
        alpha, eps, mu = reference.alpha, reference.eps, reference.momentum
        if alpha is not None:
            alpha = scale_momentum(alpha, stage_kappa)
        if eps is not None:
            eps = eps / math.sqrt(stage_kappa)
        if mu:
            learning_rate *= ema_weight(mu, stage_kappa) / ema_weight(mu)
            mu = scale_momentum(mu, stage_kappa)
        return replace(reference, learning_rate=learning_rate, alpha=alpha, eps=eps, momentum=mu)

    def _rescale_state(
        self, state: MutableMapping[str, Any], old_kappa: float, new_kappa: float, reference: OptimizerValues
    ) -> None:
        ratio = new_kappa / old_kappa
        square, mean, buffer = (state.get(key) for key in ("square_avg", "grad_avg", "momentum_buffer"))
        if square is not None and mean is not None:
            # Rounding can leave a variance just below 0.
            square.addcmul_(mean, mean, value=-1).clamp_(min=0).div_(ratio).addcmul_(mean, mean)
        elif square is not None:
            square.div_(ratio)
        if buffer is not None and reference.momentum:
            mu = reference.momentum
            buffer.mul_(math.sqrt(ratio) * ema_weight(mu, old_kappa) / ema_weight(mu, new_kappa))
