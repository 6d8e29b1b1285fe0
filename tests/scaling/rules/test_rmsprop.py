"""The rule of RMSprop in closed form."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from hf_ema_scaling.scaling import OptimizerValues, scaling_rule

RULE = scaling_rule("rmsprop")
REFERENCE = OptimizerValues(1e-3, 0.1, alpha=0.99, eps=1e-6, momentum=0.9)
SWITCHES = [(1.0, 4.0), (4.0, 1.0), (1.0, 0.25), (2.0, 3.0)]


@pytest.mark.parametrize("kappa", [0.125, 3, 8, 64])
def test_values(kappa: float) -> None:
    values = RULE.scale(REFERENCE, kappa=kappa, stage_kappa=kappa)
    assert values.alpha == pytest.approx(0.99**kappa, rel=1e-14)
    assert values.eps == pytest.approx(1e-6 / math.sqrt(kappa), rel=1e-15)
    assert values.momentum == pytest.approx(0.9**kappa, rel=1e-14)
    # Each normalised gradient moves the weights by lr / (1 - mu) in all.
    assert values.learning_rate / (1 - 0.9**kappa) == pytest.approx(math.sqrt(kappa) * 1e-3 / (1 - 0.9), rel=1e-12)
    assert (values.weight_decay, values.betas) == (0.1, None)


@pytest.mark.parametrize("momentum", [None, 0.0])
def test_values_without_momentum(momentum: float | None) -> None:
    values = RULE.scale(OptimizerValues(1e-3, alpha=0.9, momentum=momentum), kappa=16, stage_kappa=16)
    assert values == OptimizerValues(4e-3, alpha=0.9**16, momentum=momentum)


def test_a_step_with_less_data_moves_less_and_keeps_the_memory_of_its_stage() -> None:
    short, full = RULE.scale(REFERENCE, kappa=6, stage_kappa=8), RULE.scale(REFERENCE, kappa=8, stage_kappa=8)
    assert (short.alpha, short.eps, short.momentum) == (full.alpha, full.eps, full.momentum)
    assert short.learning_rate == pytest.approx(full.learning_rate * 6 / 8, rel=1e-15)


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize(("old", "new"), SWITCHES)
def test_torch_takes_the_right_step_at_once_after_a_switch(old: float, new: float, foreach: bool) -> None:
    """Pure noise of variance 1 / kappa: the square average is that, times how far it has filled in the data seen."""
    weight = torch.nn.Parameter(torch.zeros(3, dtype=torch.float64))
    optimizer = torch.optim.RMSprop([weight], lr=1e-3, alpha=0.99, eps=1e-6, foreach=foreach)
    state, reference = optimizer.state[weight], OptimizerValues(1e-3, alpha=0.99, eps=1e-6, momentum=0.0)
    clock, sign, kappa = 0.0, 1.0, old
    for t in range(100):
        if t == 60:
            RULE.rescale_state(state, old_kappa=old, new_kappa=new, reference=reference)
            kappa = new
        values = RULE.scale(reference, kappa=kappa, stage_kappa=kappa)
        optimizer.param_groups[0].update(lr=values.learning_rate, alpha=values.alpha, eps=values.eps)
        clock, sign, before = clock + kappa, -sign, weight.detach().clone()
        weight.grad = torch.full((3,), sign / math.sqrt(kappa), dtype=torch.float64)
        optimizer.step()
        full = math.sqrt(1 - 0.99**clock)
        assert state["square_avg"].tolist() == pytest.approx([full**2 / kappa] * 3, rel=1e-12)
        # As long as sqrt(kappa) steps of the reference, eps included.
        step = -sign * math.sqrt(kappa) * 1e-3 / (full + 1e-6)
        assert (weight - before).tolist() == pytest.approx([step] * 3, rel=1e-9)


@pytest.mark.parametrize(("old", "new"), SWITCHES)
def test_centered_divides_the_variance_and_keeps_the_mean(old: float, new: float) -> None:
    mean = torch.tensor([0.0, -0.5, 2.0], dtype=torch.float64)
    variance = torch.tensor([1.0, 3.0, 0.1], dtype=torch.float64)
    state: dict[str, Any] = {"square_avg": variance + mean**2, "grad_avg": mean.clone()}
    RULE.rescale_state(state, old_kappa=old, new_kappa=new, reference=REFERENCE)
    assert torch.equal(state["grad_avg"], mean)
    assert (state["square_avg"] - mean**2).tolist() == pytest.approx((variance * old / new).tolist(), rel=1e-12)


@pytest.mark.parametrize("foreach", [False, True])
def test_centered_survives_a_switch_where_the_mean_dominates(foreach: bool) -> None:
    # Divided as a whole, the square average would be below the squared mean: its root would be no number.
    weight = torch.nn.Parameter(torch.zeros(100))
    optimizer = torch.optim.RMSprop([weight], lr=1e-3, eps=1e-3, centered=True, foreach=foreach)
    generator = torch.Generator().manual_seed(0)
    for t in range(600):
        if t == 500:
            RULE.rescale_state(optimizer.state[weight], old_kappa=1, new_kappa=8, reference=REFERENCE)
            optimizer.param_groups[0]["alpha"] = 0.99**8
        weight.grad = 1 + 0.1 * torch.randn(100, generator=generator)
        optimizer.step()
        assert bool(weight.isfinite().all())


@pytest.mark.parametrize(("old", "new"), SWITCHES)
def test_the_buffer_keeps_the_displacement_per_unit_of_data(old: float, new: float) -> None:
    state: dict[str, Any] = {"momentum_buffer": torch.tensor(5.0, dtype=torch.float64)}
    RULE.rescale_state(state, old_kappa=old, new_kappa=new, reference=REFERENCE)
    before = RULE.scale(REFERENCE, kappa=old, stage_kappa=old).learning_rate * 5.0 / old
    after = RULE.scale(REFERENCE, kappa=new, stage_kappa=new).learning_rate * state["momentum_buffer"].item() / new
    assert after == pytest.approx(before, rel=1e-13) and state["momentum_buffer"].item() != 5.0
