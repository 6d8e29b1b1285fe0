from __future__ import annotations

import json
import math
import random
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from hf_ema_scaling.scaling import (
    BatchSchedule,
    ReferenceClock,
    ResolvedStage,
    Segment,
    Stage,
    StepBorders,
    step_borders,
)


def lay_out(*stages: tuple[float, float | None], max_steps: float, cuts: tuple[float, ...] = ()) -> StepBorders:
    """Borders for stages of (kappa, until) at a reference batch of 10."""
    schedule = BatchSchedule(tuple(Stage(10 * kappa, until) for kappa, until in stages))
    return step_borders(schedule.resolve(max_steps), 10, cuts)


def test_three_stages_with_a_kappa_that_does_not_divide() -> None:
    borders = lay_out((1, 2), (3, 9), (2, None), max_steps=14)
    assert borders.borders.tolist() == [0, 1, 2, 5, 8, 9, 11, 13, 14]
    assert np.diff(borders.borders).tolist() == [1, 1, 3, 3, 1, 2, 2, 1]
    assert borders.stage_kappa.tolist() == [1, 1, 3, 3, 1, 2, 2, 1]
    assert borders.cut.tolist() == [False, False, False, False, True, False, False, True]
    assert borders.borders.dtype == borders.stage_kappa.dtype == np.float64
    assert len(borders) == 8 and borders.position == 14


def test_b_2b_4b_is_exact() -> None:
    borders = lay_out((1, 100), (2, 300), (4, None), max_steps=1000)
    expected = [*range(0, 100), *range(100, 300, 2), *range(300, 1001, 4)]
    assert borders.borders.tolist() == expected
    assert borders.stage_kappa.tolist() == [1.0] * 100 + [2.0] * 100 + [4.0] * 175


def test_cuts_shorten_the_step_before_them() -> None:
    cut = lay_out((3, None), max_steps=10, cuts=(4, 5))
    assert cut.borders.tolist() == [0, 3, 4, 5, 8, 10]
    assert cut.stage_kappa.tolist() == [3, 1, 1, 3, 2]
    assert cut.cut.tolist() == [False, True, True, False, True]
    # On a border already, at an end, outside the run, or given twice: no further step.
    assert lay_out((3, None), max_steps=9, cuts=(3, 0, 9, 20, 3)).borders.tolist() == [0, 3, 6, 9]


def test_dust_is_no_step() -> None:
    # 0.1 * 30 is not 3.0 in float64.
    borders = lay_out((0.1, None), max_steps=3.0)
    assert len(borders) == 30 and borders.borders[-1] == 3.0
    assert len(lay_out((3, None), max_steps=9 + 1e-10)) == 3
    assert len(lay_out((3, None), max_steps=9 + 1e-6)) == 4
    assert lay_out((1, None), max_steps=4, cuts=(2.0, 2 + 1e-12)).borders.tolist() == [0, 1, 2, 3, 4]


def test_long_run_accumulates_no_rounding() -> None:
    borders = lay_out((0.1, 50_000), (0.7, None), max_steps=100_000).borders
    assert len(borders) - 1 == 500_000 + 71_429
    assert borders[123_456] == 0.1 * 123_456
    assert borders[500_000] == 50_000 and borders[-1] == 100_000


def test_resume_gives_the_bits_of_the_uninterrupted_run() -> None:
    schedule = BatchSchedule((Stage(1.0, 7.3), Stage(3.3, 31.7), Stage(7.7)))
    stages = schedule.resolve(100.0)
    whole = step_borders(stages, 11.0, cuts=(12.345,))
    for steps in range(len(whole) + 1):
        done = whole.prefix(steps)
        assert done.borders.tobytes() == whole.borders[: steps + 1].tobytes()
        resumed = step_borders(stages, 11.0, cuts=(12.345,), done=StepBorders.from_json(json.dumps(done.to_json())))
        assert resumed.borders.tobytes() == whole.borders.tobytes()
        assert resumed.stage_kappa.tobytes() == whole.stage_kappa.tobytes()
        assert resumed == whole


def test_resume_with_another_schedule_replaces_the_tail_only() -> None:
    done = lay_out((1, None), max_steps=20).prefix(7)
    stages = BatchSchedule((Stage(20, 10), Stage(40))).resolve(20)
    resumed = step_borders(stages, 10, cuts=(5,), done=done)
    assert resumed.borders.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 9, 10, 14, 18, 20]
    assert resumed.stage_kappa.tolist() == [1] * 7 + [2, 1, 4, 4, 2]
    # Stopped inside what is now the last stage.
    late = step_borders(BatchSchedule.two_stage(10, 8, 3).resolve(20), 10, done=done)
    assert late.borders.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 15, 20]


