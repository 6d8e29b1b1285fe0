"""What a run left in its folder, finished or not: log, plan, final metrics, ledger."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Log = Mapping[str, Any]

CLOCK = "clock/reference_step"
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")


@dataclass(frozen=True)
class Run:
    """One run, as far as its files tell.

    Attributes:
        name: what it is called; unique among the runs of a report.
        folder: where its `trainer_state.json` lies.
        history: the log, in the order of the run, one mapping per entry.
        step: optimizer steps done.
        max_steps: optimizer steps of the whole run; 0 where that is not known.
        plan: `scaling_plan.json`; empty where there is none.
        recipe: the recipe at the reference batch, from the plan or the checkpoint; empty where there is none.
        metrics: `metrics.json`; empty where there is none, or where it is that of another number of steps.
        ledger: `ledger.json`; empty where there is none.
        notes: what a reader of the report should know about the files.
    """

    name: str
    folder: Path
    history: Sequence[Log]
    step: int
    max_steps: int = 0
    plan: Mapping[str, Any] = field(default_factory=dict)
    recipe: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, Any] = field(default_factory=dict)
    ledger: Mapping[str, Any] = field(default_factory=dict)
    notes: Sequence[str] = ()

    @property
    def finished(self) -> bool:
        """Whether all steps are done."""
        return 0 < self.max_steps <= self.step

    @property
    def has_clock(self) -> bool:
        """Whether the log is on the reference clock; that of a stock `Trainer` is not."""
        return any(CLOCK in row for row in self.history)

    def curve(self, key: str, axis: str = CLOCK) -> tuple[list[float], list[float]]:
        """Values of `key` along the run, and where they stand on `axis`: `CLOCK`, `step` or `units`.

        Units are reference steps times the reference batch. Without a clock in the log, optimizer steps take its
        place. What is not a finite number is left out.
        """
        place, scale = ("step" if axis != "step" and not self.has_clock else axis), 1.0
        if place == "units":
            place, scale = CLOCK, number(self.recipe.get("reference_batch_size")) or math.nan
        points = [(number(row.get(place)), number(row.get(key))) for row in self.history]
        found = [(x * scale, y) for x, y in points if x is not None and y is not None and math.isfinite(x * scale)]
        return [x for x, _ in found], [y for _, y in found]

    def logged(self) -> list[str]:
        """Keys of the log that hold numbers, in the order in which they first appear."""
        return list(
            dict.fromkeys(key for row in self.history for key, value in row.items() if number(value) is not None)
        )

    def last(self, key: str) -> float | None:
        """The last finite number logged as `key`; None where there is none."""
        return next((value for row in reversed(self.history) if (value := number(row.get(key))) is not None), None)

    def final(self, key: str) -> float | None:
        """A metric at the end: of `metrics.json`, else the last one logged."""
        found = number(self.metrics.get(key))
        return self.last(key) if found is None else found

    @property
    def stages(self) -> list[Mapping[str, Any]]:
        """Stages of the plan."""
        return [stage for stage in self.plan.get("stages", []) if isinstance(stage, Mapping)]


def number(value: Any) -> float | None:
    """`value` as a float if it is a finite number, else None; truth values are no numbers."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return float(value)


def curve(history: Sequence[Log], key: str) -> tuple[list[float], list[float]]:
    """Clock positions and values of `key` in a `log_history`."""
    rows = [row for row in history if key in row and CLOCK in row]
    return [float(row[CLOCK]) for row in rows], [float(row[key]) for row in rows]


def read_runs(paths: Sequence[str | Path]) -> list[Run]:
    """Reads runs and names them by the ends of their paths, as long as it takes to tell them apart.

    Args:
        paths: run folders (`output_dir`) or checkpoints; of a run folder the newest state counts.

    Raises:
        FileNotFoundError: for a folder without `trainer_state.json` in it or in a checkpoint of it.
        ValueError: when no path is given, or one is given twice.
    """
    folders = [Path(path).resolve() for path in paths]
    twice = sorted({str(folder) for folder in folders if folders.count(folder) > 1})
    if twice or not folders:
        raise ValueError(
            f"each run can be shown once; given twice: {', '.join(twice)}" if twice else "no run is given"
        )
    return [_read(folder, name) for folder, name in zip(folders, _names(folders), strict=True)]


