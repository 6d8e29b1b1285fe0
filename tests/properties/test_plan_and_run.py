"""What a plan says of a step is what the step does."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from random_runs import recipe_of, runs, stream_of

from hf_ema_scaling.data import ScheduledBatchSampler
from hf_ema_scaling.scaling import BatchSchedule, OptimizerValues, ScalingPlan
from hf_ema_scaling.training.scheduler import PlanScheduler, lr_multiplier

OPTIMIZERS: dict[str, dict[str, Any]] = {
    "adamw": {"betas": (0.9, 0.98), "eps": 1e-6, "weight_decay": 0.1},
    "sgd": {"sgd_momentum": 0.9, "weight_decay": 1e-2},
    "rmsprop": {"alpha": 0.97, "eps": 1e-7, "sgd_momentum": 0.5},
}


def optimizer_of(family: str, values: OptimizerValues) -> torch.optim.Optimizer:
    kinds = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD, "rmsprop": torch.optim.RMSprop}
    groups = [{"params": [torch.zeros(1, requires_grad=True)]} for _ in range(2)]
    given = {name: getattr(values, name) for name in ("betas", "alpha", "eps", "momentum", "weight_decay")}
    return kinds[family](groups, lr=values.learning_rate, **{k: v for k, v in given.items() if v is not None})


def written(group: dict[str, Any]) -> dict[str, Any]:
    return {name: group.get(name) for name in ("lr", "weight_decay", "betas", "alpha", "eps", "momentum")}


def as_group(values: OptimizerValues) -> dict[str, Any]:
    names = ("weight_decay", "betas", "alpha", "eps", "momentum")
    return {"lr": values.learning_rate} | {name: getattr(values, name) for name in names}


def close(found: dict[str, Any], expected: dict[str, Any]) -> None:
    for name, value in expected.items():
        if value is not None:
            assert found[name] == pytest.approx(value, rel=1e-9, abs=1e-300), name


@given(
    runs(whole=True, unit="samples") | runs(),
    st.sampled_from(sorted(OPTIMIZERS)),
    st.sampled_from(["linear", "cosine", "constant_with_warmup"]),
    st.integers(0, 5),
    st.sampled_from([None, "none"]),
)
def test_every_step_writes_what_the_plan_says_of_its_interval(
    run: Any, family: str, shape: str, warmup: int, rule: str | None
) -> None:
    multiplier = lr_multiplier(
        shape, learning_rate=1e-3, warmup_steps=warmup, reference_steps=run["steps"], specific=None
    )
    recipe = recipe_of(run, optimizer=family, max_grad_norm=1.0, **OPTIMIZERS[family])
    plan = ScalingPlan(recipe, run["schedules"][0], lr_multiplier=multiplier, scaling_rule=rule)
    sampler = ScheduledBatchSampler(stream_of(run), plan.step_borders, micro_batch_size=4)
    values = recipe.optimizer_values()
    half = OptimizerValues(values.learning_rate / 2, 0.0, values.betas, values.eps, values.momentum, values.alpha)
    optimizer = optimizer_of(family, values)
    scheduler = PlanScheduler(plan, optimizer, [values, half])
    whole = run["unit"] == "samples" and all(
        (border * run["batch"]) % 1 < 1e-9 or (border * run["batch"]) % 1 > 1 - 1e-9 for border in plan.borders
    )
    if whole:
        assert sampler.num_steps == len(plan)
    clock = 0.0
    for number in range(sampler.num_steps):
        step = sampler.step(number)
        assert step.start == clock and step.kappa == pytest.approx(step.units / run["batch"], rel=1e-9)
        clock = step.end
        scheduler.begin(step)
        interval = {"start": step.start, "end": step.end, "stage_kappa": step.stage_kappa}
        for group, reference in zip(optimizer.param_groups, (values, half), strict=True):
            close(written(group), as_group(plan.optimizer_values(reference, **interval)))
        # The learning rate follows the mean of the reference schedule, here summed sample by sample of the interval.
        if whole:
            planned = plan.step(number)
            assert (step.start, step.end) == pytest.approx((planned.start, planned.end), abs=1e-9)
            assert step.stage_kappa == pytest.approx(planned.stage_kappa, rel=1e-9)
            group = written(optimizer.param_groups[0])
            nominal = OptimizerValues(
                planned.learning_rate,
                planned.weight_decay,
                planned.betas,
                planned.eps,
                planned.sgd_momentum,
                planned.alpha,
            )
            close(group, as_group(nominal))
            samples = np.arange(sampler.positions[number], sampler.positions[number + 1])
            mean = np.mean([multiplier(int(sample // run["batch"])) for sample in samples.tolist()])
            assert plan.lr_factor(step.start, step.end) == pytest.approx(mean, rel=1e-9, abs=1e-12)
            assert planned.momentum == pytest.approx(0.99 ** (len(samples) / run["batch"]), rel=1e-12)
    assert clock == pytest.approx(float(sampler.stream.cumulative_units[-1]) / run["batch"], rel=1e-12)


@pytest.mark.parametrize(
    ("changes", "stages"),
    [
        ({"lr_scheduler_type": "linear", "warmup_steps": 3}, [{"batch_size": 4, "until": 5}, {"batch_size": 12}]),
        (
            {"optim": "sgd", "lr_scheduler_type": "cosine", "ema_momentum_schedule": "cosine", "ema_start": 3.0},
            [{"batch_size": 8, "until_fraction": 0.25}, {"batch_size": 4, "until": 9}, {"batch_size": 20}],
        ),
        ({"batch_unit": "tokens", "weight_decay": 0.1}, [{"batch_size": 30, "until": 6}, {"batch_size": 75}]),
    ],
)
def test_the_log_of_a_run_is_the_plan_step_by_step(tmp_path: Path, changes: dict[str, Any], stages: Any) -> None:
    tokens = changes.get("batch_unit") == "tokens"
    batch = 24 if tokens else 4
    args = tiny.arguments(
        tmp_path,
        max_steps=24,
        reference_batch_size=batch,
        batch_schedule=json.dumps(stages),
        logging_strategy="steps",
        logging_steps=1,
        **changes,
    )
    data = tiny.sentences(50, lengths=(2, 9)) if tokens else tiny.sentences(50)
    made = tiny.trainer(tiny.bert(), args, data, data_collator=tiny.pad_sentences)
    plan = ScalingPlan(made.plan.recipe, BatchSchedule.from_json(stages), lr_multiplier=made.plan._lr_multiplier)
    made.train()
    logs = [entry for entry in made.state.log_history if "ema/momentum" in entry]
    assert len(logs) == made.state.global_step == len(plan) == len(made.recorder.groups)
    for number, (entry, groups) in enumerate(zip(logs, made.recorder.groups, strict=True)):
        planned, step = plan.step(number), made.sampler.step(number)
        # In tokens a step ends with the item that reaches its target.
        item = 8 / batch if tokens else 1e-12
        assert 0 <= entry["clock/reference_step"] - planned.end + 1e-12 < item + 1e-12
        assert abs(entry["ema/kappa"] - planned.kappa) < item + 1e-12
        assert entry["batch/units"] == pytest.approx(entry["ema/kappa"] * batch, rel=1e-12)
        log_rho = plan.log_momentum(step.start, step.end)
        assert entry["ema/momentum"] == math.exp(log_rho)
        reference = plan.recipe.optimizer_values()
        interval = {"start": step.start, "end": step.end, "stage_kappa": step.stage_kappa}
        assert step.stage_kappa == (step.kappa if plan.step_borders.cut[number] else planned.stage_kappa)
        values = plan.optimizer_values(reference, **interval)
        assert entry["learning_rate"] == groups[0]["lr"] == pytest.approx(values.learning_rate, rel=1e-12)
        if not tokens:
            assert entry["learning_rate"] == pytest.approx(planned.learning_rate, rel=1e-12)
            assert entry["ema/momentum"] == pytest.approx(planned.momentum, rel=1e-12)
            assert groups[0]["weight_decay"] == pytest.approx(planned.weight_decay, rel=1e-12)
            if planned.betas is not None:
                assert groups[0]["betas"] == pytest.approx(planned.betas, rel=1e-12)
