"""What is read of runs: the newest state, the recipe wherever it lies, curves on three axes."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hf_ema_scaling.report.runs import Run, read_runs

Write = Callable[..., Path]
ROWS = [
    {"eval_wer": 0.5, "step": 1, "clock/reference_step": 2.0},
    {"eval_wer": math.nan, "step": 2, "clock/reference_step": 4.0},
    {"eval_wer": "none", "step": 3, "clock/reference_step": 6.0},
    {"eval_wer": 0.25, "step": 4, "clock/reference_step": 8.0},
    {"loss": True, "step": 4},
]


def test_curves_hold_finite_numbers_on_each_axis() -> None:
    run = Run("a", Path(), ROWS, 4, recipe={"reference_batch_size": 16})
    assert run.curve("eval_wer") == ([2.0, 8.0], [0.5, 0.25])
    assert run.curve("eval_wer", "step") == ([1.0, 4.0], [0.5, 0.25])
    assert run.curve("eval_wer", "units") == ([32.0, 128.0], [0.5, 0.25])
    assert run.last("eval_wer") == 0.25 and run.last("loss") is None
    assert Run("a", Path(), ROWS, 4).curve("eval_wer", "units") == ([], [])


def test_without_a_clock_steps_take_its_place() -> None:
    rows = [{"loss": 1.0, "step": 5}, {"loss": 0.5, "step": 10}]
    assert Run("a", Path(), rows, 10).curve("loss") == ([5.0, 10.0], [1.0, 0.5])


def test_an_evaluation_after_training_gets_the_clock_of_its_step(run_folder: Write) -> None:
    rows = [{"loss": 1.0, "step": 5, "clock/reference_step": 20.0}, {"eval_wer": 0.5, "step": 5}]
    (run,) = read_runs([run_folder(history=rows)])
    assert run.curve("eval_wer") == ([20.0], [0.5])


def _state(folder: Path, step: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    state = {"global_step": step, "max_steps": 20, "log_history": [{"loss": 1.0 / step, "step": step}]}
    (folder / "trainer_state.json").write_text(json.dumps(state), encoding="utf-8")


def test_the_state_with_most_steps_counts(tmp_path: Path) -> None:
    for step in (5, 10, 9):
        _state(tmp_path / f"checkpoint-{step}", step)
    (run,) = read_runs([tmp_path])
    assert (run.step, run.finished, run.folder.name) == (10, False, "checkpoint-10")
    _state(tmp_path, 20)
    (run,) = read_runs([tmp_path])
    assert (run.step, run.finished, run.folder) == (20, True, tmp_path)
    (run,) = read_runs([tmp_path / "checkpoint-5"])
    assert (run.step, run.name) == (5, f"{tmp_path.name}/checkpoint-5")


def test_a_damaged_state_is_passed_over_and_told_of(tmp_path: Path) -> None:
    _state(tmp_path / "checkpoint-5", 5)
    _state(tmp_path / "checkpoint-9", 9)
    (tmp_path / "checkpoint-9" / "trainer_state.json").write_text('{"global_step": 9,', encoding="utf-8")
    (run,) = read_runs([tmp_path])
    assert run.step == 5 and "checkpoint-9 cannot be read" in run.notes[0]


def test_a_running_run_has_its_recipe_from_the_checkpoint(tmp_path: Path) -> None:
    _state(tmp_path / "checkpoint-5", 5)
    (tmp_path / "checkpoint-5" / "ema").mkdir()
    state = {"state": {"recipe": {"reference_batch_size": 16, "unit": "tokens"}}}
    (tmp_path / "checkpoint-5" / "ema" / "ema_state.json").write_text(json.dumps(state), encoding="utf-8")
    assert read_runs([tmp_path])[0].recipe == {"reference_batch_size": 16, "unit": "tokens"}


def test_plan_and_ledger_of_a_run_are_those_of_its_checkpoints_too(run_folder: Write) -> None:
    folder = run_folder(ledger={"unit": "seconds"})
    _state(folder / "checkpoint-5", 5)
    (run,) = read_runs([folder / "checkpoint-5"])
    assert run.plan["steps"] == 20 and run.ledger == {"unit": "seconds"}
    # Final metrics are not those of a checkpoint before the end.
    assert run.metrics == {} and "20 optimizer steps" in run.notes[0]


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["a/pseudo", "b/pseudo", "a/labelled"], ["a/pseudo", "b/pseudo", "labelled"]),
        (["x/a/one", "y/a/one"], ["x/a/one", "y/a/one"]),
        (["one", "two"], ["one", "two"]),
    ],
)
def test_names_are_the_shortest_that_differ(tmp_path: Path, paths: list[str], names: list[str]) -> None:
    for path in paths:
        _state(tmp_path / path, 1)
    assert [run.name for run in read_runs([tmp_path / path for path in paths])] == names


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="holds no run"):
        read_runs([tmp_path])
    _state(tmp_path, 1)
    with pytest.raises(ValueError, match="given twice"):
        read_runs([tmp_path, tmp_path / ".." / tmp_path.name])
    with pytest.raises(ValueError, match="no run is given"):
        read_runs([])


@pytest.mark.parametrize("content", ["[]", "null", "not json"])
def test_other_files_that_cannot_be_read_are_left_out(run_folder: Write, content: Any) -> None:
    folder = run_folder()
    (folder / "ledger.json").write_text(content, encoding="utf-8")
    (run,) = read_runs([folder])
    assert run.ledger == {} and "ledger.json" in run.notes[0]
