"""Bars show the step just done; where nobody watches there are none."""

from __future__ import annotations

import io
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from hf_ema_scaling.scaling import BatchSchedule, Recipe, ScalingPlan
from hf_ema_scaling.training import progress
from hf_ema_scaling.training.progress import ScalingProgress, step_values


class Terminal(io.StringIO):
    def __init__(self, watched: bool) -> None:
        super().__init__()
        self.watched = watched

    def isatty(self) -> bool:
        return self.watched


def trainer(folder: Path, **more: Any) -> Any:
    args = tiny.arguments(folder, max_steps=12, kappa=2.0, per_device_train_batch_size=4, logging_strategy="steps",
                          logging_steps=2, eval_strategy="steps", eval_steps=8, disable_tqdm=False)  # fmt: skip
    return tiny.trainer(
        tiny.wav2vec2(), args, tiny.speech(16), eval_dataset=tiny.speech(4, seed=1),
        unlabeled_dataset=tiny.speech(16, seed=2, labels=False), labeler=tiny.ContentLabeler(),
        pseudo_label_args=tiny.pseudo(pl_start=4), **more,
    )  # fmt: skip


def run(folder: Path, monkeypatch: pytest.MonkeyPatch, *, watched: bool) -> tuple[Any, list[str]]:
    """A run, and what its bars were followed by after each step."""
    terminal = Terminal(watched)
    monkeypatch.setattr(sys, "stderr", terminal)
    shown: list[str] = []

    class Every(ScalingProgress):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            super().on_step_end(*args, **kwargs)
            shown.append(self.training_bar.postfix if watched else terminal.getvalue())

    monkeypatch.setattr(progress, "ScalingProgress", Every)
    made = trainer(folder)
    made.train()
    return made, shown if watched else [terminal.getvalue()]


def test_bars_show_clock_kappa_momentum_and_share_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, shown = run(tmp_path, monkeypatch, watched=True)
    clocks = [1, 2, 3, 4, 6, 8, 10, 12]
    found = [dict(re.findall(r"(\w+)=([\d.]+%?)", text)) for text in shown]
    assert [float(values["clock"]) for values in found] == clocks
    assert [float(values["kappa"]) for values in found] == [1] * 4 + [2] * 4
    assert [values["momentum"] for values in found] == ["0.90000"] * 4 + ["0.81000"] * 4
    # A share is known from the first log with labels on.
    kept = [f"{row['pseudo/kept']:.0%}" for row in made.state.log_history if "pseudo/kept" in row]
    assert [values.get("kept") for values in found] == [None] * 5 + kept[:3] and len(set(kept)) > 1


def test_without_a_terminal_there_are_logs_but_no_bars(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _, (text,) = run(tmp_path, monkeypatch, watched=False)
    assert "it/s" not in text and "%|" not in text
    logs = [line for line in capsys.readouterr().out.splitlines() if "ema/momentum" in line]
    assert len(logs) == 6


def test_only_the_bars_of_trainer_are_replaced(tmp_path: Path) -> None:
    class Own(ProgressCallback):
        pass

    made = trainer(tmp_path, callbacks=[Own()])
    kinds = [type(callback) for callback in made.callback_handler.callbacks]
    assert Own in kinds and ScalingProgress in kinds and ProgressCallback not in kinds
    quiet = tiny.trainer(tiny.bert(), tiny.arguments(tmp_path), tiny.sentences(8))
    kinds = [type(callback) for callback in quiet.callback_handler.callbacks]
    assert PrinterCallback in kinds and ScalingProgress not in kinds


def test_values_are_short() -> None:
    plan = ScalingPlan(Recipe(8, "samples", 3000, 0.01, 0.999), BatchSchedule.constant(28))
    values = step_values(plan, plan.step(0), 0.987)  # type: ignore[arg-type]
    assert values == {"kappa": "3.5", "momentum": f"{0.999**3.5:.5f}", "kept": "99%"}
    assert "kept" not in step_values(plan, plan.step(0))  # type: ignore[arg-type]
