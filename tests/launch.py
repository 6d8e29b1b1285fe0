"""Runs a script on two gloo processes of this machine, or on more."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

SECONDS = 600
"""More than any of the scripts takes on a busy machine: processes that wait for each other forever end then."""


def _environment() -> dict[str, str]:
    tests = Path(__file__).parent
    paths = [str(tests), str(tests.parent), str(tests / "distributed"), os.environ.get("PYTHONPATH", "")]
    own = {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(path for path in paths if path)}
    return os.environ | own


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


def _wait(processes: list[subprocess.Popen[str]]) -> list[str]:
    try:
        outputs = [process.communicate(timeout=SECONDS)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, output in zip(processes, outputs, strict=True):
        assert process.returncode == 0, output[-6000:]
    return outputs


def _start(command: list[str], environment: dict[str, str]) -> subprocess.Popen[str]:
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def results(folder: Path, count: int = 2) -> list[dict[str, Any]]:
    """What each process saved."""
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(count)]


def on_processes(count: int, script: str, *arguments: str) -> list[str]:
    """Runs `python script arguments` so many times, as the ranks of one group; what each printed."""
    common = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "ACCELERATE_USE_CPU": "true",
    }
    command = [sys.executable, script, *arguments]
    ranks = [common | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]
    return _wait([_start(command, _environment() | rank) for rank in ranks])


def on_two_processes(script: str, *arguments: str) -> list[str]:
    """Runs `python script arguments` twice, as ranks 0 and 1 of one group; what each printed."""
    return on_processes(2, script, *arguments)


def by_accelerate(script: str, *arguments: str) -> None:
    """Runs `accelerate launch --multi_gpu --num_processes 2 script arguments`; the script asks for the CPU itself.

    `--cpu` would start one process, whatever `--num_processes` says: with several it needs MPI.
    """
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    options = ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    command = [*launch, *options, "--main_process_port", str(free_port()), script, *arguments]
    _wait([_start(command, _environment())])
