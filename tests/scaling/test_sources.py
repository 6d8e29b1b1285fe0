"""Stages that state labelled and unlabelled sizes."""

from __future__ import annotations

import json
from typing import Any

import pytest
import yaml

from hf_ema_scaling.scaling import BatchSchedule, Recipe, ScalingPlan, Stage

SIZED = [
    {"batch_size": 64, "until": 100},
    {"labelled": 16, "unlabelled": 48, "until": 250.5},
    {"batch_size": 128, "until_fraction": 0.5},
    {"labelled": 16, "unlabelled": 112},
]


def plan(*stages: dict[str, Any], pl_start: float | None = 100.0, **changes: Any) -> ScalingPlan:
    values = {"reference_batch_size": 64, "unit": "samples", "max_steps": 1000, "learning_rate": 1e-3}
    recipe = Recipe(**(values | {"ema_momentum": 0.99, "pl_start": pl_start, "unlabelled_ratio": 3.0} | changes))
    return ScalingPlan(recipe, BatchSchedule.from_json(stages))


@pytest.mark.parametrize("through", [lambda value: value, json.dumps, lambda value: yaml.safe_load(yaml.dump(value))])
def test_sizes_round_trip(through: Any) -> None:
    schedule = BatchSchedule.from_json(SIZED)
    assert schedule.stages[1] == Stage.of_sources(16, 48, 250.5) and schedule.stages[1].batch_size == 64
    assert BatchSchedule.from_json(through(schedule.to_json())) == schedule
    assert schedule.to_json() == SIZED


def test_ratios_are_pieces_of_the_clock_and_equal_neighbours_are_one() -> None:
    found = plan(*SIZED)
    # Stages at 0, 100, 250.5, 500; the second and third have the recipe's ratio.
    assert found.unlabelled_ratios == ((100.0, 3.0), (500.0, 7.0))
    assert found.stage_kappa.tolist() == [1.0] * 250 + [0.5] + [2.0] * 124 + [1.5] + [2.0] * 250
    back = plan({"batch_size": 64, "until": 300}, {"labelled": 8, "unlabelled": 56, "until": 400}, {"batch_size": 96})
    assert back.unlabelled_ratios == ((100.0, 3.0), (300.0, 7.0), (400.0, 3.0))
    assert plan({"batch_size": 640}).unlabelled_ratios == ((100.0, 3.0),)
    assert plan({"batch_size": 640}, pl_start=None).unlabelled_ratios == ()
    from_the_start = plan({"labelled": 10, "unlabelled": 5}, pl_start=0.0)
    assert from_the_start.unlabelled_ratios == ((0.0, 0.5),) and from_the_start.stage_kappa[0] == 15 / 64


def test_the_plan_shows_both_sizes_and_warns_of_another_ratio() -> None:
    found = plan(*SIZED)
    sizes = [(row["batch_size"], row["labelled"], row["unlabelled"]) for row in found.stage_values()]
    assert sizes == [(64, 64, 0), (64, 16, 48), (128, 32, 96), (128, 16, 112)]
    reference = found.reference_values()
    assert (reference["labelled"], reference["unlabelled"]) == (16, 48)
    table = {line[:30].strip(): line[30:].split() for line in found.explain().splitlines()}
    assert table["labelled (samples)"] == ["16", "64", "16", "32", "16"]
    assert table["unlabelled (samples)"] == ["48", "0", "48", "96", "112"]
    warned = [warning for warning in found.warnings() if "unlabelled units per labelled one" in warning]
    assert len(warned) == 1
    assert "from reference step 500 on there are 7 unlabelled units per labelled one, in the recipe 3" in warned[0]
    json.dumps(found.to_dict(), allow_nan=False)


def test_without_unlabelled_data_there_are_no_such_rows() -> None:
    found = plan({"batch_size": 128}, pl_start=None)
    assert "labelled" not in found.explain()
    assert found.stage_values()[0]["labelled"] is found.stage_values()[0]["unlabelled"] is None
    assert not any("labelled" in warning for warning in found.warnings())


def test_sizes_in_the_recipes_ratio_are_its_batch() -> None:
    stated = plan({"batch_size": 64, "until": 100}, {"labelled": 128, "unlabelled": 384})
    plain = plan({"batch_size": 64, "until": 100}, {"batch_size": 512})
    assert stated.explain() == plain.explain()
    assert [stated.step(t) for t in range(len(stated))] == [plain.step(t) for t in range(len(plain))]


@pytest.mark.parametrize(
    ("stages", "changes", "message"),
    [
        (
            [{"batch_size": 64, "until": 90}, {"labelled": 16, "unlabelled": 48}],
            {},
            "stage 1 states 16 labelled and 48 unlabelled units from reference step 90, but up to pl_start=100",
        ),
        ([{"labelled": 16, "unlabelled": 48}], {"pl_start": None}, "16 labelled and 48 .* the run has no unlabelled"),
        ([{"labelled": 16, "unlabelled": 0}], {}, "unlabelled size of a stage .* got 0"),
        ([{"labelled": -3, "unlabelled": 2}], {}, "labelled size of a stage .* got -3"),
        ([{"labelled": 16}], {}, "stage 0 needs a batch_size, or labelled and unlabelled in its place: .*16"),
        ([{"labelled": 16, "unlabelled": 4, "batch_size": 20}], {}, "stage 0 needs a batch_size, or labelled and"),
        ([{"labelled": "16", "unlabelled": 4}], {}, "stage 0 has values that are not numbers: .*'16'"),
        ([{"batch_size": 64}], {"unlabelled_ratio": 0.0}, "unlabelled_ratio .* got 0"),
    ],
)
def test_sizes_that_cannot_be_drawn_are_refused(stages: Any, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan(*stages, **changes)


def test_sizes_that_do_not_make_up_the_batch_are_refused() -> None:
    with pytest.raises(ValueError, match="16 labelled and 47 unlabelled units are no batch of 64"):
        Stage(64, sources=(16, 47))
