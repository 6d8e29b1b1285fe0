"""How an optimizer's hyper-parameters and state change with the batch size.

Two ratios appear. `kappa` is the ratio of one step (its units over the reference batch; a step may be cut short) and
governs learning rate and weight decay. `stage_kappa` is the nominal ratio of the batch stage and governs what has a
memory across steps: betas, eps and SGD's momentum.

At `kappa == stage_kappa == 1` every rule returns its input bit for bit.
"""

from __future__ import annotations

import math
import sys
from collections.abc import MutableMapping
from dataclasses import dataclass, replace
from typing import Any

from .momentum import check_below_one, check_not_negative, check_positive, ema_weight, scale_momentum

__all__ = ["AdamRule", "AdamWRule", "OptimizerValues", "SGDRule", "ScalingRule", "scaling_rule"]


@dataclass(frozen=True)
class OptimizerValues:
    """Hyper-parameters of one param group.

    Args:
        learning_rate: Step size, at least 0.
        weight_decay: As the optimizer defines it, at least 0.
        betas: Adam's two decay rates, each in [0, 1); `None` for optimizers without them.
        eps: Adam's denominator offset, at least 0; `None` for optimizers without it.
        momentum: SGD's momentum, in [0, 1); `None` for optimizers without it.

    Raises:
        ValueError: If a value is outside its range or not finite.
    """

    learning_rate: float
    weight_decay: float = 0.0
    betas: tuple[float, float] | None = None
    eps: float | None = None
    momentum: float | None = None

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


@dataclass(frozen=True)
class ScalingRule:
    """The rule "none": nothing changes with the batch size. The other rules derive from it."""

    name: str

    def scale(self, reference: OptimizerValues, *, kappa: float, stage_kappa: float) -> OptimizerValues:
        """Hyper-parameters of a step of `kappa` reference batches.

        Args:
            reference: Values at the reference batch; the learning rate is the scheduled one of this moment.
            kappa: Units of this step over the reference batch; above 0.
            stage_kappa: Nominal ratio of the current batch stage; above 0.

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
            old_kappa: Ratio of the stage that ends.
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
class SGDRule(ScalingRule):
    """Linear rule for SGD with or without momentum, in PyTorch's form (`v <- mu v + g`, dampening 0).

    - learning rate without momentum: `kappa * lr` (published, see arXiv 2205.10287).
    - momentum: `mu ** k`, learning rate `kappa * lr * (1 - mu ** k) / (1 - mu)`, `k = stage_kappa` (derived): the
      time constant of the buffer, counted in data, and the total displacement per unit of data both stay. Keeping `mu`
      itself would stretch that time constant by `kappa`.
    - weight decay is L2 in the gradient, scales with the learning rate, and stays (derived by algebra).
    - clip norm: unchanged.
    """

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
        # The buffer is near g / (1 - mu ** k) and the learning rate holds the inverse factor: only both together keep
        # the displacement per unit of data across the switch.
        buffer = state.get("momentum_buffer")
        if buffer is not None and reference.momentum:
            buffer.mul_(ema_weight(reference.momentum, old_kappa) / ema_weight(reference.momentum, new_kappa))


@dataclass(frozen=True)
class AdamRule(ScalingRule):
    """Square-root rule for Adam with L2 weight decay in the gradient.

    - learning rate `sqrt(kappa) * lr` and eps `eps / sqrt(k)` (published: arXiv 2205.10287), `k = stage_kappa`. The
      rule needs gradient noise to dominate the mean gradient (arXiv 2402.18824): it fails first early in training and
      at very large batches.
    - betas `beta ** k` (published for beta2: arXiv 2507.07101). The linear form `1 - k (1 - beta)` of arXiv 2205.10287
      is its first order and negative past `1 / (1 - beta)`.
    - weight decay: unchanged (derived by algebra).
    - clip norm: `/ sqrt(kappa)`, since the norm of a noise-dominated gradient falls like that (derived).
    - state at a switch of ratio q: second moments `/ q`, since noise variance falls like that; `step / q`, so that the
      bias correction `beta' ** step'` equals `beta ** step` (derived).
    """

    def _scale(self, reference: OptimizerValues, kappa: float, stage_kappa: float) -> OptimizerValues:
        betas, eps = reference.betas, reference.eps
        if betas is not None:
            betas = (scale_momentum(betas[0], stage_kappa), scale_momentum(betas[1], stage_kappa))
        if eps is not None:
            eps = eps / math.sqrt(stage_kappa)
        return replace(reference, learning_rate=math.sqrt(kappa) * reference.learning_rate, betas=betas, eps=eps)

    def clip_norm(self, max_norm: float, kappa: float) -> float:
        """Gradient-norm limit of a step of `kappa` reference batches: `max_norm / sqrt(kappa)`."""
        return max_norm / math.sqrt(check_positive("kappa", kappa))

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

    As `AdamRule`, and weight decay `lam_hat = (1 - (1 - lr * lam) ** kappa) / (sqrt(kappa) * lr)` at the current
    learning rate (derived), so that one step shrinks the weights exactly as `kappa` reference steps do; its limit at
    learning rate 0 is `sqrt(kappa) * lam`.
    """

    def _scale(self, reference: OptimizerValues, kappa: float, stage_kappa: float) -> OptimizerValues:
        scaled = super()._scale(reference, kappa, stage_kappa)
        shrink = reference.learning_rate * reference.weight_decay
        if shrink >= 1:
            raise ValueError(
                f"learning_rate * weight_decay is {shrink:g} (learning_rate={reference.learning_rate:g}, "
                f"weight_decay={reference.weight_decay:g}): one step would erase the weights; it must be below 1"
            )
        if kappa == 1:
            return scaled
        # Below the normal range the product has lost its digits, and the limit is exact to float64.
        if shrink < sys.float_info.min:
            return replace(scaled, weight_decay=math.sqrt(kappa) * reference.weight_decay)
        lost = -math.expm1(kappa * math.log1p(-shrink))
        return replace(scaled, weight_decay=lost / scaled.learning_rate)


_NONE = ScalingRule("none")
_SGD = SGDRule("sgd")
_ADAM = AdamRule("adam")
_ADAMW = AdamWRule("adamw")
_RULES: dict[str, ScalingRule] = {
    "none": _NONE,
    "sgd": _SGD,
    "adam": _ADAM,
    "adamw": _ADAMW,
    "adamw_torch": _ADAMW,
    "adamw_torch_fused": _ADAMW,
}


def scaling_rule(name: str) -> ScalingRule:
    """The rule of an optimizer, by family name or by the Trainer's `optim` name.

    Args:
        name: "sgd", "adam", "adamw", "adamw_torch", "adamw_torch_fused", or "none" (nothing is scaled). A string enum
            such as `OptimizerNames.ADAMW_TORCH` is taken by its value.

    Raises:
        ValueError: If no rule is known for `name`.
    """
    # A string enum hashes by its member name, so it must be looked up by its value.
    key = str(getattr(name, "value", name))
    if key not in _RULES:
        raise ValueError(
            f"no scaling rule for optimizer {key!r}; known: {', '.join(_RULES)}. Use one of these optimizers, or the "
            "rule 'none' to scale nothing but the average's momentum"
        )
    return _RULES[key]
