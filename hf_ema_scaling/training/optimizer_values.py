"""The hyper-parameters of an optimizer at the reference batch, before and after it exists."""

from __future__ import annotations

from typing import Any

import torch
from transformers import Trainer, TrainingArguments

from hf_ema_scaling.scaling import OptimizerValues, known_rule, scaling_rule

# What Trainer makes with the defaults of the class and `optim_args`, whatever the arguments say of Adam's betas and
# eps; and what `optim_args` may state of it, which is all that has a scaling rule or needs none.
OPTIM_ARGS: dict[str, tuple[str, ...]] = {
    "sgd": ("momentum", "nesterov"),
    "rmsprop": ("momentum", "alpha", "eps", "centered"),
    "adagrad": ("eps",),
}


def hyper_parameters(optimizer: str, rule: str) -> tuple[str, ...]:
    """What an optimizer's param groups hold beside learning rate and weight decay: fields of `OptimizerValues`.

    Args:
        optimizer: name of the optimizer's family.
        rule: the argument `scaling_rule`; it decides where the family has no rule of its own.

    Raises:
        ValueError: when there is no rule to go by.
    """
    found = known_rule(optimizer)
    if found is None:
        found = scaling_rule(optimizer if rule == "auto" else rule)
    return found.hyper_parameters


def reference_values(group: dict[str, Any], has: tuple[str, ...]) -> OptimizerValues:
    """The hyper-parameters of a param group, as the recipe states them.

    Args:
        group: of an optimizer that no step has run with.
        has: its `hyper_parameters`; others may share a name and mean something else.

    Raises:
        ValueError: for a group without one of them.
    """
    missing = [name for name in has if name not in group]
    if missing:
        raise ValueError(
            f"the optimizer's param groups have no {' and no '.join(missing)}, which its scaling rule names in "
            "hyper_parameters: name there what they have"
        )
    values: dict[str, Any] = {name: float(group[name]) for name in has if name != "betas"}
    if "betas" in has:
        first, second = group["betas"]
        values["betas"] = float(first), float(second)
    return OptimizerValues(float(group["lr"]), float(group.get("weight_decay", 0.0)), **values)


def is_schedule_free(optimizer: Any) -> bool:
    """Whether an optimizer swaps weights for evaluations, as schedule-free ones do; prepared by accelerate or not."""
    inner = getattr(optimizer, "optimizer", optimizer)
    return all(callable(getattr(inner, mode, None)) for mode in ("train", "eval"))


def check_optim_args(args: TrainingArguments) -> None:
    """Refuses `optim_args` that have no effect, or one that no scaling rule accounts for.

    Raises:
        ValueError: naming them, and what may be given.
    """
    name = str(getattr(args.optim, "value", args.optim))
    words = [word for word in (args.optim_args or "").replace(" ", "").split(",") if word]
    known = OPTIM_ARGS.get(name, ())
    unknown = [word for word in words if word.partition("=")[0] not in known or "=" not in word]
    if unknown:
        raise ValueError(
            f"optim_args={args.optim_args!r}: {', '.join(unknown)} is not scaled for optim={name}"
            + (f", which takes {', '.join(f'{key}=...' for key in known)}" if known else "")
            + ". Other values are training arguments, or come with the optimizer itself: optimizers=(optimizer, None)"
        )


def stated_values(args: TrainingArguments, optimizer: str, has: tuple[str, ...]) -> OptimizerValues:
    """The hyper-parameters of the optimizer that Trainer will make from arguments.

    Args:
        args: the run's arguments.
        optimizer: name of the optimizer's family.
        has: its `hyper_parameters`.

    Raises:
        ValueError: for values that no argument states.
    """
    check_optim_args(args)
    if optimizer in OPTIM_ARGS:
        kind, given = Trainer.get_optimizer_cls_and_kwargs(args)
        made = kind([torch.zeros(1, requires_grad=True)], **given, weight_decay=args.weight_decay)
        return reference_values(made.param_groups[0], has)
    group = {"betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon}
    missing = [name for name in has if name not in group]
    if missing:
        raise ValueError(
            f"no training argument states {' and '.join(missing)} of optimizer {optimizer!r}, which its rule scales: "
            "pass the optimizer itself, optimizers=(optimizer, None)"
        )
    return reference_values(group | {"lr": args.learning_rate, "weight_decay": args.weight_decay}, has)
