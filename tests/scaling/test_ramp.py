"""The weight of pseudo-labels over the run, in closed form."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest

from hf_ema_scaling.scaling import BatchSchedule, Recipe, ScalingPlan
from hf_ema_scaling.scaling.ramp import Ramp


def test_a_reference_step_has_the_mean_of_the_line_over_it() -> None:
    ramp = Ramp(10.0, 4.0)
    assert [ramp.at(step) for step in range(8, 17)] == [0, 0, 0.125, 0.375, 0.625, 0.875, 1, 1, 1]
    assert [Ramp(10.0, 0.0).at(step) for step in (9, 10, 11)] == [0, 1, 1]
    # A start inside a reference step: the line over what lies past it.
    assert Ramp(2.5, 2.0).at(2) == pytest.approx(0.125) and Ramp(2.5, 2.0).at(3) == pytest.approx(0.5)
    # A length that is no whole number: half of the step on the line, from 0.8 to 1, half at 1.
    assert Ramp(0.0, 2.5).at(2) == pytest.approx((0.9 + 1.0) / 2)


def test_a_step_of_eight_has_the_mean_of_eight() -> None:
    ramp = Ramp(16.0, 64.0)
    for start in (16, 24, 72, 80, 88):
        ones = [ramp.mean(step, step + 1) for step in range(start, start + 8)]
        assert ones == [ramp.at(step) for step in range(start, start + 8)]
        assert ramp.mean(start, start + 8) == pytest.approx(np.mean(ones), rel=1e-15)
    # In closed form on the line: its value in the middle.
    assert ramp.mean(24, 32) == pytest.approx((28 - 16) / 64, rel=1e-15)
    assert ramp.mean(76, 84) == pytest.approx((4 * (78 - 16) / 64 + 4) / 8, rel=1e-15)


def test_every_partition_has_the_same_integral() -> None:
    ramp = Ramp(3.3, 17.7)
    rng = np.random.default_rng(0)
    whole = ramp.mean(3.3, 40.0) * 36.7
    for pieces in (1, 2, 30):
        borders = [3.3, *np.sort(rng.uniform(3.3, 40.0, pieces)).tolist(), 40.0]
        parts = math.fsum(ramp.mean(low, high) * (high - low) for low, high in pairwise(borders))
        assert parts == pytest.approx(whole, rel=1e-13)
    # The line itself: a triangle and a rectangle.
    assert whole == pytest.approx(17.7 / 2 + 40.0 - 3.3 - 17.7, rel=1e-13)
    with pytest.raises(ValueError, match="0 <= start < end"):
        ramp.mean(4.0, 4.0)


def recipe(**changes: float) -> Recipe:
    values = {"pl_start": 100.0, "pl_ramp": 40.0, "cache_steps": 160.0} | changes
    return Recipe(8, "samples", 1000, 1e-3, 0.9, **values)


def test_the_plan_tells_both_in_optimizer_steps() -> None:
    plan = ScalingPlan(recipe(), BatchSchedule.two_stage(8, 8.0, 100))
    assert plan.reference_values()["pl_ramp_steps"] == 40 and plan.reference_values()["cache_steps"] == 160
    small, large = plan.stage_values()
    assert (small["cache_steps"], large["cache_steps"]) == (160, 20)
    assert (small["pl_ramp_steps"], large["pl_ramp_steps"]) == (40, 5)
    text = plan.explain()
    assert "pseudo-labels have full weight at 105 (140); the label cache is full at 120 (260)." in text
    assert "label cache (optimizer steps)" in text and "pseudo-label ramp (optimizer steps)" in text
    plain = ScalingPlan(recipe(pl_ramp=0, cache_steps=0), BatchSchedule.constant(8))
    assert "cache" not in plain.explain() and "ramp" not in plain.explain()
    assert plain.stage_values()[0]["cache_steps"] is None


def test_the_plan_warns_of_what_cannot_go_well() -> None:
    plan = ScalingPlan(recipe(pl_ramp=1800.0, cache_steps=4.0), BatchSchedule.two_stage(8, 8.0, 100))
    ramp, cache = [text for text in plan.warnings() if "pl_ramp" in text or "cache_steps" in text]
    assert "reaches 0.5 of its value" in ramp and "kappa=8 draws the whole label cache (cache_steps=4)" in cache
    fine = ScalingPlan(recipe(), BatchSchedule.two_stage(8, 8.0, 100))
    assert not any("pl_ramp" in text or "cache" in text for text in fine.warnings())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pl_ramp": -1.0}, "pl_ramp"),
        ({"cache_steps": -1.0}, "cache_steps"),
        ({"cache_steps": 900.0}, "cache_steps=900 from pl_start=100 on reaches the end of the run"),
        ({"pl_start": None, "cache_steps": 0.0}, "pl_ramp=40 is about pseudo-labels, but pl_start is None"),
    ],
)
def test_what_cannot_be_planned_is_refused(changes: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        recipe(**changes)
