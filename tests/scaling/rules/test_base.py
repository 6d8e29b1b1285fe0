"""What holds for every rule."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from hf_ema_scaling.scaling import OptimizerValues, scaling_rule

RULES = ["none", "sgd", "adam", "adamw", "adamw_torch", "adamw_torch_fused", "adamw_torch_xla", "rmsprop", "adagrad"]
STATE = ["exp_avg", "exp_avg_sq", "max_exp_avg_sq", "step", "momentum_buffer", "square_avg", "grad_avg", "sum"]
ADAM = OptimizerValues(1e-3, 0.1, betas=(0.9, 0.999), eps=1e-8)


@pytest.mark.parametrize("name", RULES)
def test_kappa_one_changes_no_bit(name: str) -> None:
    reference = OptimizerValues(3e-4, 0.07, betas=(0.9, 0.98), eps=1e-6, momentum=0.9, alpha=0.97)
    rule = scaling_rule(name)
    assert rule.scale(reference, kappa=1, stage_kappa=1) == reference
    assert rule.clip_norm(0.3, 1) == 0.3
    before = {key: torch.rand(5) for key in STATE}
    state: dict[str, Any] = {key: tensor.clone() for key, tensor in before.items()}
    rule.rescale_state(state, old_kappa=3, new_kappa=3, reference=reference)
    assert all(torch.equal(state[key], before[key]) for key in STATE)


@pytest.mark.parametrize("name", RULES)
def test_state_that_is_missing_stays_missing(name: str) -> None:
    values = OptimizerValues(3e-4, 0.07, betas=(0.9, 0.98), eps=1e-6, momentum=0.9, alpha=0.97)
    for empty in ({}, dict.fromkeys(STATE)):
        state: dict[str, Any] = dict(empty)
        scaling_rule(name).rescale_state(state, old_kappa=1, new_kappa=2, reference=values)
        assert state == empty


@pytest.mark.parametrize("kappa", [0.25, 3, 64])
@pytest.mark.parametrize("name", RULES)
def test_weight_decay_by_where_it_stands(name: str, kappa: float) -> None:
    """Beside the gradient one step shrinks the weights as kappa steps do; inside it the rest of the rule does it."""
    reference = OptimizerValues(0.02, 0.3, betas=(0.9, 0.98), eps=1e-6, momentum=0.9, alpha=0.97)
    values = scaling_rule(name).scale(reference, kappa=kappa, stage_kappa=kappa)
    if name.startswith("adamw"):
        assert 1 - values.learning_rate * values.weight_decay == pytest.approx((1 - 0.02 * 0.3) ** kappa, rel=1e-12)
    else:
        assert values.weight_decay == 0.3


@pytest.mark.parametrize(
    ("name", "power"), [("none", 0), ("sgd", 0), ("adam", 0.5), ("adamw", 0.5), ("rmsprop", 0.5), ("adagrad", 0.5)]
)
def test_clip_norm(name: str, power: float) -> None:
    for kappa in (0.25, 3.0, 64.0):
        assert scaling_rule(name).clip_norm(0.7, kappa) == pytest.approx(0.7 * kappa**-power, rel=1e-15)


def test_none_changes_nothing_at_any_kappa() -> None:
    rule = scaling_rule("none")
    state: dict[str, Any] = {"step": 3.0, "exp_avg_sq": torch.tensor(1.0, dtype=torch.float64)}
    rule.rescale_state(state, old_kappa=1, new_kappa=8, reference=ADAM)
    assert rule.scale(ADAM, kappa=8, stage_kappa=8) == ADAM and rule.clip_norm(1.0, 8) == 1.0
    assert state["step"] == 3.0 and state["exp_avg_sq"].item() == 1.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"learning_rate": -1.0}, "learning_rate must be a finite number of at least 0, got -1.0"),
        ({"learning_rate": math.nan}, "learning_rate"),
        ({"learning_rate": 1.0, "weight_decay": math.inf}, "weight_decay"),
        ({"learning_rate": 1.0, "betas": (0.9, 1.0)}, r"betas must lie in \[0, 1\), got 1.0"),
        ({"learning_rate": 1.0, "eps": -1e-8}, "eps"),
        ({"learning_rate": 1.0, "momentum": 1.0}, "momentum"),
        ({"learning_rate": 1.0, "alpha": -0.1}, r"alpha must lie in \[0, 1\), got -0.1"),
    ],
)
def test_bad_values_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OptimizerValues(**arguments)


@pytest.mark.parametrize("bad", [0, -1, math.nan])
def test_bad_ratios_are_refused(bad: float) -> None:
    for name in RULES:
        rule = scaling_rule(name)
        with pytest.raises(ValueError, match="kappa must be a finite number above 0"):
            rule.scale(ADAM, kappa=bad, stage_kappa=1)
        with pytest.raises(ValueError, match="kappa must be a finite number above 0"):
            rule.scale(ADAM, kappa=1, stage_kappa=bad)
        with pytest.raises(ValueError, match="kappa must be a finite number above 0"):
            rule.clip_norm(1.0, bad)
        with pytest.raises(ValueError, match="new_kappa must be a finite number above 0"):
            rule.rescale_state({}, old_kappa=1, new_kappa=bad, reference=ADAM)
