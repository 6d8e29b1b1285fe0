"""The arithmetic of the step benchmark, and that it runs."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import tiny

SCRIPT = Path(__file__).parents[2] / "scripts" / "benchmark_step.py"


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("benchmark_step", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["benchmark_step"] = module  # where dataclasses look their annotations up
    spec.loader.exec_module(module)
    return module


script = load()


def test_a_step_with_the_cache_is_compared_at_the_mean_number_of_labels() -> None:
    # 2 s and half a second for each item; noise only ever adds.
    times = [2.0, 2.9, 2.5, 2.6, 3.0, 2.1]
    counts = [0, 1, 1, 1, 2, 0]
    assert script.expected_time(times, counts, 0.6) == pytest.approx(2.3, rel=1e-12)
    assert script.expected_time([2.2, 2.1], [1, 1], 0.6) == 2.1
    # A slope below 0 is noise.
    assert script.expected_time([2.0, 1.9], [0, 1], 0.6) == pytest.approx(2.0, rel=1e-12)


def test_the_share_of_real_frames() -> None:
    lengths = np.array([1.0, 4.0, 2.0, 2.0])
    assert script.real_share(lengths, [np.array([0, 1]), np.array([2, 3])]) == 9 / 12
    assert script.real_share(lengths, [np.array([3, 2]), np.array([0]), np.array([1])]) == 1.0


def test_buckets_pad_less_than_random_batches(tmp_path: Path) -> None:
    found = script.measure_padding(str(tmp_path), script.QUICK)
    assert found["bucketed"] > 0.9 and found["random"] < 0.6


def test_trainers_take_turns(tmp_path: Path) -> None:
    order: list[str] = []

    def made(name: str) -> Any:
        trainer = tiny.trainer(tiny.bert(), tiny.arguments(tmp_path, max_steps=3), tiny.sentences(12))
        inner = trainer.training_step
        trainer.training_step = lambda *args, **more: (order.append(name), inner(*args, **more))[1]
        return trainer

    alone = made("alone")
    alone.train()
    arms = [script.Turn(made(name)) for name in "ab"]
    for _ in range(3):
        for arm in arms:
            arm.step()
    for arm in arms:
        arm.end()
    assert order == ["alone"] * 3 + ["a", "b"] * 3
    for arm in arms:
        assert arm.trainer.state.global_step == 3 and len(arm.seconds) == 3 and min(arm.seconds) > 0
        assert tiny.same_bits(tiny.parameters(arm.trainer.model), tiny.parameters(alone.model))


def test_a_trainer_that_fails_is_reported(tmp_path: Path) -> None:
    trainer = tiny.trainer(tiny.bert(), tiny.arguments(tmp_path, max_steps=3), tiny.sentences(12))

    def broken(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError("no data")

    trainer.training_step = broken
    with pytest.raises(ZeroDivisionError, match="no data"):
        script.Turn(trainer).step()


@pytest.mark.slow
@pytest.mark.parametrize("json_output", [False, True])
def test_it_runs(json_output: bool) -> None:
    command = [sys.executable, str(SCRIPT), "--quick", *(["--json"] if json_output else [])]
    paths = [str(SCRIPT.parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in paths if path)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    if not json_output:
        for line in ("plain Trainer", "a cache refreshed by 0.1", "kappa 16", "length buckets"):
            assert line in done.stdout
        return
    found = json.loads(done.stdout)
    assert set(found) == {
        "pl_over_supervised",
        "pl_cached_over_supervised",
        "memory_kappa16_over_kappa1",
        "real_frame_share",
    }
    assert found["pl_cached_over_supervised"] > 0.5 and 0.9 < found["real_frame_share"] <= 1
    assert 0.9 < found["memory_kappa16_over_kappa1"] < 1.5
