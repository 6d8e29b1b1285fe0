from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import typer
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "accelerate_loop.py"
RUN: dict[str, Any] = {"kappa": 4, "reference_steps": 32, "save_every": 16, "pseudo_labels": True, "dropout": 0.1}


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("accelerate_loop", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def _fresh_accelerator() -> Iterator[None]:
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def same(a: Path, b: Path) -> bool:
    """Whether two checkpoints hold the same student, average and optimizer, bit for bit."""
    for name in ("model.safetensors", "ema/model.safetensors"):
        first, second = load_file(a / name), load_file(b / name)
        if first.keys() != second.keys() or not all(torch.equal(first[key], second[key]) for key in first):
            return False
    moments = [torch.load(folder / "optimizer.bin", weights_only=True)["state"] for folder in (a, b)]
    return all(torch.equal(moments[0][i][key], moments[1][i][key]) for i in moments[0] for key in moments[0][i])


def test_a_resumed_loop_ends_with_the_same_bits(
    script: ModuleType, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    monkeypatch.setattr(script, "PL_START", 8)
    monkeypatch.setattr(script, "CONFIDENCE", 0.0)
    monkeypatch.setattr(script, "ROWS", 192)  # three steps to an epoch, so the checkpoint is in the middle of one
    script.main(tmp_path / "whole", **RUN)
    # Steps 1 to 5, saved at 4.
    script.main(tmp_path / "parts", stop_after=20, **RUN)
    assert [path.name for path in (tmp_path / "parts").iterdir()] == ["step-4"]
    script.main(tmp_path / "parts", resume=True, **RUN)
    assert "at reference step 16" in capsys.readouterr().out
    for step in ("step-4", "step-8"):
        assert same(tmp_path / "whole" / step, tmp_path / "parts" / step)
    assert not same(tmp_path / "whole" / "step-4", tmp_path / "whole" / "step-8")
    final = load_file(tmp_path / "parts" / "average" / "model.safetensors")
    saved = load_file(tmp_path / "whole" / "step-8" / "ema" / "model.safetensors")
    assert all(torch.equal(final[name], saved[name]) for name in saved)


def test_the_average_labels(script: ModuleType, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(script, "CONFIDENCE", 0.0)
    results = []
    for start in (0, 10_000):
        monkeypatch.setattr(script, "PL_START", start)
        script.main(tmp_path / str(start), **RUN)
        results.append(load_file(tmp_path / str(start) / "step-8" / "model.safetensors"))
    assert any(not torch.equal(results[0][name], results[1][name]) for name in results[0])


@pytest.mark.parametrize("changes", [{"kappa": 3}, {"resume": True}, {"save_every": 10}])
def test_what_cannot_be_run_is_refused(script: ModuleType, tmp_path: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(typer.BadParameter):
        script.main(tmp_path, **(RUN | changes))


def launch(folder: Path, *options: str) -> None:
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--cpu", "--num_processes", "2"]
    command += ["--main_process_port", "0", str(SCRIPT), str(folder), "--kappa", "4", "--reference-steps", "32"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    environment |= {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(
        [*command, "--save-every", "16", *options], env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-5000:]


@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes_resume_bit_for_bit_and_equal_one(script: ModuleType, tmp_path: Path) -> None:
    launch(tmp_path / "two", "--dropout", "0")
    launch(tmp_path / "dropped", "--pseudo-labels")
    shutil.copytree(tmp_path / "dropped", tmp_path / "parts")
    shutil.rmtree(tmp_path / "parts" / "step-8")
    launch(tmp_path / "parts", "--pseudo-labels", "--resume")
    assert same(tmp_path / "dropped" / "step-8", tmp_path / "parts" / "step-8")

    script.main(tmp_path / "one", **(RUN | {"dropout": 0.0, "pseudo_labels": False}))
    for name in ("model.safetensors", "ema/model.safetensors"):
        one, two = (load_file(tmp_path / runs / "step-8" / name) for runs in ("one", "two"))
        for key in one:
            torch.testing.assert_close(one[key], two[key], rtol=0, atol=1e-6)
