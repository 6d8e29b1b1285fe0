"""Which scaling rule belongs to which optimizer."""

from __future__ import annotations

from .rules import (
    AdagradRule,
    AdamRule,
    AdamWRule,
    OptimizerValues,
    RMSpropRule,
    ScalingRule,
    SGDRule,
)

__all__ = [
    "AdagradRule",
    "AdamRule",
    "AdamWRule",
    "OptimizerValues",
    "RMSpropRule",
    "SGDRule",
    "ScalingRule",
    "known_rule",
    "register_scaling_rule",
    "scaling_rule",
]

_ADAMW = AdamWRule("adamw")
# The Trainer's names for plain updates of these families. Missing on purpose: `adamw_torch_npu_fused`, whose step
# count lies outside the optimizer's state, where a change of batch cannot reach it, and low-bit optimizers, whose
# state is quantized.
_RULES: dict[str, ScalingRule] = {
    "none": ScalingRule("none"),
    "sgd": SGDRule("sgd"),
    "adam": AdamRule("adam"),
    "adamw": _ADAMW,
    "adamw_torch": _ADAMW,
    "adamw_torch_fused": _ADAMW,
    "adamw_torch_xla": _ADAMW,
    "rmsprop": RMSpropRule("rmsprop"),
    "adagrad": AdagradRule("adagrad"),
}
# Values of the training argument `scaling_rule` with a meaning of their own.
_RESERVED = ("auto", "none")


def known_rule(name: str) -> ScalingRule | None:
    """The rule of an optimizer, or `None` where `scaling_rule` would raise."""
    return _RULES.get(_key(name))


def scaling_rule(name: str) -> ScalingRule:
    """The rule of an optimizer, by family name, by the Trainer's `optim` name, or by a registered name.

    Args:
        name: "sgd", "adam", "adamw", "adamw_torch", "adamw_torch_fused", "adamw_torch_xla", "rmsprop", "adagrad",
            "none" (nothing is scaled), or what `register_scaling_rule` was given. A string enum such as
            `OptimizerNames.ADAMW_TORCH` is taken by its value.

    Raises:
        ValueError: If no rule is known for `name`.
    """
    rule = known_rule(name)
    if rule is None:
        raise ValueError(
            f"no scaling rule for optimizer {_key(name)!r}; known: {', '.join(_RULES)}. Use one of these optimizers, "
            f"or state how this one scales, hf_ema_scaling.register_scaling_rule({_key(name)!r}, rule), or set "
            "scaling_rule='none' to scale nothing but the average's momentum"
        )
    return rule


def register_scaling_rule(name: str, rule: ScalingRule, *, replace: bool = False) -> None:
    """Make the rule of an optimizer known, in this process; every process of a run has to do so.

    A worked example. LAMB divides Adam's update u, with its decay, by the norm of both:
    `theta <- theta - lr * |theta| / |u + lam * theta| * (u + lam * theta)`. Betas, eps, clip norm and state scale as
    Adam's do, two values differ (derived, for dominating noise):

    - u stands outside Adam's denominator, as the decay does; its mean grows with `sqrt(k)`, so the decay must too.
    - Averaging over fewer steps, `beta1 ** k` for `beta1`, makes u longer, by `c(beta1 ** k) / c(beta1)` with
      `c(b) = sqrt((1 - b) / (1 + b))`; the division takes that away again, and the learning rate has to give it back.

    ```python
    class LAMBRule(AdamRule):
        def scale(self, reference, *, kappa, stage_kappa):
            scaled = super().scale(reference, kappa=kappa, stage_kappa=stage_kappa)
            before, after = reference.betas[0], scaled.betas[0]
            longer = math.sqrt((1 - after) / (1 + after) * (1 + before) / (1 - before))
            return dataclasses.replace(
                scaled,
                learning_rate=scaled.learning_rate * longer,
                weight_decay=math.sqrt(stage_kappa) * reference.weight_decay,
            )


    register_scaling_rule("Lamb", LAMBRule("lamb"))
    trainer = EMATrainer(model, args, train_dataset=data, optimizers=(Lamb(model.parameters(), lr=2e-3), None))
    ```

    Args:
        name: Class name of an optimizer that is passed to the trainer, or a name that the training argument `optim`
            takes.
        rule: A `ScalingRule`. Its `hyper_parameters` say what is read from and written to the param groups beside
            learning rate and weight decay.
        replace: Whether a rule that is already known under this name may be replaced.

    Raises:
        TypeError: If `rule` is not a `ScalingRule` or `name` not a string.
        ValueError: If `name` is empty, reserved, or known and `replace` is not set; if the rule has
            `hyper_parameters` other than betas, eps, momentum and alpha.
    """
    if not isinstance(name, str):
        raise TypeError(f"name must be the name of an optimizer, got {name!r}: for a class pass its __name__")
    if not isinstance(rule, ScalingRule):
        raise TypeError(f"rule must be an instance of ScalingRule, got {rule!r}")
    key = _key(name)
    if not key or key in _RESERVED:
        raise ValueError(f"{key!r} cannot be the name of an optimizer: empty, or a word of the argument scaling_rule")
    unknown = sorted(set(rule.hyper_parameters) - {"betas", "eps", "momentum", "alpha"})
    if unknown:
        raise ValueError(
            f"hyper_parameters of {type(rule).__name__} may be betas, eps, momentum and alpha, got {unknown}"
        )
    if key in _RULES and not replace:
        raise ValueError(
            f"optimizer {key!r} already has a scaling rule ({_RULES[key]!r}): pass replace=True to put another in its "
            "place"
        )
    _RULES[key] = rule


def _key(name: str) -> str:
    # A string enum hashes by its member name, so it must be looked up by its value.
    return str(getattr(name, "value", name))