def _names(folders: Sequence[Path]) -> list[str]:
    """Shortest ends of the paths that differ; a checkpoint with its run before it."""
    lengths = [2 if _CHECKPOINT.fullmatch(folder.name) else 1 for folder in folders]
    while True:
        names = ["/".join(folder.parts[-length:]) for folder, length in zip(folders, lengths, strict=True)]
        same = [names.count(name) > 1 for name in names]
        if not any(same):
            return names
        lengths = [length + more for length, more in zip(lengths, same, strict=True)]


def _read(folder: Path, name: str) -> Run:
    notes: list[str] = []
    state, where = _newest_state(folder, notes)
    # What the run writes once lies in the run's folder, also for a checkpoint in it.
    home = where.parent if _CHECKPOINT.fullmatch(where.name) else where
    places = list(dict.fromkeys([where, home]))
    plan = _first(places, "scaling_plan.json", notes)
    average = _first([place / "ema" for place in places], "ema_state.json", notes)
    step = int(number(state.get("global_step")) or 0)
    metrics = _first([home], "metrics.json", notes)
    counted = number(metrics.get("optimizer_steps"))
    if counted is not None and counted != step:
        notes.append(
            f"metrics.json is left out: it is that of {counted:g} optimizer steps, the log here is that of {step}"
        )
        metrics = {}
    run = Run(
        name=name,
        folder=where,
        history=_on_clock([row for row in state.get("log_history", []) if isinstance(row, Mapping)]),
        step=step,
        max_steps=int(number(state.get("max_steps")) or 0),
        plan=plan,
        recipe=_mapping(plan.get("recipe")) or _mapping(_mapping(average.get("state")).get("recipe")),
        metrics=metrics,
        ledger=_first(places, "ledger.json", notes),
        notes=notes,
    )
    if not run.has_clock:
        notes.append("the log carries no reference clock: optimizer steps are shown in its place")
    return run


def _on_clock(history: Sequence[Log]) -> list[Log]:
    """The log, with the clock also in entries from outside training, where another one of the same step has it."""
    clocks = {row["step"]: row[CLOCK] for row in history if "step" in row and CLOCK in row}
    return [{CLOCK: clocks[row["step"]], **row} if row.get("step") in clocks else row for row in history]


def _newest_state(folder: Path, notes: list[str]) -> tuple[Mapping[str, Any], Path]:
    """The state with the most steps, of the folder or its checkpoints; the folder's own where it has as many."""
    checkpoints = [path.parent for path in folder.glob("checkpoint-*/trainer_state.json")]
    found = [
        (number(state.get("global_step")) or 0.0, place == folder, place, state)
        for place in (folder, *(path for path in checkpoints if _CHECKPOINT.fullmatch(path.name)))
        if (state := _json(place / "trainer_state.json", notes))
    ]
    if not found:
        raise FileNotFoundError(
            f"{folder} holds no run: there is no trainer_state.json that can be read, in it or in a checkpoint of it. "
            "A run writes one with its first checkpoint (save_steps) and at its end"
            + (f" ({'; '.join(notes)})" if notes else "")
        )
    _, _, place, state = max(found, key=lambda entry: entry[:2])
    return state, place


def _first(places: Sequence[Path], name: str, notes: list[str]) -> Mapping[str, Any]:
    return next((found for place in places if (found := _json(place / name, notes))), {})


def _json(path: Path, notes: list[str]) -> Mapping[str, Any]:
    """The object in a JSON file; an empty one, and a note if it cannot be read, without."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        notes.append(f"{path.name} in {path.parent.name} cannot be read and is left out: {error}")
        return {}
    if not isinstance(content, Mapping):
        notes.append(f"{path.name} in {path.parent.name} is left out: it holds no JSON object")
        return {}
    return content


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
