"""Hyper-parameters of a param group, and what every scaling rule has."""

from __future__ import annotations

import math
from collections.abc import MutableMapping
from dataclasses import dataclass
from typing import Any, ClassVar

from ..momentum import check_below_one, check_not_negative, check_positive

__all__ = ["NoiseDominatedRule", "OptimizerValues", "ScalingRule", "noise_dominated_rate"]


@dataclass(frozen=True)
class OptimizerValues:
    """Hyper-parameters of one param group.

    Args:
        learning_rate: Step size, at least 0.
        weight_decay: As the optimizer defines it, at least 0.
        betas: Adam's two decay rates, each in [0, 1); `None` for optimizers without them.
        eps: Offset of the denominator, at least 0; `None` for optimizers without it.
        momentum: Momentum of SGD or RMSprop, in [0, 1); `None` for optimizers without it.
        alpha: Decay rate of RMSprop's square average, in [0, 1); `None` for optimizers without it.

    Raises:
        ValueError: If a value is outside its range or not finite.
    """

    learning_rate: float
    weight_decay: float = 0.0
    betas: tuple[float, float] | None = None
    eps: float | None = None
    momentum: float | None = None
    alpha: float | None = None

    def __post_init__(self) -> None:
        check_not_negative("learning_rate", self.learning_rate)
        check_not_negative("weight_decay", self.weight_decay)
        if self.betas is not None:
            for beta in self.betas:
                check_below_one("betas", beta)
        if self.eps is not None:
            check_not_negative("eps", self.eps)
        if self.momentum is not None:
            check_below_one("momentum", self.momentum)
        if self.alpha is not None:
            check_below_one("alpha", self.alpha)


@dataclass(frozen=True)
class ScalingRule:
    """The rule "none": nothing changes with the batch size. The other rules derive from it.

    A rule of one's own overrides `scale`, `clip_norm` and `rescale_state` of the rule that is nearest, and is made
    known by `register_scaling_rule`.
    """

    name: str

    hyper_parameters: ClassVar[tuple[str, ...]] = ()
    """What the optimizer's param groups hold beside `lr` and `weight_decay`: fields of `OptimizerValues`."""

    def scale(self, reference: OptimizerValues, *, kappa: float, stage_kappa: float) -> OptimizerValues:
        """Hyper-parameters of a step of `kappa` reference batches.

        Args:
            reference: Values at the reference batch; the learning rate is the scheduled one of this moment.
            kappa: Units of this step over the reference batch; above 0.
            stage_kappa: Nominal ratio of the current batch stage, for which the optimizer's state is scaled; above 0.

        Raises:
            ValueError: If a ratio is not a finite number above 0.
        """
        check_positive("kappa", kappa)
        check_positive("stage_kappa", stage_kappa)
        return self._scale(reference, kappa, stage_kappa)

    def _scale(self, reference: OptimizerValues, kappa: float, stage_kappa: float) -> OptimizerValues:
        return reference

    def clip_norm(self, max_norm: float, kappa: float) -> float:
        """Gradient-norm limit of a step of `kappa` reference batches."""
        check_positive("kappa", kappa)
        return max_norm

    def rescale_state(
        self, state: MutableMapping[str, Any], *, old_kappa: float, new_kappa: float, reference: OptimizerValues
    ) -> None:
        """Adapt one parameter's optimizer state, in place, when the batch goes from `old_kappa` to `new_kappa`.

        Args:
            state: `optimizer.state[parameter]`; entries that are missing or `None` are left alone.
            old_kappa: Ratio of the stage that ends; 1 for a state that is as the optimizer was made.
            new_kappa: Ratio of the stage that begins.
            reference: Values of the param group at the reference batch.

        Raises:
            ValueError: If a ratio is not a finite number above 0.
        """
        check_positive("old_kappa", old_kappa)
        check_positive("new_kappa", new_kappa)
        if old_kappa != new_kappa:
            self._rescale_state(state, old_kappa, new_kappa, reference)

    def _rescale_state(
        self, state: MutableMapping[str, Any], old_kappa: float, new_kappa: float, reference: OptimizerValues
    ) -> None:
        return None


@dataclass(frozen=True)
class NoiseDominatedRule(ScalingRule):
    """What the rules of adaptive optimizers share: they hold while gradient noise dominates the mean gradient.

    Clip norm: `/ sqrt(kappa)`, since the norm of a noise-dominated gradient falls like that (derived).
    """

    def clip_norm(self, max_norm: float, kappa: float) -> float:
        """Gradient-norm limit of a step of `kappa` reference batches: `max_norm / sqrt(kappa)`."""
        return max_norm / math.sqrt(check_positive("kappa", kappa))


def noise_dominated_rate(learning_rate: float, kappa: float, stage_kappa: float) -> float:
    """`sqrt(k) * lr * kappa / k`, `k = stage_kappa`: the square-root rule for a step of exactly `k` reference batches.

    Gradients are divided by the root of a second moment that belongs to `k`, so the way of a step grows with its data
    and not with their root.
    """
    return math.sqrt(stage_kappa) * (kappa / stage_kappa) * learning_rate
