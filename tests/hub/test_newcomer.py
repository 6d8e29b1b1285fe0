"""A newcomer's way, by commands alone: own recordings, the recipe for speech, a push, and what others load."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hub.loopback import Hub, loopback
from hub.test_round_trip import COMMANDS, environment
from manifests import write_manifest

ROOT = Path(__file__).parents[2]
ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch"]


def said(words: list[str], own: dict[str, str], folder: Path) -> str:
    """What a command prints, run in a folder."""
    done = subprocess.run(words, env=own, cwd=folder, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def files(hub: Hub) -> set[str]:
    return set(hub.files("tester/mine"))


@pytest.mark.slow
def test_own_recordings_become_a_model_on_the_hub(tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    for number, name in enumerate(("labelled", "unlabelled", "evaluation")):
        write_manifest(mine / f"{name}.jsonl", 8, seed=number, labelled=name != "unlabelled")
    sources = [
        word for name in ("labelled", "unlabelled", "evaluation") for word in (f"--{name}", f"mine/{name}.jsonl")
    ]
    config = ROOT / "recipes" / "configs" / "asterisk_en.yaml"
    short = [
        "--max_steps",
        "6",
        "--pl_start",
        "3",
        "--warmup_steps",
        "0",
        "--max_labelled",
        "8",
        "--logging_steps",
        "1",
    ]
    script = [str(ROOT / "recipes" / "asr_ctc.py"), "--config", str(config), "--output_dir", "runs/mine"]
    launch = [*ACCELERATE, "--config_file", str(ROOT / "recipes" / "accelerate" / "one_process.yaml")]
    with loopback() as hub:
        own = environment(hub, tmp_path / "home") | {"OMP_NUM_THREADS": "1"}
        own["PYTHONPATH"] = os.pathsep.join([str(ROOT), own["PYTHONPATH"]])
        printed = said([*launch, *script, *sources, *short], own, tmp_path)
        assert "6 optimizer steps" in printed and "average" in printed and hub.requests == []
        run = tmp_path / "runs" / "mine"
        pushed = [sys.executable, "-c", COMMANDS, "push", "runs/mine", "--repo_id", "tester/mine", "--license", "mit"]
        assert "tester/mine is at " in said(pushed, own, tmp_path)
        out = tmp_path / "out.json"
        words = [sys.executable, str(Path(__file__).with_name("newcomer.py")), "tester/mine", str(run)]
        said([*words, str(mine / "wav" / "evaluation0.wav"), str(out)], own, tmp_path)
        there = files(hub)
        card = hub.files("tester/mine")["README.md"].decode()
    result = json.loads(out.read_text(encoding="utf-8"))
    assert result["average"]["same"] and result["student"]["same"]
    assert result["average"]["sum"] != result["student"]["sum"]
    assert {"model.safetensors", "student/model.safetensors", "README.md", "metrics.json", "run.json"} <= there
    assert {f"{folder}processor_config.json" for folder in ("", "student/")} <= there
    assert not any("optimizer" in name or name.endswith(".bin") for name in there)
    metrics = json.loads((run / "metrics.json").read_text())
    assert f"| {metrics['eval_ema_cer']:.4f} | {metrics['eval_cer']:.4f} |" in card


@pytest.mark.slow
def test_a_recipe_pushes_as_it_ends(tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    for name in ("labelled", "evaluation"):
        write_manifest(mine / f"{name}.jsonl", 4, seed=len(name))
    config = ROOT / "recipes" / "configs" / "asterisk_en.yaml"
    words = [sys.executable, str(ROOT / "recipes" / "asr_ctc.py"), "--config", str(config), "--unlabelled", "null"]
    words += ["--labelled", "mine/labelled.jsonl", "--evaluation", "mine/evaluation.jsonl", "--max_steps", "2"]
    words += ["--warmup_steps", "0", "--output_dir", "run", "--push_to_hub", "true", "--hub_model_id", "tester/mine"]
    with loopback() as hub:
        own = environment(hub, tmp_path / "home") | {"OMP_NUM_THREADS": "1"}
        own["PYTHONPATH"] = os.pathsep.join([str(ROOT), own["PYTHONPATH"]])
        said(words, own, tmp_path)
        pushed = hub.files("tester/mine")
    assert pushed["model.safetensors"] == (tmp_path / "run" / "ema" / "model.safetensors").read_bytes()
    assert pushed["student/model.safetensors"] == (tmp_path / "run" / "model.safetensors").read_bytes()
    assert json.loads(pushed["metrics.json"])["optimizer_steps"] == 2
