"""The script of the sweep, over the smallest speech recipe, in processes of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from hf_ema_scaling.recipe.config import read_mapping

SCRIPT = Path(__file__).parents[2] / "scripts" / "kappa_sweep.py"
CHANGES = {"max_steps": 6, "pl_start": 2, "eval_steps": 2, "ema_momentum": 0.9, "noise_scale_every": 1}


def sweep(recipe: Path, folder: Path, *argv: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), str(recipe), "--output_dir", str(folder), "--seeds", "0", *argv]
    return subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(SCRIPT.parents[1])}
    )


@pytest.fixture
def recipe(config: Path, tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(read_mapping(config) | CHANGES), encoding="utf-8")
    return path


@pytest.mark.slow
def test_pseudo_labelled_speech_in_two_processes(recipe: Path, tmp_path: Path) -> None:
    arguments = ("--kappas", "0.5,2", "--metric", "eval_wer", "--json", "--processes", "2")
    done = sweep(recipe, tmp_path / "sweep", *arguments)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert [(row["arm"], row["kappa"], row["optimizer_steps"]) for row in found["runs"]] == [
        *(("rule", 0.5, 10), ("rule", 1.0, 6), ("rule", 2.0, 4)),
        *(("unscaled", 0.5, 10), ("unscaled", 2.0, 4), ("none", 2.0, 4)),
        *(("spread", 1.0, 6), ("spread", 1.0, 6), ("dropout", 1.0, 6)),
    ]
    assert {each["distance"] for each in found["bounds"]} == {"weights", "loss", "wer"}
    rule = {row["kappa"]: row for row in found["runs"] if row["arm"] == "rule"}
    assert rule[1.0]["distance/weights/average"] == 0 < rule[2.0]["distance/weights/average"]
    assert {"seed 0, phase", "seed 0, spread 2, kappa 1"} <= {
        line.partition(":")[0] for line in done.stderr.splitlines()
    }
    for name in ("sweep.md", "sweep.csv", "sweep.png"):
        assert (tmp_path / "sweep" / name).is_file()
    again = sweep(recipe, tmp_path / "sweep", *arguments)
    assert json.loads(again.stdout) == found and "seed 0" not in again.stderr
    other = sweep(recipe, tmp_path / "sweep", *arguments[:2], "--metric", "per")
    assert other.returncode == 1 and "metric 'per' was not measured" in other.stderr and "wer" in other.stderr


@pytest.mark.slow
def test_what_cannot_be_run_is_refused_before_training(recipe: Path, tmp_path: Path) -> None:
    for argv, reason in (
        (("--kappas", "1,x"), "comma-separated numbers are expected, got '1,x'"),
        (("--kappas", "3"), "must be multiples of the largest kappa"),
    ):
        done = sweep(recipe, tmp_path / "sweep", *argv)
        assert done.returncode != 0 and reason in " ".join(done.stderr.replace("│", " ").split()), done.stderr
    assert not (tmp_path / "sweep").exists()
