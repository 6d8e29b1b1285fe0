"""The plan's side of a momentum schedule, of rarer updates and of the path correction."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from hf_ema_scaling.scaling import BatchSchedule, Recipe, ScalingPlan, Stage


def recipe(**changes: Any) -> Recipe:
    values: dict[str, Any] = {
        "reference_batch_size": 64,
        "unit": "samples",
        "max_steps": 1000,
        "learning_rate": 1e-3,
        "ema_momentum": 0.99,
    }
    return Recipe(**(values | changes))


def byol(step: int, base: float = 0.9, steps: float = 1000) -> float:
    return 1 - (1 - base) * (math.cos(math.pi * step / steps) + 1) / 2


def test_a_cosine_momentum_in_every_value_of_the_plan() -> None:
    tuned = recipe(ema_momentum=0.9, momentum_schedule="cosine", pl_start=500, ema_start=20)
    plan = ScalingPlan(tuned, BatchSchedule.two_stage(64, 8, 500))
    values = plan.step(510)
    assert (values.start, values.end) == (580, 588)
    product = math.prod(byol(k) for k in range(580, 588))
    assert values.momentum == pytest.approx(product, rel=1e-14)
    assert values.ema_weight == pytest.approx(1 - product, rel=1e-12)
    assert plan.log_momentum(19, 27) == -math.inf
    assert plan.log_momentum(100.5, 102) == pytest.approx(0.5 * math.log(byol(100)) + math.log(byol(101)), rel=1e-14)
    kept = math.fsum(math.log(byol(k)) for k in range(20, 500))
    assert plan.log_decay(20, 500) == pytest.approx(kept, rel=1e-13) and plan.log_decay(500, 20) == 0.0
    # The end: the momentum of the last step is almost 1, and 1 past the end.
    assert plan.step(len(plan) - 1).momentum == pytest.approx(math.prod(map(byol, range(996, 1000))), rel=1e-14)
    assert plan.log_momentum(1000, 1003.5) == 0.0

    reference, (first, second) = plan.reference_values(), plan.stage_values()
    assert reference["momentum"] == pytest.approx(0.9) and first["momentum"] == reference["momentum"]
    assert second["momentum"] == pytest.approx(math.prod(map(byol, range(500, 508))), rel=1e-14)
    assert second["half_life_steps"] == pytest.approx(math.log(2) / -math.log(second["momentum"]), rel=1e-13)
    assert first["momentum_at_end"] == pytest.approx(byol(499), rel=1e-14)
    assert second["momentum_at_end"] == pytest.approx(math.prod(map(byol, range(992, 1000))), rel=1e-14)
    text = plan.explain()
    row = next(line.split() for line in text.splitlines() if line.startswith("EMA momentum at the end"))
    assert row[-2:] == [f"{byol(499):.7g}", f"{math.prod(map(byol, range(992, 1000))):.7g}"]
    assert "The EMA momentum follows a cosine to 1 at the run's end" in text
    summary = json.loads(json.dumps(plan.to_dict(), allow_nan=False))
    assert Recipe(**(summary["recipe"] | {"betas": tuple(summary["recipe"]["betas"])})) == tuned


def test_a_stage_shorter_than_its_step_begins_and_ends_with_the_same_momentum() -> None:
    tuned = recipe(ema_momentum=0.9, momentum_schedule="cosine")
    for plan in (
        ScalingPlan(tuned, BatchSchedule.two_stage(64, 8, 996)),
        ScalingPlan(tuned, BatchSchedule.constant(64 * 2000)),
    ):
        row = plan.stage_values()[-1]
        assert row["momentum_at_end"] == row["momentum"]


def test_constant_momentum_has_no_row_for_the_end() -> None:
    plan = ScalingPlan(recipe(), BatchSchedule.two_stage(64, 8, 500))
    assert plan.stage_values()[1]["momentum_at_end"] is None and "at the end" not in plan.explain()


@pytest.mark.parametrize("batches", [(64,), (192,), (32, 64, 128, 256), (448, 100, 7)])
def test_total_decay_of_a_cosine_does_not_depend_on_the_layout(batches: tuple[float, ...]) -> None:
    ends = np.linspace(0, 1000, len(batches) + 1)[1:-1].tolist()
    stages = [Stage(batch, end) for batch, end in zip(batches[:-1], ends, strict=True)] + [Stage(batches[-1])]
    plan = ScalingPlan(recipe(momentum_schedule="cosine", pl_start=333.3), BatchSchedule(tuple(stages)))
    total = math.fsum(plan.log_momentum(a, b) for a, b in pairwise(plan.borders.tolist()))
    assert total == pytest.approx(math.fsum(math.log(byol(k, 0.99)) for k in range(1000)), rel=1e-12)


def test_unscaled_momentum_is_the_schedules_at_the_steps_start_once_per_optimizer_step() -> None:
    tuned = recipe(ema_momentum=0.9, momentum_schedule="cosine", pl_start=100)
    plan = ScalingPlan(tuned, BatchSchedule.constant(512), scale_ema=False)
    for t in (0, 7, 124):
        assert plan.step(t).momentum == pytest.approx(byol(int(plan.step(t).start)), rel=1e-14)
    starts = [k for k in plan.borders[:-1].tolist() if k < 100]
    assert len(starts) == 13
    assert plan.log_decay(0, 100) == pytest.approx(sum(math.log(byol(int(k))) for k in starts), rel=1e-13)
    assert plan.log_decay(3, 5) == 0.0  # no step begins there
    # A start that rounding left below a reference step is on it.
    assert plan.log_momentum(8 - 1e-12, 16) == pytest.approx(math.log(byol(8)), rel=1e-14)


def test_path_weights_of_a_step() -> None:
    plan = ScalingPlan(recipe(ema_start=8), BatchSchedule.constant(512), ema_correction="path")
    r = 0.99**8
    after = 1 - 0.99 * (1 - r) / (8 * 0.01)
    assert plan.path_weights(16, 24) == pytest.approx((1 - r / (1 - after), after), rel=1e-12)
    assert plan.path_weights(0, 8) == (0.0, 1.0)
    assert "The average follows the weights along each step" in plan.explain()
    assert plan.to_dict()["ema_correction"] == "path"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ema_update_every": 0}, "ema_update_every must be a whole number of optimizer steps above 0, got 0"),
        ({"ema_update_every": 1.5}, "whole number of optimizer steps above 0, got 1.5"),
        ({"ema_correction": "paths"}, "ema_correction must be one of none, path, got 'paths'"),
        ({"ema_correction": "path", "ema_update_every": 2}, "does not go with ema_update_every=2"),
        ({"ema_correction": "path", "scale_ema": False}, "does not go with scale_ema=False"),
    ],
)
def test_variants_that_exclude_each_other_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ScalingPlan(recipe(), BatchSchedule.constant(64), **changes)
    with pytest.raises(ValueError, match="momentum_schedule must be one of constant, cosine, got 'linear'"):
        recipe(momentum_schedule="linear")


# Each case: recipe and plan on one side of the threshold and on the other.
@pytest.mark.parametrize(
    ("fragment", "raises", "silent"),
    [
        # An update of n steps of kappa stands for n * kappa reference steps.
        (
            "kappa * ema_update_every * (1 - ema_momentum) is 0.102",
            ({"ema_momentum": 0.9898}, 2, {"ema_update_every": 5}),
            ({"ema_momentum": 0.9898}, 10, {}),
        ),
        ("above 0.1", ({"ema_momentum": 0.949}, 1, {"ema_update_every": 2}), ({}, 1, {"ema_update_every": 9})),
        ("momentum of one update is", ({}, 1, {"ema_update_every": 100}), ({}, 1, {"ema_update_every": 99})),
        (
            "momentum of one update is",
            ({}, 8, {"ema_update_every": 100, "scale_ema": False}),
            ({}, 8, {"ema_update_every": 99, "scale_ema": False}),
        ),
        # The correction takes the residual away.
        (
            "set ema_correction='path'",
            ({"ema_momentum": 0.98}, 8, {}),
            ({"ema_momentum": 0.98}, 8, {"ema_correction": "path"}),
        ),
        # What a kappa meets is the momentum where its stage begins.
        (
            "(1 - momentum 0.99) is 0.16 at kappa=16",
            ({"ema_momentum": 0.98, "momentum_schedule": "cosine", "until": 500}, 16, {}),
            ({"ema_momentum": 0.98, "momentum_schedule": "cosine", "until": 800}, 16, {}),
        ),
        (
            "less than half of the average is replaced in the run",
            ({"ema_momentum": 1 - 1.38e-3, "momentum_schedule": "cosine"}, 1, {}),
            ({"ema_momentum": 1 - 1.40e-3, "momentum_schedule": "cosine"}, 1, {}),
        ),
        (
            "teacher still holds",
            ({"ema_momentum": 0.99, "momentum_schedule": "cosine", "pl_start": 324}, 1, {}),
            ({"ema_momentum": 0.99, "momentum_schedule": "cosine", "pl_start": 326}, 1, {}),
        ),
    ],
)
def test_warnings_follow_the_variants(fragment: str, raises: Any, silent: Any) -> None:
    def warnings(changes: dict[str, Any], kappa: float, variant: dict[str, Any]) -> str:
        tuned = {key: value for key, value in changes.items() if key != "until"}
        schedule = BatchSchedule.two_stage(64, kappa, changes.get("until", 0))
        return "\n".join(ScalingPlan(recipe(**tuned), schedule, **variant).warnings())

    assert fragment in warnings(*raises)
    assert fragment not in warnings(*silent)


def test_a_momentum_too_close_to_one_for_float32_is_warned_of() -> None:
    slow = recipe(ema_momentum=1 - 8e-6, ema_start=0, max_steps=200_000)
    plan = ScalingPlan(slow, BatchSchedule.constant(64))
    (said,) = [text for text in plan.warnings() if "float32" in text and "ema_dtype" in text]
    # Half a unit in the last place is 2**-25 to 2**-24 of a float32 value.
    assert f"by {8e-6:.3g} of its distance" in said
    assert f"less than {2**-25 / 8e-6:.1g} to {2**-24 / 8e-6:.1g} of its size away" in said
    for changes in ({"ema_dtype": "float64"}, {"ema_update_every": 2}):
        quiet = ScalingPlan(slow, BatchSchedule.constant(64), **changes)  # type: ignore[arg-type]
        assert not any("ema_dtype" in text for text in quiet.warnings()), changes
    larger = ScalingPlan(slow, BatchSchedule.constant(128))
    assert not any("ema_dtype" in text for text in larger.warnings())
