"""Folders of runs, as trainers and recipes leave them, and a page as its reader finds it."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from importlib.resources import files
from pathlib import Path
from typing import Any

from hf_ema_scaling.scaling import BatchSchedule, Recipe, ScalingPlan

CLOCK = "clock/reference_step"


def history(kappa: int = 4, wer: float = 0.8) -> list[dict[str, Any]]:
    """A log of 10 reference steps at kappa 1 and 40 at `kappa`, an entry every 10, an evaluation every 20."""
    rows: list[dict[str, Any]] = []
    for clock in (10, 20, 30, 40, 50):
        step = 10 + (clock - 10) // kappa
        batch = 1 if clock == 10 else kappa
        place = {CLOCK: float(clock), "step": step, "epoch": clock / 10}
        row = {"loss": 5.0 / clock, "learning_rate": 0.01, "ema/momentum": 0.9**batch, "ema/kappa": float(batch)}
        if clock > 10:
            row |= {"pseudo/kept": 0.5 + clock / 100, "pseudo/blank_fraction": clock / 200}
        rows.append(row | place)
        if clock in (20, 40):
            rows.append(
                {"eval_wer": wer - clock / 100, "eval_ema_wer": wer - 0.05 - clock / 100, "eval_runtime": 2.0} | place
            )
    rows.append({"train_runtime": 12.5, "train_loss": 0.3, "step": rows[-1]["step"]})
    return rows


def plan(kappa: int = 4) -> ScalingPlan:
    recipe = Recipe(8, "seconds", 50, 0.01, 0.9, pl_start=10, max_grad_norm=1.0)
    return ScalingPlan(recipe, BatchSchedule.two_stage(8, kappa, 10))


def write_run(folder: Path, **changes: Any) -> Path:
    """A finished run; `changes` are other contents by name of the file, None for no such file."""
    rows = changes.pop("history", history())
    contents: dict[str, Any] = {
        "trainer_state": {"global_step": rows[-1]["step"], "max_steps": 20, "log_history": rows},
        "scaling_plan": plan().to_dict(),
        "metrics": {"optimizer_steps": rows[-1]["step"], "eval_wer": 0.25, "eval_ema_wer": 0.125},
    } | changes
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        if content is not None:
            (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


class Page(HTMLParser):
    """What a reader of the page gets: tables by caption, curves by chart, and all that could load something."""

    VOID = ("meta", "link", "img", "br", "hr", "input")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tables: dict[str, list[list[str]]] = {}
        self.values: dict[str, list[list[str | None]]] = {}
        self.charts: list[dict[str, Any]] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.headings: list[str] = []
        self._open: list[tuple[str, dict[str, str]]] = []
        self._text = ""
        self.feed(text)
        assert not self._open, f"never closed: {self._open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        named = {name: value or "" for name, value in attrs}
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in named.items()]
        if tag not in self.VOID:
            self._open.append((tag, named))
        if tag == "table":
            self._rows: list[list[str]] = []
            self._values: list[list[str | None]] = []
        elif tag == "tr":
            self._rows.append([])
            self._values.append([])
        elif tag in ("td", "th"):
            self._rows[-1].append("")
            self._values[-1].append(None)
        elif tag == "data":
            self._values[-1][-1] = (self._values[-1][-1] or "") + named["value"] + " "
        elif tag == "svg" and "chart" in named.get("class", ""):
            self.charts.append({"curves": [], "ticks": {"x": [], "y": []}, "marks": [], **named})
        elif tag == "polyline" and self.charts:
            points = [tuple(map(float, point.split(","))) for point in named["points"].split()]
            self.charts[-1]["curves"].append((named["class"], points))
        elif tag == "line" and named.get("class") == "mark":
            self.charts[-1]["marks"].append(float(named["x1"]))
        self._text = ""

    def handle_data(self, data: str) -> None:
        self._text += data
        if any(tag in ("td", "th") for tag, _ in self._open):
            self._rows[-1][-1] += data

    def handle_endtag(self, tag: str) -> None:
        opened, named = self._open.pop()
        assert opened == tag, f"<{opened}> is closed by </{tag}>"
        if tag == "caption":
            self._caption = self._text
        elif tag == "table":
            self.tables[self._caption], self.values[self._caption] = self._rows, self._values
        elif tag in ("h1", "h2", "h3"):
            self.headings.append(self._text)
        elif tag in ("title", "desc") and named.get("id"):
            self.charts[-1][tag] = self._text
        elif tag == "text" and "tick" in named.get("class", ""):
            axis = named["class"][0]
            self.charts[-1]["ticks"][axis].append((float(self._text), float(named[axis])))

    def row(self, caption: str, heading: str) -> list[str]:
        """Texts of the cells beside a row's heading."""
        return next(row[1:] for row in self.tables[caption] if row[0] == heading)

    def numbers(self, caption: str, heading: str) -> list[float | None]:
        """Numbers of the cells beside a row's heading, with all their digits."""
        place = next(index for index, row in enumerate(self.tables[caption]) if row[0] == heading)
        return [None if value is None else float(value) for value in self.values[caption][place][1:]]

    def chart(self, title: str) -> list[dict[str, Any]]:
        """Charts of that title."""
        return [chart for chart in self.charts if chart["title"] == title]


def colours(scheme: str) -> dict[str, tuple[int, ...]]:
    """The style sheet's own variables."""
    sheet = files("hf_ema_scaling").joinpath("templates/report.css").read_text(encoding="utf-8")
    block = sheet.split(":root {")[1 if scheme == "light" else 2].split("}")[0]
    return {name: tuple(bytes.fromhex(code)) for name, code in re.findall(r"--(\w+): #(\w{6})", block)}
