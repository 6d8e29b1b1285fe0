"""The page says what the logs say, loads nothing, and shows names as text."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from markupsafe import escape
from report_runs import colours, history, plan
from typer.testing import CliRunner

from hf_ema_scaling.cli import main
from hf_ema_scaling.report import read_runs, render, write_report
from hf_ema_scaling.report.charts import title_of
from hf_ema_scaling.report.svg import COLOURS

Write = Callable[..., Path]
Read = Callable[[str], Any]
RUNS = "How far they came and where they ended"


def values_of(chart: dict[str, Any], curve: int) -> list[tuple[float, float]]:
    """Points of a curve, from pixels to values by the chart's own ticks."""
    lines = {axis: np.polyfit([pixel for _, pixel in ticks], [value for value, _ in ticks], 1)
             for axis, ticks in chart["ticks"].items()}  # fmt: skip
    return [(np.polyval(lines["x"], x), np.polyval(lines["y"], y)) for x, y in chart["curves"][curve][1]]


def test_tables_hold_the_numbers_of_the_files(run_folder: Write, read_page: Read) -> None:

    other = run_folder("other", metrics=None, scaling_plan=None, history=history(kappa=1, wer=0.7))
    page = read_page(render(read_runs([run_folder("run"), other])))
    assert page.tables[RUNS][0] == ["", "run", "other"]
    assert page.row(RUNS, "state") == ["finished", "finished"]
    # metrics.json where there is one, else the last of the log; the other's log says what the plan does not.
    assert page.numbers(RUNS, "wer, student") == [0.25, 0.7 - 0.4]
    assert page.numbers(RUNS, "wer, average") == [0.125, 0.7 - 0.05 - 0.4]
    assert page.numbers(RUNS, "kappa at the end") == [4.0, 1.0]
    assert page.numbers(RUNS, "EMA momentum at the end") == [plan().stage_values()[-1]["momentum"], 0.9]
    assert page.numbers(RUNS, "optimizer steps") == [20, 50]
    assert page.numbers(RUNS, "reference steps") == [50, 50]
    assert page.numbers(RUNS, "wall time of training (s)") == [12.5, 12.5]
    assert page.numbers(RUNS, "pseudo-labels kept, last logged") == [1.0, 1.0]
    assert page.row(RUNS, "data seen") == ["400 seconds", "-"]


def test_stages_are_those_of_the_plan(run_folder: Write, read_page: Read) -> None:

    text = render(read_runs([run_folder()]))
    page = read_page(text)
    caption = "Stages of run, at the peak learning rate"
    assert page.tables[caption][0] == ["", "reference", "stage 0", "stage 1"]
    columns = [plan().reference_values(), *plan().stage_values()]
    for heading, key in (("kappa", "kappa"), ("peak learning rate", "learning_rate"), ("EMA momentum", "momentum"),
                         ("optimizer steps", "steps"), ("from reference step", "start")):  # fmt: skip
        assert page.numbers(caption, heading) == [column[key] for column in columns]
    assert page.row(caption, "betas")[0] == "0.9, 0.999"
    assert page.numbers("Recipe at the reference batch", "pl_start") == [10]
    assert plan().warnings() and "Warnings of the plan of run" in page.headings
    assert all(str(escape(warning)) in text for warning in plan().warnings())


