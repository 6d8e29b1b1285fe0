"""The rule of SGD in closed form."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hf_ema_scaling.scaling import OptimizerValues, scaling_rule


@pytest.mark.parametrize("kappa", [0.25, 2, 7])
@pytest.mark.parametrize("mu", [0.5, 0.9, 0.999])
def test_sgd_keeps_displacement_and_time_constant(mu: float, kappa: float) -> None:
    values = scaling_rule("sgd").scale(OptimizerValues(0.1, 1e-4, momentum=mu), kappa=kappa, stage_kappa=kappa)
    assert values.momentum is not None
    assert values.momentum == pytest.approx(mu**kappa, rel=1e-15)
    # Displacement per reference step under a constant gradient of 1: lr / (1 - mu), before and after.
    assert values.learning_rate / (1 - values.momentum) / kappa == pytest.approx(0.1 / (1 - mu), rel=1e-11)
    assert values.weight_decay == 1e-4 and scaling_rule("sgd").clip_norm(1.0, kappa) == 1.0


@pytest.mark.parametrize("mu", [None, 0.0])
def test_sgd_without_momentum_is_linear(mu: float | None) -> None:
    values = scaling_rule("sgd").scale(OptimizerValues(0.1, momentum=mu), kappa=3, stage_kappa=8)
    assert values == OptimizerValues(3 * 0.1, momentum=mu)


def test_sgd_buffer_at_a_switch_keeps_the_step() -> None:
    rule, reference = scaling_rule("sgd"), OptimizerValues(0.1, momentum=0.9)
    state: dict[str, Any] = {"momentum_buffer": torch.tensor(5.0, dtype=torch.float64)}
    rule.rescale_state(state, old_kappa=2, new_kappa=6, reference=reference)
    before = rule.scale(reference, kappa=2, stage_kappa=2).learning_rate * 5.0 / 2
    after = rule.scale(reference, kappa=6, stage_kappa=6).learning_rate * state["momentum_buffer"].item() / 6
    assert after == pytest.approx(before, rel=1e-14)
    state = {"momentum_buffer": None}
    rule.rescale_state(state, old_kappa=2, new_kappa=6, reference=reference)
    assert state == {"momentum_buffer": None}


def moved(
    mu: float, kappa: float, gradients: list[float], *, nesterov: bool, switch: tuple[int, float] | None = None
) -> list[float]:
    """Displacement of a weight by each of torch's steps at learning rate 0.1; at a switch, from step n to kappa q."""
    rule, reference = scaling_rule("sgd"), OptimizerValues(0.1, momentum=mu)
    weight = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer = torch.optim.SGD([weight], lr=0.1, momentum=mu, nesterov=nesterov)
    before, steps = 0.0, []
    for number, gradient in enumerate(gradients):
        if switch is not None and number == switch[0]:
            rule.rescale_state(optimizer.state[weight], old_kappa=kappa, new_kappa=switch[1], reference=reference)
            kappa = switch[1]
        values = rule.scale(reference, kappa=kappa, stage_kappa=kappa)
        optimizer.param_groups[0].update(lr=values.learning_rate, momentum=values.momentum)
        weight.grad = torch.tensor([-gradient], dtype=torch.float64)
        optimizer.step()
        steps.append(weight.item() - before)
        before = weight.item()
    return steps


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("kappa", [0.5, 1.0, 2.0, 4.0])
def test_from_an_empty_buffer(nesterov: bool, kappa: float) -> None:
    mu, data = 0.9, 24
    steps = moved(mu, kappa, [1.0] * int(data / kappa), nesterov=nesterov)
    spent = mu ** (2 * kappa if nesterov else kappa)
    # What the buffer still owes: at kappa 1, mu (1 - mu ** T) / (1 - mu), and mu ** 2 for mu with Nesterov.
    owed = kappa * spent * (1 - mu**data) / (1 - mu**kappa)
    assert sum(steps) == pytest.approx(0.1 / (1 - mu) * (data - owed), rel=1e-12)


@pytest.mark.parametrize(("nesterov", "ahead"), [(False, 0.5), (True, 1.5)])
def test_how_far_a_scaled_start_is_ahead(nesterov: bool, ahead: float) -> None:
    mu, data = 0.99, 1600
    total = {
        kappa: sum(moved(mu, kappa, [1.0] * (data // int(kappa)), nesterov=nesterov)) * (1 - mu) / 0.1
        for kappa in (1.0, 4.0)
    }
    assert total[4.0] - total[1.0] == pytest.approx(ahead * 3, rel=0.05)


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("kappa", [0.25, 1.0, 4.0])
def test_every_gradient_moves_the_weights_alike_in_all(nesterov: bool, kappa: float) -> None:
    steps = moved(0.9, kappa, [1.0] + [0.0] * int(400 / kappa), nesterov=nesterov)
    assert sum(steps) == pytest.approx(kappa * 0.1 / (1 - 0.9), rel=1e-12)


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize(("old", "new"), [(1.0, 4.0), (4.0, 1.0), (1.0, 0.25)])
def test_the_displacement_per_unit_of_data_stays_at_a_switch(nesterov: bool, old: float, new: float) -> None:
    before = int(400 / old)
    steps = moved(0.9, old, [1.0] * (before + 5), nesterov=nesterov, switch=(before, new))
    assert steps[before - 1] / old == pytest.approx(1.0, rel=1e-12)
    assert [step / new for step in steps[before:]] == pytest.approx([1.0] * 5, rel=1e-12)
