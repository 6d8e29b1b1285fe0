"""The rules of Adam and AdamW in closed form."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from hf_ema_scaling.scaling import OptimizerValues, scaling_rule

ADAM = OptimizerValues(1e-3, 0.1, betas=(0.9, 0.999), eps=1e-8)
KAPPAS = [0.125, 0.5, 3, 8, 64, 1024]


@pytest.mark.parametrize("kappa", KAPPAS)
def test_adam(kappa: float) -> None:
    values = scaling_rule("adam").scale(ADAM, kappa=kappa, stage_kappa=kappa)
    assert values.learning_rate == pytest.approx(1e-3 * math.sqrt(kappa), rel=1e-15)
    assert values.betas == pytest.approx((0.9**kappa, 0.999**kappa), rel=1e-14)
    assert values.eps == pytest.approx(1e-8 / math.sqrt(kappa), rel=1e-15)
    assert values.weight_decay == 0.1
    assert scaling_rule("adam").clip_norm(1.0, kappa) == pytest.approx(kappa**-0.5, rel=1e-15)


def test_step_kappa_and_stage_kappa_govern_different_values() -> None:
    short = scaling_rule("adamw").scale(ADAM, kappa=6, stage_kappa=8)
    full = scaling_rule("adamw").scale(ADAM, kappa=8, stage_kappa=8)
    assert (short.betas, short.eps) == (full.betas, full.eps)
    # The second moment is that of the stage, so the way is in proportion to the data.
    assert short.learning_rate == pytest.approx(1e-3 * math.sqrt(8) * 6 / 8, rel=1e-15)
    assert 1 - short.learning_rate * short.weight_decay == pytest.approx((1 - 1e-4) ** 6, rel=1e-15)
    still = scaling_rule("adamw").scale(OptimizerValues(0.0, 0.1), kappa=6, stage_kappa=8)
    assert still.weight_decay == pytest.approx(0.1 * math.sqrt(8), rel=1e-15)
    one = scaling_rule("adamw").scale(ADAM, kappa=1, stage_kappa=8)
    assert 1 - one.learning_rate * one.weight_decay == pytest.approx(1 - 1e-4, rel=1e-15)


@pytest.mark.parametrize("kappa", KAPPAS)
@pytest.mark.parametrize("learning_rate", [1e-320, 1e-300, 1e-12, 1e-6, 1e-3, 0.1, 5.0])
def test_adamw_decay_identity(kappa: float, learning_rate: float) -> None:
    values = scaling_rule("adamw").scale(OptimizerValues(learning_rate, 0.1), kappa=kappa, stage_kappa=kappa)
    shrink = learning_rate * 0.1
    assert 1 - values.learning_rate * values.weight_decay == pytest.approx((1 - shrink) ** kappa, rel=1e-12)
    # In the small: the share lost, not 1 minus it.
    lost = -math.expm1(kappa * math.log1p(-shrink))
    if learning_rate > 1e-310:
        assert values.learning_rate * values.weight_decay == pytest.approx(lost, rel=1e-12, abs=0)
    if learning_rate < 1e-200:
        assert values.weight_decay == pytest.approx(math.sqrt(kappa) * 0.1, rel=1e-12)


def test_adamw_numbers_and_limits() -> None:
    rule = scaling_rule("adamw_torch")
    assert rule.scale(ADAM, kappa=1024, stage_kappa=1024).weight_decay == pytest.approx(3.04, abs=5e-3)
    at_zero = rule.scale(OptimizerValues(0.0, 0.1), kappa=16, stage_kappa=16)
    assert (at_zero.learning_rate, at_zero.weight_decay) == (0.0, 0.4)
    assert rule.scale(OptimizerValues(1e-3, 0.0), kappa=16, stage_kappa=16).weight_decay == 0.0
    for kappa in (1, 8):
        with pytest.raises(ValueError, match=r"learning_rate \* weight_decay is 1 .* must be below 1"):
            rule.scale(OptimizerValues(2.0, 0.5), kappa=kappa, stage_kappa=kappa)
    assert scaling_rule("adam").scale(OptimizerValues(2.0, 0.5), kappa=4, stage_kappa=4).weight_decay == 0.5


@pytest.mark.parametrize(("old", "new"), [(1.0, 4.0), (4.0, 1.0), (2.0, 3.0)])
@pytest.mark.parametrize("tensor_step", [True, False])
def test_adam_state_at_a_switch(old: float, new: float, tensor_step: bool) -> None:
    rule = scaling_rule("adamw")
    state: dict[str, Any] = {
        "step": torch.tensor(600.0, dtype=torch.float64) if tensor_step else 600.0,
        "exp_avg": torch.tensor(7.0, dtype=torch.float64),
        "exp_avg_sq": torch.tensor(12.0, dtype=torch.float64),
        "max_exp_avg_sq": torch.tensor(24.0, dtype=torch.float64),
    }
    second, largest = state["exp_avg_sq"], state["max_exp_avg_sq"]
    rule.rescale_state(state, old_kappa=old, new_kappa=new, reference=ADAM)
    step = state["step"].item() if tensor_step else state["step"]
    before = rule.scale(ADAM, kappa=old, stage_kappa=old).betas
    after = rule.scale(ADAM, kappa=new, stage_kappa=new).betas
    assert before is not None and after is not None
    for beta_before, beta_after in zip(before, after, strict=True):
        assert beta_after**step == pytest.approx(beta_before**600, rel=1e-12)
    assert state["exp_avg_sq"] is second and second.item() == pytest.approx(12 * old / new, rel=1e-15)
    assert state["max_exp_avg_sq"] is largest and largest.item() == pytest.approx(24 * old / new, rel=1e-15)
    assert state["exp_avg"].item() == 7.0


@pytest.mark.parametrize("options", [{"foreach": False}, {"foreach": True}, {"fused": True}])
@pytest.mark.parametrize("ratio", [4.0, 0.25])
def test_torch_adamw_takes_the_right_step_at_once_after_a_switch(ratio: float, options: dict[str, bool]) -> None:
    # Pure noise of variance 1 / kappa: the bias-corrected second moment must be 1 / kappa right after the switch.
    rule, reference = scaling_rule("adamw"), OptimizerValues(1e-3, betas=(0.9, 0.999), eps=1e-8)
    parameter = torch.nn.Parameter(torch.zeros(3))
    optimizer = torch.optim.AdamW([parameter], lr=1e-3, weight_decay=0.0, betas=(0.9, 0.999), **options)
    sign = 1.0
    for t in range(120):
        kappa = 1.0 if t < 100 else ratio
        if t == 100:
            rule.rescale_state(optimizer.state[parameter], old_kappa=1.0, new_kappa=ratio, reference=reference)
            values = rule.scale(reference, kappa=ratio, stage_kappa=ratio)
            optimizer.param_groups[0].update(lr=values.learning_rate, betas=values.betas, eps=values.eps)
        sign = -sign
        parameter.grad = torch.full((3,), sign / math.sqrt(kappa))
        optimizer.step()
        state = optimizer.state[parameter]
        corrected = state["exp_avg_sq"] / (1 - optimizer.param_groups[0]["betas"][1] ** float(state["step"]))
        assert corrected.tolist() == pytest.approx([1 / kappa] * 3, rel=1e-4)
    assert float(state["step"]) == pytest.approx(100 / ratio + 20)


def test_adam_state_that_is_empty_stays_empty() -> None:
    state: dict[str, Any] = {}
    scaling_rule("adamw").rescale_state(state, old_kappa=1, new_kappa=2, reference=ADAM)
    assert state == {}
