"""Every optimizer of the Trainer: which have a rule, what they begin with, which are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from lamb import Lamb, LAMBRule
from transformers import Trainer
from transformers.training_args import OptimizerNames

from hf_ema_scaling import EMATrainer, register_scaling_rule
from hf_ema_scaling.scaling import AdamRule, AdamWRule, OptimizerValues, SGDRule, known_rule, scaling_rule
from hf_ema_scaling.training.optimizer_values import hyper_parameters, reference_values, stated_values
from hf_ema_scaling.training.run_state import OPTIMIZER_FAMILIES, RunState, optimizer_family

RULES = {
    "adamw_torch": "adamw",
    "adamw_torch_fused": "adamw",
    "adamw_torch_xla": "adamw",
    "sgd": "sgd",
    "rmsprop": "rmsprop",
    "adagrad": "adagrad",
}


def test_the_trainers_names_with_a_rule() -> None:
    found = {name.value: known_rule(name) for name in OptimizerNames}
    assert {name: rule.name for name, rule in found.items() if rule is not None} == RULES


# torch_xla is not there.
@pytest.mark.parametrize("name", [name for name in RULES if name != "adamw_torch_xla"])
def test_what_trainer_makes_is_what_the_plan_states(tmp_path: Path, name: str) -> None:
    args = tiny.arguments(
        tmp_path, optim=name, weight_decay=0.07, adam_beta1=0.8, adam_beta2=0.95, adam_epsilon=1e-5, kappa=4.0
    )
    made = EMATrainer(tiny.bert(), args, train_dataset=tiny.sentences(8))
    kind, options = Trainer.get_optimizer_cls_and_kwargs(args)
    assert scaling_rule(OPTIMIZER_FAMILIES[kind]) is scaling_rule(name)
    weights = [{"params": [torch.zeros(1, requires_grad=True)], "weight_decay": args.weight_decay}]
    (group,) = kind(weights, **options).param_groups
    has = scaling_rule(name).hyper_parameters
    assert stated_values(args, name, has) == reference_values(group, has) == made.plan.recipe.optimizer_values()
    assert made.plan.recipe.optimizer_values().weight_decay == 0.07
    assert reference_values(made.create_optimizer().param_groups[0], has) == stated_values(args, name, has)


@pytest.mark.parametrize(
    ("name", "text", "stated"),
    [
        ("sgd", "momentum=0.9, nesterov=true", {"momentum": 0.9}),
        ("rmsprop", "alpha=0.9,eps=1e-6,momentum=0.5", {"alpha": 0.9, "eps": 1e-6, "momentum": 0.5}),
        ("adagrad", "eps=1e-7", {"eps": 1e-7}),
    ],
)
def test_optim_args_are_part_of_the_reference(tmp_path: Path, name: str, text: str, stated: dict[str, float]) -> None:
    args = tiny.arguments(tmp_path, optim=name, optim_args=text, kappa=4.0, weight_decay=0.07)
    made = EMATrainer(tiny.bert(), args, train_dataset=tiny.sentences(8))
    values = made.plan.recipe.optimizer_values()
    assert {key: getattr(values, key) for key in stated} == stated and values.weight_decay == 0.07
    group = made.create_optimizer().param_groups[0]
    assert reference_values(group, scaling_rule(name).hyper_parameters) == values
    assert group.get("nesterov", False) == ("nesterov" in text)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("sgd", "momentum=0.9,dampening=0.5", "dampening=0.5 is not scaled for optim=sgd, which takes momentum=..."),
        ("sgd", "weight_decay=0.1", "weight_decay=0.1 is not scaled"),
        ("adagrad", "lr_decay=0.1", "lr_decay=0.1 is not scaled"),
        ("sgd", "momentum", "momentum is not scaled"),
        ("adamw_torch", "momentum=0.9", r"optim=adamw_torch\. Other values are training arguments"),
    ],
)
def test_optim_args_without_effect_or_rule_are_refused(tmp_path: Path, name: str, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EMATrainer(tiny.bert(), tiny.arguments(tmp_path, optim=name, optim_args=text), train_dataset=tiny.sentences(8))


def test_optim_args_beside_an_optimizer_are_refused(tmp_path: Path) -> None:
    model = tiny.bert()
    passed = torch.optim.SGD(model.parameters(), lr=0.1)
    args = tiny.arguments(tmp_path, optim="sgd", optim_args="momentum=0.9")
    with pytest.raises(ValueError, match="no effect on the optimizer that was passed"):
        EMATrainer(model, args, train_dataset=tiny.sentences(8), optimizers=(passed, None))


@pytest.mark.parametrize("name", [name.value for name in OptimizerNames if name.value not in RULES])
def test_all_others_are_refused_with_the_way_out(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match=rf"no scaling rule for optimizer '{name}'; known: .*register_scaling_rule"):
        EMATrainer(tiny.bert(), tiny.arguments(tmp_path, optim=name), train_dataset=tiny.sentences(8))


class Other(torch.optim.AdamW):
    pass


@pytest.mark.parametrize(
    "kind", [torch.optim.NAdam, torch.optim.RAdam, torch.optim.Adamax, torch.optim.Adadelta, Other, Lamb]
)
def test_only_exact_types_belong_to_a_family(tmp_path: Path, kind: Any) -> None:
    model = tiny.bert()
    with pytest.raises(ValueError, match=rf"optimizer '{kind.__name__}'; .*_scaling_rule\('{kind.__name__}', rule\)"):
        EMATrainer(
            model,
            tiny.arguments(tmp_path),
            train_dataset=tiny.sentences(8),
            optimizers=(kind(model.parameters()), None),
        )
    # The way out works.
    register_scaling_rule(kind.__name__, LAMBRule("mine"))
    assert optimizer_family("adamw_torch", kind(model.parameters())) == kind.__name__


def test_families_of_optimizers() -> None:
    weights = [torch.zeros(1, requires_grad=True)]
    for kind, family in OPTIMIZER_FAMILIES.items():
        assert optimizer_family("adamw_torch", kind(weights, lr=0.1)) == family  # type: ignore[call-arg]
    with pytest.raises(ValueError, match=r"lr_decay has no scaling rule.*choose lr_scheduler_type"):
        optimizer_family("adagrad", torch.optim.Adagrad(weights, lr_decay=0.1))
    # A rule of one's own for a class of torch is not passed over.
    register_scaling_rule("SGD", SGDRule("mine"))
    assert optimizer_family("adamw_torch", torch.optim.SGD(weights, dampening=0.5)) == "SGD"


def test_only_what_the_rule_names_is_read() -> None:
    group = {"lr": 0.1, "weight_decay": 0.2, "betas": (0.9, 0.99, 0.9999), "alpha": 5.0, "eps": (1e-30, 1e-3)}
    assert reference_values(group, ()) == OptimizerValues(0.1, 0.2)
    with pytest.raises(ValueError, match="param groups have no momentum, which its scaling rule names"):
        reference_values(group, ("momentum", "alpha"))
    assert hyper_parameters("rmsprop", "none") == hyper_parameters("rmsprop", "auto") == ("alpha", "eps", "momentum")
    assert hyper_parameters("adafactor", "none") == ()
    assert hyper_parameters("paged_adamw_32bit", "adamw") == ("betas", "eps")


def test_registered_names_of_the_trainer(tmp_path: Path) -> None:
    args = tiny.arguments(tmp_path, optim="adamw_anyprecision", adam_beta2=0.95, kappa=4.0)
    register_scaling_rule("adamw_anyprecision", AdamWRule("adamw"))
    made = EMATrainer(tiny.bert(), args, train_dataset=tiny.sentences(8))
    assert made.plan.step(0).betas == pytest.approx((0.9**4, 0.95**4))

    class Stranger(AdamRule):
        hyper_parameters = ("betas", "alpha")

    register_scaling_rule("adamw_anyprecision", Stranger("stranger"), replace=True)
    with pytest.raises(ValueError, match="no training argument states alpha of optimizer 'adamw_anyprecision'"):
        EMATrainer(tiny.bert(), args, train_dataset=tiny.sentences(8))


def test_a_value_that_checkpoints_did_not_have_yet_is_no_change() -> None:
    state = RunState(1, 1.0, [], {}, {"learning_rate": 0.1})
    assert state.changed_values({"learning_rate": 0.2, "alpha": 0.99}) == {"learning_rate": (0.1, 0.2)}