def test_curves_run_through_the_logged_points(run_folder: Write, read_page: Read) -> None:
    page = read_page(render(read_runs([run_folder()])))
    on_clock, by_steps = page.chart("WER")
    assert [style for style, _ in on_clock["curves"]] == ["curve run0 dashed", "curve run0"]
    assert np.array(values_of(on_clock, 0)) == pytest.approx(np.array([(20, 0.6), (40, 0.4)]), abs=0.01)
    assert np.array(values_of(on_clock, 1)) == pytest.approx(np.array([(20, 0.55), (40, 0.35)]), abs=0.01)
    assert np.array(values_of(by_steps, 0)) == pytest.approx(np.array([(12, 0.6), (17, 0.4)]), abs=0.01)
    (kappa,) = page.chart("kappa: batch over reference batch")
    expected = [(10, 1), (10, 4), (20, 4), (20, 4), (30, 4), (30, 4), (40, 4), (40, 4), (50, 4)]
    assert np.array(values_of(kappa, 0)) == pytest.approx(np.array(expected), abs=0.01)
    (unknown,) = page.chart("Pseudo-labels: blank fraction")
    assert np.array(values_of(unknown, 0))[:, 1] == pytest.approx([0.1, 0.15, 0.2, 0.25], abs=0.002)
    # Pseudo-labels start at 10.
    ticks = dict(kappa["ticks"]["x"])
    assert kappa["marks"] == [pytest.approx(ticks[10.0], abs=0.1)]
    assert "run: student from 0.6 at 20 to 0.4 at 40" in on_clock["desc"]


def test_evaluations_are_listed_once(run_folder: Write, read_page: Read) -> None:

    rows = history()
    again = {key: value for key, value in rows[5].items() if key != "clock/reference_step"}
    page = read_page(render(read_runs([run_folder(history=[*rows, again])])))
    assert rows[5]["eval_wer"] == 0.8 - 0.4
    table = page.values["Evaluations of run"][1:]
    assert [[float(cell) for cell in row] for row in table] == [
        [12, 20, 0.8 - 0.2, 0.8 - 0.05 - 0.2],
        [17, 40, 0.8 - 0.4, 0.8 - 0.05 - 0.4],
    ]


def test_the_ledger_counts_by_source_and_reason(run_folder: Write, read_page: Read) -> None:
    ledger = {
        "unit": "seconds",
        "used": {
            "read": {"empty": {"items": 1, "seconds": 2.5}, "kept": {"items": 3, "seconds": 7.5}},
            "spoken": {"kept": {"items": 5, "seconds": 20.0}},
        },
        "made": {"read": {"kept": {"items": 2, "seconds": 4.0}}},
    }
    page = read_page(render(read_runs([run_folder(ledger=ledger)])))
    assert page.tables["Ledger: labels that rows were trained on or dropped with (run)"] == [
        ["source", "outcome", "items", "share of items", "seconds", "share of seconds"],
        ["read", "kept", "3", "75.0%", "7.5", "75.0%"],
        ["read", "empty", "1", "25.0%", "2.5", "25.0%"],
        ["spoken", "kept", "5", "100.0%", "20", "100.0%"],
    ]
    assert len(page.tables["Ledger: labels as the teacher made them (run)"]) == 2


def test_the_ledger_has_seconds_and_tokens_beside_the_unit(run_folder: Write, read_page: Read) -> None:
    cells = {
        "kept": {"items": 3, "samples": 3.0, "seconds": 7.5},
        "empty": {"items": 1, "samples": 1.0, "seconds": 2.5, "tokens": 9},
    }
    page = read_page(render(read_runs([run_folder(ledger={"unit": "samples", "used": {"read": cells}})])))
    assert page.tables["Ledger: labels that rows were trained on or dropped with (run)"] == [
        ["source", "outcome", "items", "share of items", "samples", "share of samples", "seconds", "tokens"],
        ["read", "kept", "3", "75.0%", "3", "75.0%", "7.5", "-"],
        ["read", "empty", "1", "25.0%", "1", "25.0%", "2.5", "9"],
    ]


@pytest.mark.parametrize(
    ("ledger", "rows"),
    [
        (
            {"web": {"kept": 3, "empty": 1}},
            [["web", "kept", "3", "75.0%", "-", "-"], ["web", "empty", "1", "25.0%", "-", "-"]],
        ),
        ({"web": {"kept": {"items": 3, "units": 6}}}, [["web", "kept", "3", "100.0%", "6", "100.0%"]]),
        ({"used": 7, "web": [1], "unit": 3}, None),
    ],
)  # fmt: skip
def test_other_ledgers_are_read_as_far_as_they_go(
    run_folder: Write, read_page: Read, ledger: dict[str, Any], rows: list[list[str]] | None
) -> None:
    page = read_page(render(read_runs([run_folder(ledger=ledger)])))
    assert page.tables.get("Ledger (run)", [[]])[1:] == (rows or [])


