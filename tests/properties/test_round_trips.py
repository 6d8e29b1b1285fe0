"""What is written to JSON or YAML is read back, bit for bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from random_runs import runs

from hf_ema_scaling.recipe.config import parse
from hf_ema_scaling.scaling import BatchSchedule, Stage, StepBorders, step_borders
from hf_ema_scaling.training.arguments import EMATrainingArguments, PseudoLabelArguments

NUMBERS = st.integers(1, 10**9) | st.floats(1e-6, 1e9, exclude_min=True)


@st.composite
def any_schedules(draw: st.DrawFn) -> BatchSchedule:
    """Stages of any size with ends of all three units, in no order."""
    fractions = st.floats(0, 1, exclude_min=True, exclude_max=True)
    ends = st.one_of(
        st.tuples(NUMBERS, st.just("steps")),
        st.tuples(NUMBERS, st.just("epochs")),
        st.tuples(fractions, st.just("fraction")),
    )
    stages = [Stage(draw(NUMBERS), *draw(ends)) for _ in range(draw(st.integers(0, 4)))]
    return BatchSchedule((*stages, Stage(draw(NUMBERS))))


@st.composite
def increasing(draw: st.DrawFn) -> tuple[BatchSchedule, int, float]:
    """A schedule that fits a run, its reference steps and the steps of an epoch."""
    steps = draw(st.integers(2, 2000))
    per_epoch = draw(st.floats(0.5, 1e4))
    ends = draw(st.lists(st.floats(0.01, 0.99), max_size=4, unique=True).map(sorted))
    stages = []
    for end in ends:
        unit: Any = draw(st.sampled_from(["steps", "epochs", "fraction"]))
        until = {"steps": end * steps, "epochs": end * steps / per_epoch, "fraction": end}[unit]
        stages.append(Stage(draw(st.floats(1, 100)), until, unit))
    return BatchSchedule((*stages, Stage(draw(st.floats(1, 100))))), steps, per_epoch


def outcome(schedule: BatchSchedule, steps: float, per_epoch: float) -> Any:
    """The stages of a run or why there are none."""
    try:
        return schedule.resolve(steps, per_epoch)
    except ValueError as error:
        return str(error)


@given(any_schedules())
def test_schedules_survive_json(schedule: BatchSchedule) -> None:
    text = json.dumps(schedule.to_json())
    assert BatchSchedule.from_json(text) == BatchSchedule.from_json(json.loads(text)) == schedule
    assert BatchSchedule.from_json(text).to_json() == schedule.to_json()


@given(increasing(), st.data())
def test_step_borders_survive_json_bit_for_bit(made: Any, data: Any) -> None:
    schedule, steps, per_epoch = made
    stages = BatchSchedule.from_json(json.dumps(schedule.to_json())).resolve(steps, per_epoch)
    assert stages == schedule.resolve(steps, per_epoch)
    batch = max(stage.batch_size for stage in stages)
    cuts = data.draw(st.lists(st.floats(0, steps), max_size=2))
    borders = step_borders(stages, batch / data.draw(st.floats(1, 50)), cuts)
    for taken in {0, len(borders) // 2, len(borders)}:
        kept = borders.prefix(taken)
        read = StepBorders.from_json(json.dumps(kept.to_json()))
        assert read == kept and read.borders.tobytes() == kept.borders.tobytes()
        assert read.stage_kappa.tobytes() == borders.stage_kappa[:taken].tobytes()


@settings(max_examples=30)
@given(any_schedules() | increasing().map(lambda made: made[0]), runs(), st.booleans())
def test_schedules_survive_the_file_of_a_recipe(
    tmp_path: Path, schedule: BatchSchedule, run: dict[str, Any], flow: bool
) -> None:
    file = tmp_path / "recipe.yaml"
    values = {
        "output_dir": str(tmp_path),
        "use_cpu": True,
        "report_to": "none",
        "reference_batch_size": run["batch"] + 0.1 if run["unit"] == "seconds" else run["batch"],
        "batch_unit": run["unit"],
        "batch_schedule": schedule.to_json(),
        "pl_start": run["pl_start"] or 0.0,
        "unlabeled_ratio": run["ratio"],
    }
    file.write_text(yaml.safe_dump(values, default_flow_style=flow), encoding="utf-8")
    args, pseudo = parse((EMATrainingArguments, PseudoLabelArguments), ["--config", str(file)])
    assert args.schedule() == schedule
    assert (args.reference_batch_size, args.batch_unit) == (values["reference_batch_size"], run["unit"])
    assert (pseudo.pl_start, pseudo.unlabeled_ratio) == (values["pl_start"], run["ratio"])
    for steps, per_epoch in ((run["steps"], 3.7), (10**6, 123.4)):
        assert outcome(args.schedule(), steps, per_epoch) == outcome(schedule, steps, per_epoch)
    # The trainer's own record of its arguments is read the same.
    assert BatchSchedule.from_json(args.to_dict()["batch_schedule"]) == schedule


@pytest.mark.parametrize("text", ["1e-05", "1.0e+16", "5e-4", "0.1", "123456789.123456789"])
def test_numbers_of_a_schedule_are_read_as_they_are_written(tmp_path: Path, text: str) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(
        f"output_dir: {tmp_path}\nuse_cpu: true\nreport_to: none\nreference_batch_size: 4\n"
        f"batch_schedule:\n- batch_size: {text}\n",
        encoding="utf-8",
    )
    (args,) = parse((EMATrainingArguments,), ["--config", str(file)])
    assert args.schedule() == BatchSchedule.constant(float(text))
