"""Which rule belongs to which name."""

from __future__ import annotations

import enum
import re
from typing import Any

import pytest
from lamb import LAMBRule

import hf_ema_scaling
from hf_ema_scaling.scaling import (
    AdamRule,
    BatchSchedule,
    OptimizerValues,
    Recipe,
    ScalingPlan,
    ScalingRule,
    known_rule,
    register_scaling_rule,
    scaling_rule,
)


class Names(str, enum.Enum):  # noqa: UP042  (the Trainer's enum is built like this)
    ADAMW_TORCH = "adamw_torch"
    LION = "lion_32bit"


def test_names() -> None:
    assert scaling_rule(Names.ADAMW_TORCH) is scaling_rule("adamw") is scaling_rule("adamw_torch_xla")
    families = {name: scaling_rule(name).name for name in ("none", "sgd", "adam", "rmsprop", "adagrad")}
    assert all(name == family for name, family in families.items())


@pytest.mark.parametrize("name", ["adamw_anyprecision", "adafactor", "NAdam", "adamw_torch_npu_fused", ""])
def test_a_refusal_says_what_is_known_and_how_to_register(name: str) -> None:
    with pytest.raises(ValueError) as error:
        scaling_rule(name)
    message = str(error.value)
    assert f"optimizer '{name}'; known: none, sgd, adam, adamw, adamw_torch, adamw_torch_fused" in message
    assert f"register_scaling_rule('{name}', rule)" in message and "rmsprop, adagrad" in message
    assert known_rule(name) is None


def test_a_registered_rule_is_the_one_a_plan_uses() -> None:
    hf_ema_scaling.register_scaling_rule("Lamb", LAMBRule("lamb"))
    recipe = Recipe(
        reference_batch_size=64,
        unit="samples",
        max_steps=100,
        learning_rate=1e-3,
        ema_momentum=0.9,
        optimizer="Lamb",
        weight_decay=0.1,
        betas=(0.9, 0.99),
    )
    plan = ScalingPlan(recipe, BatchSchedule.constant(256))
    values = plan.step(0)
    assert values.betas == pytest.approx((0.9**4, 0.99**4), rel=1e-14) and values.weight_decay == 0.2
    longer = (1 - 0.9**4) / (1 + 0.9**4) * (1 + 0.9) / (1 - 0.9)
    assert values.learning_rate == pytest.approx(2e-3 * longer**0.5, rel=1e-14)
    assert plan.to_dict()["rule"] == "lamb" and "Rule: lamb." in plan.explain()
    one = LAMBRule("lamb").scale(recipe.optimizer_values(), kappa=1, stage_kappa=1)
    assert one == OptimizerValues(1e-3, 0.1, betas=(0.9, 0.99), eps=1e-8)


def test_tests_do_not_see_what_others_registered() -> None:
    assert known_rule("Lamb") is None


def test_a_name_is_registered_once() -> None:
    register_scaling_rule(Names.LION, AdamRule("lion"))
    assert scaling_rule("lion_32bit").name == "lion"
    for name in ("lion_32bit", "adamw_torch"):
        before = scaling_rule(name)
        with pytest.raises(ValueError, match=f"optimizer '{name}' already has a scaling rule .* replace=True"):
            register_scaling_rule(name, ScalingRule("other"))
        assert scaling_rule(name) is before
        register_scaling_rule(name, ScalingRule("other"), replace=True)
        assert scaling_rule(name).name == "other"
    assert scaling_rule("adamw").name == "adamw"


class Unknown(AdamRule):
    hyper_parameters = ("betas", "weight_decay", "rho")


@pytest.mark.parametrize(
    ("name", "rule", "kind", "message"),
    [
        ("Lamb", LAMBRule, TypeError, "rule must be an instance of ScalingRule, got <class"),
        ("Lamb", lambda values: values, TypeError, "rule must be an instance of ScalingRule"),
        (LAMBRule, LAMBRule("lamb"), TypeError, "name must be the name of an optimizer, got <class"),
        ("", LAMBRule("lamb"), ValueError, "'' cannot be the name of an optimizer"),
        ("none", LAMBRule("lamb"), ValueError, "'none' cannot be the name of an optimizer"),
        ("auto", LAMBRule("lamb"), ValueError, "'auto' cannot be the name of an optimizer"),
        ("Lamb", Unknown("x"), ValueError, "hyper_parameters of Unknown may be .* got ['rho', 'weight_decay']"),
    ],
)
def test_what_cannot_be_registered(name: Any, rule: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=re.escape(message).replace(r"\.\*", ".*")):
        register_scaling_rule(name, rule, replace=True)