HOSTILE = '<img src=x onerror=alert(1)> & "quoted" </title><script>$x_2$'


def test_names_are_text(run_folder: Write, read_page: Read) -> None:

    rows = history()
    rows[0][f"pseudo/{HOSTILE}"] = 1.0
    rows[1][f"eval_{HOSTILE}"] = 1.0
    told = plan().to_dict() | {"warnings": [HOSTILE]}
    told["recipe"] = told["recipe"] | {"optimizer": HOSTILE, HOSTILE: 1}
    ledger = {"unit": HOSTILE, "used": {HOSTILE: {HOSTILE: {"items": 1, HOSTILE: 1.0}}}}
    folder = run_folder('<b onload=x>&"', history=rows, scaling_plan=told, ledger=ledger)
    text = render(read_runs([folder, run_folder("other")]))
    page = read_page(text)
    clean = read_page(render(read_runs([run_folder("clean"), run_folder("other")])))
    assert set(page.tags) <= {*clean.tags, "h3", "li", "ul"}
    assert {(tag, name) for tag, name, _ in page.attributes} <= {(tag, name) for tag, name, _ in clean.attributes}
    assert page.tables[RUNS][0] == ["", '<b onload=x>&"', "other"]
    assert page.row(RUNS, f"{HOSTILE}, student") == ["1", "-"]
    assert (
        page.chart(title_of(f"pseudo/{HOSTILE}"))
        and page.row("Recipe at the reference batch", "optimizer")[0] == HOSTILE
    )


def test_nothing_is_loaded_and_nothing_runs(run_folder: Write, read_page: Read) -> None:
    text = render(read_runs([run_folder("a"), run_folder("b")]))
    page = read_page(text)
    assert not {"script", "img", "link", "iframe", "object", "embed", "video", "image", "use"} & set(page.tags)
    links = [value for _, name, value in page.attributes if name in ("href", "src", "srcset", "action", "xlink:href")]
    identities = [value for _, name, value in page.attributes if name == "id"]
    assert links and all(link.startswith("#") and link[1:] in identities for link in links)
    assert len(identities) == len(set(identities))
    assert not [name for _, name, _ in page.attributes if name.startswith("on")]
    assert "url(" not in text and "@import" not in text
    assert text.count("http") == text.count("http-equiv") + text.count('xmlns="http')
    policy = next(value for tag, name, value in page.attributes if tag == "meta" and value.startswith("default-src"))
    assert policy == "default-src 'none'; style-src 'unsafe-inline'"


def test_every_chart_has_words_and_every_table_headings(run_folder: Write, read_page: Read) -> None:
    page = read_page(render(read_runs([run_folder()])))
    assert len(page.charts) == 8
    for chart in page.charts:
        assert chart["role"] == "img" and chart["aria-labelledby"].split() == [
            chart["aria-labelledby"].split("-title")[0] + part for part in ("-title", "-text")
        ]
        assert (chart["title"] and "reference steps" in chart["desc"]) or "optimizer steps" in chart["desc"]
    scopes = [value for tag, name, value in page.attributes if tag == "th" and name == "scope"]
    assert scopes.count("row") >= 20 and len(scopes) == page.tags.count("th")


def test_nan_and_nothing_are_told(run_folder: Write, read_page: Read) -> None:
    folder = run_folder(history=[{"loss": float("nan"), "step": 3, "clock/reference_step": 3.0, "note": "x"}],
                        metrics=None, scaling_plan=None)  # fmt: skip
    page = read_page(render(read_runs([folder])))
    assert page.charts == [] and page.row(RUNS, "optimizer steps") == ["3"]


