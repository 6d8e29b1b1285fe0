"""Curves come from the logs, on the reference clock."""

from __future__ import annotations

from pathlib import Path

import pytest

from hf_ema_scaling.report import curve, plot_runs

HISTORY = [
    {"loss": 2.0, "ema/momentum": 0.9, "clock/reference_step": 10.0},
    {"eval_wer": 0.5, "eval_ema_wer": 0.4, "clock/reference_step": 10.0},
    {"eval_wer": 0.3, "eval_ema_wer": 0.2, "clock/reference_step": 20.0},
    {"train_loss": 1.0},
]


def test_curve_takes_only_rows_with_the_key() -> None:
    assert curve(HISTORY, "eval_ema_wer") == ([10.0, 20.0], [0.4, 0.2])
    assert curve(HISTORY, "pseudo/kept") == ([], [])


def test_plot_is_a_png_that_depends_on_the_curves(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    plot_runs({"a": HISTORY}, tmp_path / "one.png", start=5.0)
    plot_runs({"a": HISTORY, "b": HISTORY[:2]}, tmp_path / "two.png", start=5.0)
    one, two = ((tmp_path / name).read_bytes() for name in ("one.png", "two.png"))
    assert one[:8] == b"\x89PNG\r\n\x1a\n" and one != two
