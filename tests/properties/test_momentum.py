"""The average decays alike however the same data is cut into steps."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from random_runs import recipe_of, runs
from torch import nn

from hf_ema_scaling.data.sampler import SampledStep
from hf_ema_scaling.ema import WeightAverage
from hf_ema_scaling.scaling import ScalingPlan, path_correction, scale_momentum
from hf_ema_scaling.scaling.momentum_schedule import MomentumSchedule
from hf_ema_scaling.training.average_update import AverageMover

RELATIVE = 1e-9
MOMENTA = st.sampled_from([0.5, 0.9, 0.999, 0.999999, 1e-6]) | st.floats(1e-6, 1 - 1e-7)


@st.composite
def partitions(draw: st.DrawFn, steps: float) -> list[float]:
    """Borders from 0 to `steps`."""
    inner = draw(st.lists(st.floats(0, steps), max_size=30))
    return sorted({0.0, float(steps), *inner})


@given(st.data(), MOMENTA, st.integers(1, 300))
def test_scaled_momenta_of_any_kappas_multiply_to_that_of_their_sum(data: Any, rho: float, steps: int) -> None:
    kappas = [end - start for start, end in pairwise(data.draw(partitions(steps)))]
    logs = [math.log(momentum) for kappa in kappas if (momentum := scale_momentum(rho, kappa)) > 1e-300]
    expected = math.fsum(kappa * math.log(rho) for kappa in kappas if kappa * math.log(rho) > math.log(1e-300))
    # A momentum near 1 is a rounded number itself: its logarithm has the absolute precision of 1.
    assert math.fsum(logs) == pytest.approx(expected, rel=RELATIVE, abs=2e-16 * len(kappas))


@given(st.data(), MOMENTA, st.sampled_from(["constant", "cosine"]), st.integers(1, 300), st.floats(0, 1))
def test_every_partition_decays_like_the_reference_steps(
    data: Any, rho: float, kind: Any, steps: int, share: float
) -> None:
    schedule = MomentumSchedule(rho, kind, steps + share if kind == "cosine" else math.inf)
    reference = math.fsum(schedule.log_at(k) for k in range(steps))
    borders = data.draw(partitions(steps))
    found = math.fsum(schedule.log_momentum(start, end) for start, end in pairwise(borders))
    assert found == pytest.approx(reference, rel=RELATIVE)
    # And by BYOL's formula as it is written, to the digits that it keeps.
    if kind == "cosine":
        cosines = [(math.cos(math.pi * k / (steps + share)) + 1) / 2 for k in range(steps)]
        plain = math.fsum(math.log(1 - (1 - rho) * value) for value in cosines)
        assert found == pytest.approx(plain, rel=1e-6, abs=1e-13 * steps)


@given(runs(), st.data(), MOMENTA, st.sampled_from(["constant", "cosine"]))
def test_two_schedules_of_a_plan_decay_alike_after_ema_start(run: Any, data: Any, rho: float, kind: Any) -> None:
    start = data.draw(st.just(0.0) | st.floats(0, run["steps"] - 0.5))
    recipe = recipe_of(run, ema_momentum=rho, ema_start=start, momentum_schedule=kind)
    left = []
    for schedule in run["schedules"]:
        plan = ScalingPlan(recipe, schedule)
        logs = [plan.log_momentum(a, b) for a, b in pairwise(plan.borders.tolist())]
        before = [log for a, log in zip(plan.borders.tolist(), logs, strict=False) if a < start - 1e-9]
        assert all(log == -math.inf for log in before)
        # From the first step at or after ema_start on: what precedes it is momentum 0.
        first = plan.borders[len(before)]
        rest = plan.average_momentum.log_momentum(start, first) if first > start else 0.0
        left.append(math.fsum(logs[len(before) :]) + rest)
    assert left[0] == pytest.approx(left[1], rel=RELATIVE, abs=1e-8 * abs(math.log(rho)))


class Weights:
    """Stands for an average: what it is moved by."""

    def __init__(self) -> None:
        self.kept: list[float] = []

    def blend(self, model: nn.Module, weight: float) -> None:
        self.kept.append(1 - weight)


@given(runs(), MOMENTA, st.sampled_from(["constant", "cosine"]), st.integers(1, 7))
def test_updates_every_few_steps_decay_like_those_of_every_step(run: Any, rho: float, kind: Any, every: int) -> None:
    recipe = recipe_of(run, ema_momentum=rho, momentum_schedule=kind)
    plan = ScalingPlan(recipe, run["schedules"][0], ema_update_every=every)
    mover, average, model, steps = AverageMover(), Weights(), nn.Linear(1, 1), len(plan)
    for number in range(steps):
        values = plan.step(number)
        step = SampledStep(values.start, values.end, values.stage_kappa, 1.0, 1)
        mover.after_step(plan, average, model, step, number=number + 1, last=number + 1 == steps)  # type: ignore[arg-type]
    assert len(average.kept) == math.ceil(steps / every) and mover.pending == 0.0
    reference = math.exp(math.fsum(plan.average_momentum.log_at(k) for k in range(run["steps"])))
    assert math.prod(average.kept) == pytest.approx(reference, rel=RELATIVE, abs=1e-13)


@given(st.data(), MOMENTA, st.integers(1, 300), st.floats(-3, 3))
def test_the_path_corrected_average_of_a_constant_gradient_is_the_reference(
    data: Any, rho: float, steps: int, initial: float
) -> None:
    """Weights that move by 1 per step lead by rho**n (1 - initial) + rho (1 - rho**n) / (1 - rho) after n of them."""
    model = nn.Linear(1, 1, bias=False).double()
    with torch.no_grad():
        model.weight.fill_(initial)
    average = WeightAverage(model)
    with torch.no_grad():
        model.weight.fill_(1.0)
    for start, end in pairwise(data.draw(partitions(steps))):
        weights = path_correction((end - start) * math.log(rho), end - start)
        average.lead(model, weights.before)
        with torch.no_grad():
            model.weight.fill_(1.0 + end)
        average.blend(model, weights.after)
    reached = float(average.tensors()["weight"])
    lost = -math.expm1(steps * math.log(rho))
    behind = (1 - lost) * (1 - initial) + rho * lost / -math.expm1(math.log(rho))
    assert 1 + steps - reached == pytest.approx(behind, rel=1e-9, abs=1e-12 * (4 + steps))


@given(MOMENTA, st.integers(1, 60), st.integers(1, 40))
def test_the_reference_is_a_loop_over_reference_steps(rho: float, kappa: int, repeats: int) -> None:
    zeta = corrected = theta = 0.0
    for _ in range(repeats):
        weights = path_correction(kappa * math.log(rho), kappa)
        corrected += weights.before * (theta - corrected)
        for _ in range(kappa):
            theta += 1.0
            zeta = rho * zeta + (1 - rho) * theta
        corrected += weights.after * (theta - corrected)
    assert corrected == pytest.approx(zeta, rel=1e-9, abs=1e-12)
