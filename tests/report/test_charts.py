"""Which charts there are, and what of long curves is drawn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hf_ema_scaling.report.charts import (
    Chart,
    HeatMap,
    Line,
    Section,
    describe,
    metric_names,
    metric_title,
    sections,
    thinned,
    title_of,
)
from hf_ema_scaling.report.runs import Run
from hf_ema_scaling.report.svg import scale, tick_text, ticks


def run_of(name: str = "a", **values: list[float]) -> Run:
    """One entry of the log every 10 reference steps, or 5 optimizer steps."""
    count = max(map(len, values.values()))
    rows = [
        {key: column[i] for key, column in values.items() if i < len(column)}
        | {"clock/reference_step": 10.0 * i + 10, "step": 5 * i + 5}
        for i in range(count)
    ]
    return Run(name, Path(name), rows, 5 * count, recipe={"reference_batch_size": 16, "unit": "samples"})


def by_key(found: list[Section]) -> dict[str, list[tuple[str, str]]]:
    return {section.slug: [(chart.key, chart.x_label) for chart in section.charts] for section in found}


def test_every_key_has_a_place() -> None:
    keys = ["loss", "epoch", "total_flos", "train_loss", "eval_wer", "eval_runtime", "ema/kappa", "ema/momentum"]
    keys += ["pseudo/new_thing", "hidden/wer", "noise/scale", "reward", "mine/x", "clock/other"]
    found = by_key(sections([run_of(**{key: [1.0, 2.0] for key in keys})]))
    clock = "reference steps"
    assert found == {
        "metrics": [("eval_wer", clock), ("eval_wer", "optimizer steps")],
        "training": [("loss", clock)],
        "average": [("ema/momentum", clock), ("ema/kappa", clock)],
        "pseudo_labels": [("pseudo/new_thing", clock), ("hidden/wer", clock)],
        "noise": [("noise/scale", clock)],
        "other": [("reward", clock), ("mine/x", clock)],
    }


def test_other_reference_batches_are_compared_by_data_too() -> None:
    a, b = run_of("a", eval_wer=[1.0, 0.5]), run_of("b", eval_wer=[1.0, 0.5])
    b.recipe["reference_batch_size"] = 32  # type: ignore[index]
    charts = sections([a, b])[0].charts
    assert [chart.x_label for chart in charts] == ["reference steps", "optimizer steps", "data seen (samples)"]
    assert isinstance(charts[2], Chart) and [line.x for line in charts[2].lines] == [[160.0, 320.0], [320.0, 640.0]]


def test_titles_are_words() -> None:
    names = ["wer", "dev_clean_wer", "probe_accuracy", "clean_accuracy", "clean_loss", "my_score"]
    assert [metric_title(name) for name in names] == [
        *("WER", "WER on dev clean", "Probe accuracy", "Accuracy on clean", "Loss on clean", "My score"),
    ]
    keys = [
        "ema/momentum",
        "pseudo/empty_share",
        "hidden/wer",
        "student/loss/kept",
        "calibration/ece",
        "a_margin",
    ]
    assert [title_of(key) for key in keys] == [
        *("Momentum per optimizer step", "Pseudo-labels: empty share", "Against the hidden truth: WER"),
        *("Student's loss: loss, kept", "Calibration: ece", "A margin"),
    ]


def test_one_value_is_shown_once() -> None:
    charts = sections([run_of(eval_wer=[0.5], eval_ema_wer=[0.4], loss=[1.0, 2.0])])[0].charts
    assert [(chart.title, chart.x_label) for chart in charts] == [("WER", "reference steps")]
    assert isinstance(charts[0], Chart) and charts[0].single


def test_student_and_average_share_a_chart() -> None:
    runs = [run_of("a", eval_dev_wer=[0.5], eval_ema_dev_wer=[0.4]), run_of("b", eval_dev_wer=[0.6])]
    chart = sections(runs)[0].charts[0]
    assert isinstance(chart, Chart)
    assert [(line.name, line.run, line.y, line.dashed) for line in chart.lines] == [
        ("a: student", 0, [0.5], True),
        ("a: average", 0, [0.4], False),
        ("b: student", 1, [0.6], True),
    ]
    assert metric_names(runs) == ["dev_wer"]


def test_losses_are_the_last_metrics() -> None:
    runs = [run_of(eval_loss=[1.0], eval_wer=[1.0], eval_ema_cer=[1.0], eval_steps_per_second=[1.0])]
    assert metric_names(runs) == ["wer", "cer", "loss"]


def test_the_histogram_of_confidence_is_one_map() -> None:
    run = run_of(**{"confidence/0.5": [0.75, 0.25], "confidence/0.0": [0.25, 0.75], "pseudo/kept": [1.0, 1.0]})
    (section,) = sections([run])
    assert [chart.key for chart in section.charts] == ["pseudo/kept", "confidence"]
    chart = section.charts[1]
    assert isinstance(chart, HeatMap)
    assert (chart.bins, chart.x, chart.shares) == ([0.0, 0.5], [10.0, 20.0], [[0.25, 0.75], [0.75, 0.25]])
    assert "0.375 at first, 0.125 at last" in describe(chart)


def test_marks_say_where_pseudo_labels_and_stages_begin() -> None:
    run = run_of(loss=[1.0, 0.5])
    run.recipe["pl_start"] = 10  # type: ignore[index]
    staged = Run(run.name, run.folder, run.history, 10, plan={"stages": [{"start": 0}, {"start": 10}, {"start": 15}]},
                 recipe=run.recipe)  # fmt: skip
    chart = sections([staged])[0].charts[0]
    assert isinstance(chart, Chart)
    assert chart.marks == ((10.0, "pseudo-labels start, new batch"), (15.0, "new batch"))


def test_too_many_marks_give_way_to_the_shared_ones() -> None:
    runs = []
    for number in range(7):
        run = run_of(f"r{number}", loss=[1.0])
        stages = [{"start": 0}, {"start": 5}, {"start": 6 + number / 10}]
        runs.append(Run(run.name, run.folder, run.history, 5, plan={"stages": stages}))
    chart = sections(runs)[0].charts[0]
    assert isinstance(chart, Chart) and chart.marks == ((5.0, "new batch"),)


def test_long_curves_keep_ends_and_extremes() -> None:
    y = np.sin(np.arange(10_000) / 50)
    y[1234], y[7777] = 9.0, -9.0
    x, kept = thinned(list(range(10_000)), y.tolist(), 600)
    assert len(x) <= 600 and x == sorted(x) and (x[0], x[-1]) == (0, 9_999)
    assert kept == [y[place] for place in x]  # type: ignore[call-overload]
    assert x[kept.index(9.0)] == 1234 and x[kept.index(-9.0)] == 7777
    assert thinned([1.0, 2.0], [3.0, 4.0], 600) == ([1.0, 2.0], [3.0, 4.0])


def test_steps_hold_each_value_since_the_last() -> None:
    line = Line("a", 0, [10, 20, 30], [1.0, 4.0, 4.0], stepped=True)
    assert line.corners() == [(10, 1.0), (10, 4.0), (20, 4.0), (20, 4.0), (30, 4.0)]
    assert Line("a", 0, [10, 20], [1.0, 4.0]).corners() == [(10, 1.0), (20, 4.0)]


@pytest.mark.parametrize(
    ("key", "values", "expected"),
    [("loss", [1.0, 1000.0], True), ("loss", [1.0, 100.0], False), ("loss", [0.0, 1000.0], False),
     ("learning_rate", [1e-6, 1.0], False)],
)  # fmt: skip
def test_only_wide_positive_values_are_logarithmic(key: str, values: list[float], expected: bool) -> None:
    assert Chart(key, key, "", [Line("a", 0, [0.0, 1.0], values)]).logarithmic is expected


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0, 2000, [0, 500, 1000, 1500, 2000]), (0.31, 0.79, [0.4, 0.5, 0.6, 0.7]), (-1, 1, [-1, -0.5, 0, 0.5, 1]),
     (0, 6, [0, 1, 2, 3, 4, 5, 6]), (0.979, 0.9991, [0.98, 0.985, 0.99, 0.995])],
)  # fmt: skip
def test_ticks_are_round(low: float, high: float, expected: list[float]) -> None:
    assert ticks(low, high) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("value", "others", "expected"),
    [(0.5, [0.0, 0.5], "0.5"), (0.2, [0.0, 0.2, 0.4], "0.2"), (2000, [0, 500, 2000], "2000"),
     (0.985, [0.98, 0.985], "0.985"), (2e-5, [0.0, 2e-5], "2e-05"), (100.0, [1.0, 10.0, 100.0], "100")],
)  # fmt: skip
def test_ticks_are_told_apart(value: float, others: list[float], expected: str) -> None:
    assert tick_text(value, others) == expected


def test_scales_map_to_pixels() -> None:
    linear = scale([0.0, 10.0], 100, 200, tight=True)
    assert [linear(value) for value in (0, 5, 10)] == [100, 150, 200]
    logarithmic = scale([1.0, 1000.0], 300, 0, logarithmic=True)
    gaps = np.diff([logarithmic(value) for value in (1, 10, 100, 1000)])
    assert gaps == pytest.approx([gaps[0]] * 3) and gaps[0] < 0 and logarithmic.ticks == [1, 10, 100, 1000]
    flat: Any = scale([0.5, 0.5], 0, 100)
    assert flat(0.5) == pytest.approx(50)
    assert scale([0.0, 0.0], 0, 100)(0.0) >= 0


def test_what_never_happened_is_not_drawn() -> None:
    keys = ("skip/total", "pseudo/dropped_empty", "pseudo/kept")
    assert by_key(sections([run_of(**{key: [0.0, 0.0] for key in keys})])) == {
        "pseudo_labels": [("pseudo/kept", "reference steps")]
    }
    found = by_key(sections([run_of(**{key: [0.0, 1.0] for key in keys})]))
    assert {slug: [key for key, _ in charts] for slug, charts in found.items()} == {
        "training": ["skip/total"],
        "pseudo_labels": ["pseudo/kept", "pseudo/dropped_empty"],
    }


@pytest.mark.parametrize(("value", "low", "high"), [(0.985, 0.8865, 1.00394), (1.0, 0.9, 1.004), (0.0, 0.0, 1.0)])
def test_axes_of_shares_end_at_one(value: float, low: float, high: float) -> None:
    chart = sections([run_of(**{"pseudo/kept": [value, value]})])[0].charts[0]
    assert isinstance(chart, Chart) and chart.shared
    found = scale([value, value], 0, 1, share=chart.shared)
    assert (found.low, found.high) == pytest.approx((low, high)) and found.low <= value < found.high
    assert not Chart("pl/weight", "", "", [Line("", 0, [1.0], [1.0])]).shared
    assert not Chart("pseudo/kept", "", "", [Line("", 0, [1.0], [1.5])]).shared
