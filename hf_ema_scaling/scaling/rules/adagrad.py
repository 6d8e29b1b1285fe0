"""Scaling rule of Adagrad."""

from __future__ import annotations

from collections.abc import MutableMapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from .base import NoiseDominatedRule, OptimizerValues

__all__ = ["AdagradRule"]


@dataclass(frozen=True)
class AdagradRule(NoiseDominatedRule):
    """Rule for Adagrad (`s <- s + g ** 2`, step `lr * g / (sqrt(s) + eps)`); all of it derived, for dominating noise.

    After t reference steps of noise variance `sigma ** 2` the sum is `s = sigma ** 2 * t`. At batch ratio k the same
    data are `t / k` steps of variance `sigma ** 2 / k`, so the sum is `s / k ** 2` and its root `sqrt(s) / k`: the
    division alone makes one step worth k reference steps. Hence, with `k = stage_kappa`:

    - learning rate: unchanged for a whole step; `lr * kappa / k` for one that draws a little more or less.
    - eps `/ k`.
    - weight decay is L2 in the gradient, scales with it, and stays.
    - clip norm: `/ sqrt(kappa)`.
    - state at a switch of ratio q: `sum / q ** 2`. This scales `initial_accumulator_value` too, to
      `initial_accumulator_value / k ** 2`, as long as the switch from 1 to the first stage is made.

    Where the mean gradient dominates the rule would be `sqrt(kappa) * lr` instead. From an empty sum the first steps
    are `lr` long at any batch, so a run that starts at k takes `lr ** 2 * log(k)` less variance from them; start at
    the reference batch. `lr_decay` has no rule: it counts optimizer steps, not reference steps.
    """

    hyper_parameters: ClassVar[tuple[str, ...]] = ("eps",)

    def _scale(self, reference: OptimizerValues, kappa: float, stage_kappa: float) -> OptimizerValues:
        eps = None if reference.eps is None else reference.eps / stage_kappa
        return replace(reference, learning_rate=reference.learning_rate * (kappa / stage_kappa), eps=eps)

    def _rescale_state(
        self, state: MutableMapping[str, Any], old_kappa: float, new_kappa: float, reference: OptimizerValues
    ) -> None:
        if state.get("sum") is not None:
            state["sum"].div_((new_kappa / old_kappa) ** 2)
