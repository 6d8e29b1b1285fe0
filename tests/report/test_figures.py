"""Curves come from the logs, on the reference clock."""

from __future__ import annotations

from pathlib import Path

import pytest
from report_runs import write_run

from hf_ema_scaling.report import curve, draw_figures, figures, plot_runs, read_runs, write_report
from hf_ema_scaling.report.charts import Chart, Line

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


def test_a_single_value_is_drawn_as_a_bar_of_its_length() -> None:
    pytest.importorskip("matplotlib")
    lines = [Line("student", 0, [2000.0], [0.25], dashed=True), Line("average", 0, [2000.0], [0.125])]
    axis = figures._new_figure((4, 3)).subplots()
    label = figures._draw_bars(axis, Chart("eval_wer", "WER", "reference steps", lines))
    assert label == "at 2000 reference steps"
    assert [bar.get_width() for bar in axis.patches] == [0.25, 0.125]
    assert [text.get_text() for text in axis.texts] == ["0.25", "0.125"]
    assert [text.get_text() for text in axis.get_yticklabels()] == ["student", "average"]
    assert not axis.lines


def test_marks_are_told_and_momenta_end_at_one() -> None:
    pytest.importorskip("matplotlib")
    axis = figures._new_figure((4, 3)).subplots()
    line = Line("", 0, [10.0, 30.0], [0.985, 0.985])
    figures._draw_chart(axis, Chart("ema/momentum", "Momentum", "reference steps", [line], [(20.0, "new batch")]))
    assert [(text.get_text(), text.xy) for text in axis.texts] == [("new batch", (20.0, 0))]
    low, high = axis.get_ylim()
    assert 0 < low < 0.985 < high < 1.003


def test_figures_of_a_run_are_those_of_its_report(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    folder = write_run(tmp_path / "run")
    names = draw_figures(folder, tmp_path / "drawn")
    _, *written = write_report(read_runs([folder]), tmp_path / "report.html")
    assert (
        [path.name for path in written] == names == ["metrics.png", "training.png", "average.png", "pseudo_labels.png"]
    )
    assert [(tmp_path / "drawn" / name).read_bytes() for name in names] == [path.read_bytes() for path in written]
