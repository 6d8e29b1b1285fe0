"""Starts runs that are killed and started again (`tests/crash/lives.py`), and reads what they leave behind."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

VOLATILE = ("runtime", "per_second", "train_loss", "preparation_time")
"""Parts of names in the log that no run reproduces."""


class Lives:
    """Starts lives of a run, one after the other, forked from a process that has imported everything."""

    def __init__(self) -> None:
        tests = Path(__file__).parent
        paths = [str(tests), str(tests.parent), os.environ.get("PYTHONPATH", "")]
        self.process = subprocess.Popen(
            [sys.executable, str(tests / "crash" / "lives.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(path for path in paths if path)},
        )

    def live(self, folder: Path, *, kill_after: float | None = None, by: int = signal.SIGKILL, **command: Any) -> int:
        """One life, ended after some seconds if `kill_after` is given; its exit code, or minus the signal."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps({"folder": str(folder), **command}) + "\n")
        pids = json.loads(self.process.stdout.readline())["pids"]
        if kill_after is not None and not select.select([self.process.stdout], [], [], kill_after)[0]:
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):  # killed with the one before
                    os.kill(pid, by)
        return int(json.loads(self.process.stdout.readline())["status"])

    def end(self) -> int:
        assert self.process.stdin is not None
        self.process.stdin.close()
        return self.process.wait(timeout=60)


def log(folder: Path, rank: str = "") -> str:
    path = folder.with_suffix(f".log{rank}")
    return path.read_text(encoding="utf-8")[-6000:] if path.exists() else ""


def ended(folder: Path, rank: str = "") -> tuple[int, list[int]]:
    """How many points a life had, and which of them were files of tensors."""
    counts = json.loads(log(folder, rank).split("ENDED ")[-1].splitlines()[0])
    return counts["points"], counts["tensors"]


def drawn(folder: Path, rank: str = "") -> list[tuple[int, Any]]:
    """What the steps of all lives drew, by their numbers."""
    path = folder.with_suffix(f".drawn{rank}")
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [tuple(json.loads(line)) for line in lines if line.endswith("\n")]


def assert_same_draws(folder: Path, reference: Path, rank: str = "") -> None:
    """Every step was taken, and in every life drew what it drew in the run that nothing interrupted."""
    written, expected = drawn(folder, rank), dict(drawn(reference, rank))
    assert {step for step, _ in written} == expected.keys()
    for step, items in written:
        assert items == expected[step], step


def trainer_state(content: bytes, logs: int) -> dict[str, Any]:
    """Trainer's state without what is not reproducible, and where it lies."""
    state = json.loads(content)
    state["best_model_checkpoint"] = Path(state["best_model_checkpoint"] or "").name
    state["log_history"] = [
        {key: value for key, value in entry.items() if not any(word in key for word in VOLATILE)}
        for entry in state["log_history"]
    ]
    assert len(state["log_history"]) == logs
    return dict(state)


def files(folder: Path) -> dict[str, bytes]:
    """Content by name; of `checksums.json` without what is not reproducible."""
    found = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    if "checksums.json" in found:
        record = json.loads(found["checksums.json"])
        del record["crc32"]["trainer_state.json"], record["own_crc32"]
        found["checksums.json"] = json.dumps(record).encode()
    return found
