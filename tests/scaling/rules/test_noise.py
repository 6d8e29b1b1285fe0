"""Every rule against torch's own optimizer, fed with noise: the same data must move the weights alike at any batch.

20,000 weights see the same small mean gradient and noise of variance 1 / kappa, for 128 reference steps after 128 of
warming up. What is compared is the mean of their displacements (what the mean gradient and the weight decay do) and
its standard deviation (what the noise does). The draws leave 1 % of sampling error; what else is left is of the order
of kappa times one minus a decay rate, and of the squared mean gradient over the noise variance.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from lamb import Lamb, LAMBRule

from hf_ema_scaling.scaling import register_scaling_rule, scaling_rule
from hf_ema_scaling.training.optimizer_values import reference_values

WEIGHTS, STEPS, DRIFT = 20_000, 128, 0.05
Make = Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]
Part = tuple[float, float]
"""Kappa, and reference steps at it."""
CASES: dict[str, tuple[str, Make]] = {
    "sgd": ("sgd", lambda p: torch.optim.SGD(p, lr=1e-3, weight_decay=0.03)),
    "momentum": ("sgd", lambda p: torch.optim.SGD(p, lr=1e-3, momentum=0.9)),
    "nesterov": ("sgd", lambda p: torch.optim.SGD(p, lr=1e-3, momentum=0.9, nesterov=True)),
    "adam": ("adam", lambda p: torch.optim.Adam(p, lr=1e-3, betas=(0.9, 0.99), eps=0.5, weight_decay=0.03)),
    "adamw": ("adamw", lambda p: torch.optim.AdamW(p, lr=1e-3, betas=(0.9, 0.99), eps=0.5, weight_decay=0.03)),
    "rmsprop": ("rmsprop", lambda p: torch.optim.RMSprop(p, lr=1e-3, eps=0.5, weight_decay=0.03)),
    "rmsprop, momentum": ("rmsprop", lambda p: torch.optim.RMSprop(p, lr=1e-3, momentum=0.9)),
    "rmsprop, centered": ("rmsprop", lambda p: torch.optim.RMSprop(p, lr=1e-3, momentum=0.5, centered=True)),
    # The root of the sum is 11 after the warm-up.
    "adagrad": ("adagrad", lambda p: torch.optim.Adagrad(p, lr=1e-2, eps=8.0, weight_decay=0.03)),
    "adagrad, initial": ("adagrad", lambda p: torch.optim.Adagrad(p, lr=1e-2, initial_accumulator_value=100.0)),
    "lamb": ("Lamb", lambda p: Lamb(p, lr=1e-3, betas=(0.9, 0.99), eps=0.0, weight_decay=0.03)),
}
# Stages of warm-up and measurement: the reference, both switches, below the reference, and no switch.
LAYOUTS = [(1.0, 4.0), (4.0, 1.0), (1.0, 0.25), (4.0, 4.0)]


def displacement(
    case: str, warm_up: Sequence[Part], measured: Sequence[Part], *, scaled: bool = True
) -> tuple[float, float]:
    name, make = CASES[case]
    register_scaling_rule("Lamb", LAMBRule("lamb"), replace=True)
    rule = scaling_rule(name)
    generator = torch.Generator().manual_seed(7)
    weights = torch.nn.Parameter(torch.ones(WEIGHTS))
    optimizer = make([weights])
    (group,) = optimizer.param_groups
    reference = reference_values(group, rule.hyper_parameters)
    before, start = 1.0, weights
    for number, (kappa, steps) in enumerate([*warm_up, *measured]):
        if scaled:
            rule.rescale_state(optimizer.state[weights], old_kappa=before, new_kappa=kappa, reference=reference)
            values = rule.scale(reference, kappa=kappa, stage_kappa=kappa)
            group.update({key: getattr(values, key) for key in ("weight_decay", *rule.hyper_parameters)})
            group["lr"] = values.learning_rate
        if number == len(warm_up):
            start = weights.detach().clone()
        for _ in range(int(steps / kappa)):
            noise = torch.randn(WEIGHTS // 2, generator=generator) / math.sqrt(kappa)
            # Each draw with both signs, so that noise all but cancels in the mean.
            weights.grad = DRIFT + torch.cat((noise, -noise))
            optimizer.step()
        before = kappa
    moved = weights.detach() - start
    return float(moved.mean()), float(moved.std())


@pytest.fixture(scope="module")
def reference() -> Callable[[str], Any]:
    found: dict[str, tuple[float, float]] = {}

    def get(case: str) -> tuple[float, float]:
        if case not in found:
            found[case] = displacement(case, [(1.0, STEPS)], [(1.0, STEPS)])
        return found[case]

    return get


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_the_same_data_move_the_weights_alike(case: str, layout: tuple[float, float], reference: Any) -> None:
    mean, deviation = reference(case)
    first, second = layout
    moved = displacement(case, [(first, STEPS)], [(second, STEPS)])
    assert moved == pytest.approx((mean, deviation), rel=0.04)


@pytest.mark.parametrize("case", CASES)
def test_a_step_that_is_cut_short_is_a_switch_and_one_back(case: str) -> None:
    """One of 1 among steps of 8: right behind it, Adam's second moment would be twice what it has to be."""
    mean, deviation = displacement(case, [(1.0, STEPS + 1)], [(1.0, 32)])
    cut = displacement(case, [(8.0, STEPS), (1.0, 1.0)], [(8.0, 32)])
    assert cut == pytest.approx((mean, deviation), rel=0.1)


@pytest.mark.parametrize("case", CASES)
def test_without_the_rule_they_do_not(case: str, reference: Any) -> None:
    mean, deviation = reference(case)
    larger, noise = displacement(case, [(1.0, STEPS)], [(4.0, STEPS)], scaled=False)
    assert larger / mean < 0.6 and noise / deviation < 0.6
