"""The tables of a report: runs compared, the recipe, its stages, evaluations, and what filters dropped."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hf_ema_scaling.report.charts import metric_names
from hf_ema_scaling.report.runs import CLOCK, Run, number
from hf_ema_scaling.scaling.table import VALUE_LABELS

KEPT = "kept"
"""Outcome of a label that no filter dropped, in a ledger."""
MEASURES = ("seconds", "tokens")
"""What a ledger may hold beside items and units."""
EVALUATIONS = 200
"""Rows of a table of evaluations; of more, evenly spread ones and the last."""

Cell = Any
"""A number, a text, a sequence of such, or None for nothing."""


@dataclass(frozen=True)
class Table:
    """Rows of cells, the first of each its heading."""

    caption: str
    heads: Sequence[str]
    rows: Sequence[Sequence[Cell]]


def comparison(runs: Sequence[Run]) -> Table:
    """How runs ended: a row per quantity, a column per run, without rows that are empty for all."""
    quantities: dict[str, Callable[[Run], Cell]] = {
        "state": lambda run: "finished" if run.finished else _progress(run),
        "reference batch": _reference_batch,
        "kappa at the end": lambda run: _at_end(run, "kappa", "ema/kappa"),
        "EMA momentum at the end": lambda run: _at_end(run, "momentum_at_end", "ema/momentum", "momentum"),
        "peak learning rate at the end": lambda run: _at_end(run, "learning_rate", None),
        "optimizer steps": lambda run: run.step,
        "reference steps": lambda run: run.last(CLOCK),
        "data seen": _data_seen,
        "wall time of training (s)": lambda run: run.final("train_runtime"),
        "gradient noise scale": lambda run: run.last("noise/scale"),
        "pseudo-labels kept, last logged": lambda run: run.last("pseudo/kept"),
    }
    for name in metric_names(runs):
        for side, prefix in (("student", "eval_"), ("average", "eval_ema_")):
            quantities[f"{name}, {side}"] = lambda run, key=prefix + name: run.final(key)  # type: ignore[misc]
    rows = [[what, *(find(run) for run in runs)] for what, find in quantities.items()]
    return Table(
        "How far they came and where they ended",
        ["", *(run.name for run in runs)],
        [row for row in rows if row[1:] != [None] * len(runs)],
    )


def _progress(run: Run) -> str:
    return f"step {run.step} of {run.max_steps}" if run.max_steps else f"step {run.step}"


def _reference_batch(run: Run) -> str | None:
    size = number(run.recipe.get("reference_batch_size"))
    return None if size is None else f"{size:g} {run.recipe.get('unit', 'units')}"


def _data_seen(run: Run) -> str | None:
    size, clock = number(run.recipe.get("reference_batch_size")), run.last(CLOCK)
    return None if size is None or clock is None else f"{size * clock:.7g} {run.recipe.get('unit', 'units')}"


def _at_end(run: Run, planned: str, logged: str | None, otherwise: str | None = None) -> float | None:
    """A value of the last stage of the plan; without a plan the last one logged."""
    if run.stages:
        stage = run.stages[-1]
        found = number(stage.get(planned))
        return number(stage.get(otherwise)) if found is None and otherwise else found
    return run.last(logged) if logged else None


def recipes(runs: Sequence[Run]) -> Table | None:
    """What was tuned, at the reference batch: a row per value of the recipe, a column per run."""
    known = [run for run in runs if run.recipe]
    keys = dict.fromkeys(key for run in known for key in run.recipe)
    rows = [[key, *(run.recipe.get(key) for run in known)] for key in keys]
    return Table("Recipe at the reference batch", ["", *(run.name for run in known)], rows) if known else None


def stages(run: Run) -> Table | None:
    """The plan: a row per value, a column for the reference batch and one for each stage."""
    if not run.stages:
        return None
    unit = run.recipe.get("unit", "units")
    columns = [run.plan.get("reference") or {}, *run.stages]
    keys = dict.fromkeys([*VALUE_LABELS, *(key for column in columns for key in column)])
    rows = [
        [VALUE_LABELS.get(key, key).format(unit=unit).strip(), *(column.get(key) for column in columns)]
        for key in keys
    ]
    heads = ["", "reference", *(f"stage {index}" for index in range(len(run.stages)))]
    shown = [row for row in rows if any(cell is not None for cell in row[1:])]
    return Table(f"Stages of {run.name}, at the peak learning rate", heads, shown)


def evaluations(run: Run) -> Table | None:
    """Every evaluation of student and average: a row each."""
    found = [side + name for name in metric_names([run]) for side in ("eval_", "eval_ema_")]
    keys = [key for key in found if run.last(key) is not None]
    places = ("step", CLOCK, *keys)
    # One that was made again at the same step, with the same outcome, says nothing new.
    rows = list(
        dict.fromkeys(
            tuple(row.get(place) for place in places)
            for row in run.history
            if any(number(row.get(key)) is not None for key in keys)
        )
    )
    if not rows:
        return None
    every = -(-len(rows) // EVALUATIONS)
    kept = [row for place, row in enumerate(rows) if place % every == 0 or place == len(rows) - 1]
    heads = ["optimizer step", "reference step", *map(_of_side, keys)]
    return Table(f"Evaluations of {run.name}", heads, kept)


def _of_side(key: str) -> str:
    name = key.removeprefix("eval_")
    return f"{name.removeprefix('ema_')}, average" if name.startswith("ema_") else f"{name}, student"


def ledgers(run: Run) -> list[Table]:
    """What became of pseudo-labels: items and units by source and outcome.

    Read from `ledger.json`: a book (`used`, `made`, or the whole file) maps sources to outcomes (`kept`, or the reason
    of a drop), and these to items and units, or to items alone. What looks otherwise is left out.
    """
    content = run.ledger
    unit = content.get("unit") if isinstance(content.get("unit"), str) else "units"
    books = {
        "Ledger: labels that rows were trained on or dropped with": content.get("used"),
        "Ledger: labels as the teacher made them": content.get("made"),
    }
    if not any(isinstance(book, Mapping) for book in books.values()):
        books = {"Ledger": {key: value for key, value in content.items() if key != "unit"}}
    tables = []
    for title, book in books.items():
        if isinstance(book, Mapping) and (rows := _ledger_rows(book, str(unit))):
            heads = ["source", "outcome", "items", "share of items", str(unit), f"share of {unit}"]
            heads += [name for name in MEASURES if name != unit and _holds(book, name)]
            tables.append(Table(f"{title} ({run.name})", heads, rows))
    return tables


def _ledger_rows(book: Mapping[str, Any], unit: str) -> list[list[Cell]]:
    rows: list[list[Cell]] = []
    others = [name for name in MEASURES if name != unit and _holds(book, name)]
    for source, outcomes in book.items():
        if not isinstance(outcomes, Mapping):
            continue
        found = {outcome: _counts(cell, unit) for outcome, cell in outcomes.items()}
        totals = [sum(counts[place] or 0.0 for counts in found.values()) for place in (0, 1)]
        for outcome in sorted(found, key=lambda outcome: (outcome != KEPT, outcome)):
            items, units = found[outcome]
            if items is not None:
                more = [_counts(outcomes[outcome], name)[1] for name in others]
                rows.append([source, outcome, items, _share(items, totals[0]), units, _share(units, totals[1]), *more])
    return rows


def _holds(book: Mapping[str, Any], name: str) -> bool:
    """Whether any cell of a book has this measure."""
    cells = [cell for outcomes in book.values() if isinstance(outcomes, Mapping) for cell in outcomes.values()]
    return any(isinstance(cell, Mapping) and name in cell for cell in cells)


def _counts(cell: Any, unit: str) -> tuple[float | None, float | None]:
    if isinstance(cell, Mapping):
        return number(cell.get("items")), number(cell.get(unit, cell.get("units")))
    return number(cell), None


def _share(part: float | None, total: float) -> str | None:
    return f"{part / total:.1%}" if part is not None and total else None