def test_resume_at_or_beyond_the_end() -> None:
    done = lay_out((4, None), max_steps=20)
    stages = BatchSchedule.constant(10).resolve(20)
    assert step_borders(stages, 10, done=done) == done
    with pytest.raises(ValueError, match="already run reach 20, beyond the end of the run at 15"):
        step_borders(BatchSchedule.constant(10).resolve(15), 10, done=done)


def test_random_layouts_obey_the_rules() -> None:
    generator = random.Random(1)
    for _ in range(100):
        ends = sorted(generator.uniform(1, 99) for _ in range(generator.randint(0, 4)))
        stages = tuple(Stage(generator.uniform(0.5, 80), end) for end in [*ends, None])
        cuts = tuple(generator.uniform(0, 100) for _ in range(3))
        resolved = BatchSchedule(stages).resolve(100)
        borders = step_borders(resolved, 10, cuts)
        kappas = np.diff(borders.borders)
        assert borders.borders[0] == 0 and borders.borders[-1] == 100
        assert (kappas > 0).all() and kappas == pytest.approx(borders.stage_kappa, rel=1e-9)
        assert {*cuts, *ends} <= set(borders.borders.tolist())
        for stage in resolved:
            inside = (borders.borders[:-1] >= stage.start) & (borders.borders[:-1] < stage.end)
            whole = inside & ~borders.cut
            assert (borders.stage_kappa[whole] == stage.batch_size / 10).all()
            assert (borders.stage_kappa[inside & borders.cut] < stage.batch_size / 10).all()


def test_borders_round_trip_bit_exactly() -> None:
    borders = step_borders(BatchSchedule((Stage(1 / 3, 2.2), Stage(math.pi))).resolve(1e4 / 7), 0.77, (1.1,))
    text = json.dumps(borders.to_json())
    assert len(borders) == 356 and [segment["cut"] for segment in borders.to_json()] == [False, True] * 3
    again = StepBorders.from_json(text)
    assert again == borders and again.borders.tobytes() == borders.borders.tobytes()
    assert StepBorders.from_json([]).borders.tolist() == [0.0] and len(StepBorders()) == 0


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([{"start": 0, "kappa": 1, "count": 2}], "needs the numbers start, kappa, count and end"),
        ([{"start": 0, "kappa": 1, "count": 1, "end": 1, "cut": 1}], "cut of a segment must be true or false, got 1"),
        ([{"start": 0, "kappa": 1, "count": 2, "end": 2, "cut": True}], "cut short is a segment of its own"),
        ([{"start": 1, "kappa": 1, "count": 2, "end": 3}], "begins at 1.0, the one before it ends at 0.0"),
        ([{"start": 0, "kappa": 1, "count": 0, "end": 3}], "count of a segment"),
        (
            [{"start": 0, "kappa": 1, "count": 4, "end": 3}],
            "end of a segment must lie after the start of its last step",
        ),
        ({"start": 0}, "must be a list of objects"),
    ],
)
def test_bad_borders_are_refused(value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StepBorders.from_json(value)


def test_prefix_bounds() -> None:
    borders = StepBorders((Segment(0.0, 1.0, 3, 3.0),))
    assert borders.prefix(2).segments == (Segment(0.0, 1.0, 2, 2.0),)
    for steps in (-1, 4):
        with pytest.raises(ValueError, match=f"cannot take {steps} of 3 steps"):
            borders.prefix(steps)


def test_resolve() -> None:
    schedule = BatchSchedule((Stage(64, 3, "epochs"), Stage(128, 0.5, "fraction"), Stage(256)))
    assert schedule.resolve(1000, 100) == (
        ResolvedStage(0, 300, 64),
        ResolvedStage(300, 500, 128),
        ResolvedStage(500, 1000, 256),
    )
    # An end of the last stage may lie past the run's end, never before it.
    assert BatchSchedule((Stage(64, 2000),)).resolve(1000) == (ResolvedStage(0, 1000, 64),)
    assert BatchSchedule((Stage(64, 3, "epochs"),)).resolve(100, 100 / 3) == (ResolvedStage(0, 100, 64),)


def test_constructors() -> None:
    assert BatchSchedule.constant(32).stages == (Stage(32),)
    assert BatchSchedule.two_stage(64, 8, 5000).stages == (Stage(64, 5000), Stage(512))
    assert BatchSchedule.two_stage(64, 8, 0) == BatchSchedule.constant(512)
    assert BatchSchedule.two_stage(64, 1, 5000) == BatchSchedule.constant(64)
    with pytest.raises(ValueError, match="kappa must be a finite number above 0, got 0"):
        BatchSchedule.two_stage(64, 0, 10)


@pytest.mark.parametrize("batch_size", [0, -1, math.nan, math.inf])
def test_bad_batch_sizes_are_refused(batch_size: float) -> None:
    with pytest.raises(ValueError, match="batch_size of a stage must be a finite number above 0, got"):
        Stage(batch_size)


@pytest.mark.parametrize("until", [0.0, 1.0, -0.1, 1.5, math.nan])
def test_bad_fractions_are_refused(until: float) -> None:
    with pytest.raises(ValueError, match="fraction of the run must lie strictly between 0 and 1"):
        Stage(64, until, "fraction")


def test_bad_schedules_are_refused() -> None:
    with pytest.raises(ValueError, match="no stages"):
        BatchSchedule(())
    with pytest.raises(ValueError, match=r"stage 0 \(batch size 64\) needs `until`"):
        BatchSchedule((Stage(64), Stage(128)))
    with pytest.raises(ValueError, match="until of a stage must be a finite number above 0, got 0"):
        Stage(64, 0)
    with pytest.raises(ValueError, match="unit of a stage must be one of steps, epochs, fraction, got 'samples'"):
        Stage(64, 5, "samples")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="stage 1 ends at 10, not after its start 10"):
        BatchSchedule((Stage(64, 10), Stage(128, 10), Stage(64))).resolve(100)
    with pytest.raises(ValueError, match="last stage ends at 50, before max_steps=100"):
        BatchSchedule((Stage(64, 10), Stage(128, 50))).resolve(100)
    with pytest.raises(ValueError, match="stage 1 begins at reference step 100, at or after the end of the run"):
        BatchSchedule((Stage(64, 100), Stage(128))).resolve(100)
    with pytest.raises(ValueError, match="stage 0 ends after 3 epochs: this needs steps_per_epoch"):
        BatchSchedule((Stage(64, 3, "epochs"), Stage(128))).resolve(100)
    with pytest.raises(ValueError, match="max_steps must be a finite number above 0, got 0"):
        BatchSchedule.constant(64).resolve(0)


