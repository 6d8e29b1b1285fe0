"""Scaling rule of SGD."""

from __future__ import annotations

from collections.abc import MutableMapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from ..momentum import ema_weight, scale_momentum
from .base import OptimizerValues, ScalingRule

__all__ = ["SGDRule"]


@dataclass(frozen=True)
class SGDRule(ScalingRule):
    """Linear rule for SGD, with or without momentum or Nesterov, in PyTorch's form (`v <- mu v + g`, dampening 0).

    - learning rate without momentum: `kappa * lr` (published, see arXiv 2205.10287).
    - momentum: `mu ** k`, learning rate `kappa * lr * (1 - mu ** k) / (1 - mu)`, `k = stage_kappa` (derived): the
      time constant of the buffer, counted in data, and the total displacement per unit of data both stay. Keeping `mu`
      itself would stretch that time constant by `kappa`.
    - Nesterov: the same (derived). Its step `lr * (g + mu v)` moves the weights by
      `lr * (1 + mu (1 + mu + mu ** 2 + ...)) = lr / (1 - mu)` for every gradient in all, as plain momentum does; it
      only spends it earlier. From an empty buffer, under a constant gradient g, T steps move by
      `lr * g / (1 - mu) * (T - mu ** 2 * (1 - mu ** T) / (1 - mu))` (plain momentum: `mu` for `mu ** 2`). Only that
      transient, worth `1 / (1 - mu)` reference steps in all, differs with kappa: a scaled run is ahead of it by
      `3 / 2 * (kappa - 1)` reference steps (plain momentum: `1 / 2 * (kappa - 1)`), to first order in
      `kappa * (1 - mu)`.
    - weight decay is L2 in the gradient, scales with the learning rate, and stays (derived by algebra).
    - clip norm: unchanged.
    - state at a switch: the buffer is near `g / (1 - mu ** k)` and keeps that form, so that the displacement per unit
      of data stays (derived).
    """

    hyper_parameters: ClassVar[tuple[str, ...]] = ("momentum",)

    def _scale(self, reference: OptimizerValues, kappa: float, stage_kappa: float) -> OptimizerValues:
        learning_rate = kappa * reference.learning_rate
        if not reference.momentum:
            return replace(reference, learning_rate=learning_rate)
        mu = reference.momentum
        return replace(
            reference,
            learning_rate=learning_rate * (ema_weight(mu, stage_kappa) / ema_weight(mu)),
            momentum=scale_momentum(mu, stage_kappa),
        )

    def _rescale_state(
        self, state: MutableMapping[str, Any], old_kappa: float, new_kappa: float, reference: OptimizerValues
    ) -> None:
        # The learning rate holds the inverse factor: only both together keep the displacement across the switch.
        buffer = state.get("momentum_buffer")
        if buffer is not None and reference.momentum:
            buffer.mul_(ema_weight(reference.momentum, old_kappa) / ema_weight(reference.momentum, new_kappa))
