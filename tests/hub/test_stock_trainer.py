"""Checkpoints that the stock `Trainer` pushes as it trains have the average of `EMACallback`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import stock_runs
from hub.loopback import Hub
from safetensors.torch import load

from hf_ema_scaling.ema import storage

NAME = "tester/stock"


@pytest.mark.parametrize("strategy", ["all_checkpoints", "checkpoint"])
def test_a_pushed_checkpoint_has_its_average(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, strategy: str
) -> None:
    """Trainer pushes before `on_save`, in a thread: an average written then would be missing, or there in part."""
    averages = [stock_runs.callback(), stock_runs.callback(momentum=0.5, name="fast")]
    recorders = [stock_runs.Recorder(average) for average in averages]
    saved: list[str] = []
    flush: Callable[[Path], None] = storage.flush

    def noted(folder: Path) -> None:
        saved.append(folder.name)
        flush(folder)

    monkeypatch.setattr(storage, "flush", noted)
    run = stock_runs.trainer(
        averages[0],
        tmp_path / "run",
        averages[1],
        *recorders,
        save_strategy="steps",
        save_steps=3,
        save_total_limit=1,
        push_to_hub=True,
        hub_model_id=NAME,
        hub_strategy=strategy,
        hub_always_push=True,
    )
    run.train()
    files = hub.files(NAME)
    steps = {"checkpoint-3": 3, "checkpoint-6": 6} if strategy == "all_checkpoints" else {"last-checkpoint": 6}
    for folder, step in steps.items():
        for name, recorder in zip(("ema", "ema-fast"), recorders, strict=True):
            assert stock_runs.same(load(files[f"{folder}/{name}/model.safetensors"]), recorder.average[step - 1])
            assert f"{folder}/{name}/ema_state.json" in files
    assert not [name for name in files if "partial" in name]
    # Written once, and what a run resumes from.
    assert saved == [".ema.partial", ".ema-fast.partial"] * 2
    resumed: list[Any] = [stock_runs.callback(), stock_runs.callback(momentum=0.5, name="fast")]
    again = stock_runs.trainer(resumed[0], tmp_path / "run", resumed[1], max_steps=7)
    again.train(resume_from_checkpoint=True)
    assert [average.average.num_updates for average in resumed] == [7, 7]