def test_schedule_json() -> None:
    entries: list[dict[str, float]] = [
        {"batch_size": 64, "until": 5000},
        {"batch_size": 0.1 + 0.2, "until_epochs": 3},
        {"batch_size": 96.5, "until_fraction": 0.9},
        {"batch_size": 512},
    ]
    schedule = BatchSchedule.from_json(entries)
    assert schedule.stages == (
        Stage(64, 5000),
        Stage(0.1 + 0.2, 3, "epochs"),
        Stage(96.5, 0.9, "fraction"),
        Stage(512),
    )
    assert schedule.to_json() == entries
    assert BatchSchedule.from_json(json.dumps(schedule.to_json())) == schedule


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("not json", "must be a JSON list of objects, got 'not json'"),
        ("64", "must be a list of objects, got 64"),
        ([], "no stages"),
        ([{"batch_size": 64, "untill": 5}], r"stage 0 has unknown keys \['untill'\]; known: batch_size, labelled"),
        ([{"until": 5}], "stage 0 needs a batch_size, or labelled and unlabelled"),
        ([{"batch_size": "64"}], "stage 0 has values that are not numbers"),
        ([{"batch_size": True}], "stage 0 has values that are not numbers"),
        ([{"batch_size": 64, "until": 5, "until_epochs": 1}], "several ends, until and until_epochs"),
    ],
)
def test_bad_schedule_json_is_refused(value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BatchSchedule.from_json(value)


def test_clock() -> None:
    clock = ReferenceClock(64)
    assert [clock.advance(units) for units in (64, 512, 32)] == [1, 8, 0.5]
    assert clock.position == 9.5 and clock.units == 608
    assert ReferenceClock(64, units=clock.units).position == clock.position
    with pytest.raises(ValueError, match="units of a step must be a finite number above 0, got 0"):
        clock.advance(0)


def test_events_fire_once_per_period_at_any_kappa() -> None:
    crosses = ReferenceClock.crosses
    assert crosses(9, 10, 10) and not crosses(8, 9, 10) and not crosses(10, 11, 10)
    assert crosses(8, 16, 10) and crosses(0, 1000, 10) and not crosses(0, 9.5, 10)
    assert crosses(0, 10 - 1e-10, 10) and not crosses(10 - 1e-10, 10.5, 10) and not crosses(0, 10 - 1e-6, 10)
    for kappa in (0.1, 0.7, 1, 3, 8):
        positions = [kappa * index for index in range(int(1000 / kappa) + 1)]
        fired = sum(crosses(a, b, 25) for a, b in pairwise(positions))
        assert fired == math.floor(positions[-1] / 25 + 1e-9)
    with pytest.raises(ValueError, match="every must be a finite number above 0, got 0"):
        crosses(0, 1, 0)
