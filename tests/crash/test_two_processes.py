"""SIGTERM to one process of two stops both after the same step; both resume from what the first of them chooses."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch

from hf_ema_scaling.training.checkpoints import what_is_missing


@pytest.mark.distributed
@pytest.mark.slow
def test_processes_stop_together_and_go_on_together(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    tests = Path(__file__).parents[1]
    paths = [str(tests), str(tests.parent), os.environ.get("PYTHONPATH", "")]
    common = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "true",
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
    }
    processes = [
        subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("two_processes.py")), str(tmp_path)],
            env=os.environ | common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=600)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, output in zip(processes, outputs, strict=True):
        assert process.returncode == 0, output[-5000:]
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    for results in (first, second):
        assert (results["code"], results["stopped"]) == (143, 3)
        assert "trainer_state.json is missing" in results["refused"]
        whole, resumed = results["whole"], results["resumed"]
        assert tiny.same_bits(resumed["weights"], whole["weights"])
        assert tiny.same_bits(resumed["average"], whole["average"])
        assert resumed["drawn"] == whole["drawn"][3:] and resumed["losses"] == whole["losses"]
    assert tiny.same_bits(first["resumed"]["average"], second["resumed"]["average"])
    # One checkpoint is kept; what was half-written is gone, though its number was higher when 4 was saved.
    assert [path.name for path in (tmp_path / "told").iterdir()] == ["checkpoint-6"]
    assert what_is_missing(tmp_path / "told" / "checkpoint-6") == []
    assert {path.name for path in (tmp_path / "told" / "checkpoint-6").glob("rng*")} == {
        "rng_state_0.pth",
        "rng_state_1.pth",
    }
    for output in outputs:
        assert output.count("SIGTERM: training saves a checkpoint and stops.") == 1
