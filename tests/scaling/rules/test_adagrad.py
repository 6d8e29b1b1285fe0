"""The rule of Adagrad in closed form."""

from __future__ import annotations

import math

import pytest
import torch

from hf_ema_scaling.scaling import OptimizerValues, scaling_rule

RULE = scaling_rule("adagrad")


@pytest.mark.parametrize("kappa", [0.125, 3, 8, 1024])
def test_values(kappa: float) -> None:
    values = RULE.scale(OptimizerValues(0.03, 0.1, eps=1e-4), kappa=kappa, stage_kappa=kappa)
    assert values == OptimizerValues(0.03, 0.1, eps=1e-4 / kappa)
    # A quarter of the data of a whole step: a quarter of the displacement.
    short = RULE.scale(OptimizerValues(0.03, 0.1, eps=1e-4), kappa=kappa / 4, stage_kappa=kappa)
    assert short == OptimizerValues(0.03 / 4, 0.1, eps=1e-4 / kappa)


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("initial", [0.0, 7.0])
@pytest.mark.parametrize(("first", "second"), [(1.0, 4.0), (4.0, 1.0), (1.0, 0.25), (2.0, 3.0)])
def test_torch_takes_the_right_step_at_once_after_a_switch(
    first: float, second: float, initial: float, foreach: bool
) -> None:
    """Pure noise of variance 1 / kappa: at any batch the sum is that of the reference steps over kappa squared."""
    weight = torch.nn.Parameter(torch.zeros(3, dtype=torch.float64))
    optimizer = torch.optim.Adagrad(
        [weight], lr=0.03, eps=0.5, initial_accumulator_value=initial, foreach=foreach, lr_decay=0
    )
    state, reference = optimizer.state[weight], OptimizerValues(0.03, eps=0.5)
    clock, sign, kappa = 0.0, 1.0, 1.0
    for t in range(60):
        if t in (0, 40):
            new = first if t == 0 else second
            RULE.rescale_state(state, old_kappa=kappa, new_kappa=new, reference=reference)
            kappa = new
        values = RULE.scale(reference, kappa=kappa, stage_kappa=kappa)
        optimizer.param_groups[0].update(lr=values.learning_rate, eps=values.eps)
        clock, sign, before = clock + kappa, -sign, weight.detach().clone()
        weight.grad = torch.full((3,), sign / math.sqrt(kappa), dtype=torch.float64)
        optimizer.step()
        assert state["sum"].tolist() == pytest.approx([(initial + clock) / kappa**2] * 3, rel=1e-12)
        # As long as sqrt(kappa) steps of the reference at this moment, eps included.
        step = -sign * math.sqrt(kappa) * 0.03 / (math.sqrt(initial + clock) + 0.5)
        assert (weight - before).tolist() == pytest.approx([step] * 3, rel=1e-12)


def test_first_steps_are_as_long_as_the_learning_rate_at_any_batch() -> None:
    """What a start above the reference batch takes away: lr ** 2 * log(kappa) of variance."""
    draws, steps = 4000, 400
    variance = {}
    for kappa in (1, 8):
        generator = torch.Generator().manual_seed(kappa)
        weight = torch.nn.Parameter(torch.zeros(draws))
        optimizer = torch.optim.Adagrad([weight], lr=1.0)
        for _ in range(steps // kappa):
            weight.grad = torch.randn(draws, generator=generator)
            optimizer.step()
        variance[kappa] = float(weight.detach().var())
    harmonic = {kappa: sum(1 / t for t in range(1, steps // kappa + 1)) for kappa in (1, 8)}
    assert variance == pytest.approx(harmonic, rel=0.08)
    assert harmonic[1] - harmonic[8] == pytest.approx(math.log(8), rel=0.01)