def test_the_command_writes_page_and_figures(run_folder: Write, read_page: Read) -> None:
    pytest.importorskip("matplotlib")
    folder = run_folder()
    result = CliRunner().invoke(main, ["report", str(folder)])
    assert result.exit_code == 0, result.output
    names = ["metrics", "training", "average", "pseudo_labels"]
    figures = [folder / "report_figures" / f"{name}.png" for name in names]
    assert result.output.split() == [str(folder / "report.html"), *map(str, figures)]
    assert all(figure.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" for figure in figures)
    assert read_page((folder / "report.html").read_text(encoding="utf-8")).headings[0] == "run"


def test_the_command_says_what_is_no_run(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["report", str(tmp_path), "--output", str(tmp_path / "x.html")])
    assert result.exit_code == 1 and "holds no run" in result.output and not (tmp_path / "x.html").exists()


def test_without_matplotlib_there_is_the_page(run_folder: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "matplotlib" else find(name))
    output = run_folder() / "pages" / "r.html"
    with pytest.raises(ImportError, match=r"hf-ema-scaling\[report\]"):
        write_report(read_runs([output.parent.parent]), output)
    assert output.stat().st_size > 10_000
    assert write_report(read_runs([output.parent.parent]), output, figures=False) == [output]


def test_a_real_run_is_read_as_it_was_logged(tmp_path: Path, read_page: Read) -> None:
    args = tiny.arguments(tmp_path, max_steps=12, kappa=2.0, per_device_train_batch_size=4, logging_strategy="steps",
                          logging_steps=2, eval_strategy="steps", eval_steps=4)  # fmt: skip
    trainer = tiny.trainer(
        tiny.wav2vec2(), args, tiny.speech(16), eval_dataset=tiny.speech(4, seed=1),
        unlabeled_dataset=tiny.speech(16, seed=2, labels=False), labeler=tiny.ContentLabeler(),
        pseudo_label_args=tiny.pseudo(pl_start=4),
    )  # fmt: skip
    trainer.train()
    trainer.save_state()
    page = read_page(render(read_runs([tmp_path])))
    evaluations = [row for row in trainer.state.log_history if "eval_ema_loss" in row]
    assert page.numbers(RUNS, "loss, average") == [evaluations[-1]["eval_ema_loss"]]
    assert page.numbers(RUNS, "kappa at the end") == [2.0]
    assert page.numbers(RUNS, "optimizer steps") == [8] and page.numbers(RUNS, "reference steps") == [12]
    found = page.values[f"Evaluations of {tmp_path.name}"][1:]
    expected = [
        (row["step"], row["clock/reference_step"], row["eval_loss"], row["eval_ema_loss"]) for row in evaluations
    ]
    assert [tuple(map(float, row)) for row in found] == expected and len(expected) == 3
    kept = [row["pseudo/kept"] for row in trainer.state.log_history if "pseudo/kept" in row]
    assert page.numbers(RUNS, "pseudo-labels kept, last logged") == [kept[-1]] and 0 < kept[-1] < 1
    json.loads((tmp_path / "trainer_state.json").read_text(encoding="utf-8"))


def contrast(a: tuple[int, ...], b: tuple[int, ...]) -> float:
    """Contrast ratio of WCAG 2.1."""

    def luminance(colour: tuple[int, ...]) -> float:
        parts = [c / 255 for c in colour]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    high, low = sorted((luminance(a), luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_everything_stands_out(scheme: str) -> None:
    found = colours(scheme)
    for ground in ("page", "panel"):
        assert contrast(found["ink"], found[ground]) > 12
        assert all(contrast(found[name], found[ground]) >= 4.5 for name in ("soft", "link"))
        assert all(contrast(found[f"run{number}"], found[ground]) >= 4.5 for number in range(COLOURS))
    assert len({found[f"run{number}"] for number in range(COLOURS)}) == COLOURS
