"""What a sweep found, as a table, as CSV and as JSON."""

from __future__ import annotations

import csv
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hf_ema_scaling.sweep.bounds import Verdict, factors, judge, mean_factor, spread_of
from hf_ema_scaling.sweep.distances import WEIGHTS, Comparison, loss_beside
from hf_ema_scaling.sweep.jobs import DROPOUT, NONE, RULE, SPREAD, UNSCALED
from hf_ema_scaling.sweep.trajectory import SIDES, STUDENT

ARM_ORDER = (RULE, UNSCALED, NONE, SPREAD, DROPOUT)


def measured(comparisons: Sequence[Comparison]) -> list[str]:
    """Metrics of the evaluations."""
    return comparisons[0].run.names()


def chosen_metric(metric: str | None, names: Sequence[str]) -> str:
    """The one of `names` that `metric` means, `eval_wer` and `eval_ema_wer` among them; by default the first loss.

    Raises:
        ValueError: for one that was not measured, with those that were.
    """
    if metric is None and names:
        return next((name for name in names if name.endswith("loss")), names[0])
    wanted = str(metric).removeprefix("eval_").removeprefix("ema_")
    if wanted not in names:
        raise ValueError(
            f"metric {wanted!r} was not measured of student and average; there are {', '.join(names) or 'none'}"
        )
    return wanted


def judged_distances(metric: str, names: Sequence[str]) -> list[str]:
    """Distances that bounds are judged by: between weights, of the loss, of the metric."""
    loss = loss_beside(metric, names)
    return list(dict.fromkeys([WEIGHTS, *([loss] if loss else []), metric]))


def rows(comparisons: Sequence[Comparison]) -> list[dict[str, Any]]:
    """One row per run: distances and end points of student and average, steps, seconds."""
    listed = []
    for run in sorted(comparisons, key=lambda run: (run.seed, ARM_ORDER.index(run.arm), run.kappa, run.repeat)):
        row: dict[str, Any] = {"seed": run.seed, "arm": run.arm, "kappa": run.kappa, "repeat": run.repeat}
        row |= {key: run.run.result[key] for key in ("optimizer_steps", "seconds")}
        for what, values in (("distance", run.distances), ("end", run.ends)):
            for name, by_side in values.items():
                row |= {f"{what}/{name}/{side}": by_side[side] for side in SIDES}
        listed.append(row)
    return listed


def write_csv(comparisons: Sequence[Comparison], path: Path) -> None:
    """`rows` as CSV."""
    table = rows(comparisons)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(table[0]))
        writer.writeheader()
        writer.writerows(table)


def summary(comparisons: Sequence[Comparison], metric: str) -> dict[str, Any]:
    """All figures of a sweep as JSON values; what is not finite is None."""
    distances = judged_distances(metric, measured(comparisons))
    found: dict[str, Any] = {
        "metric": metric,
        "runs": rows(comparisons),
        "factors": {
            name: {f"{kappa:g}": by_seed for kappa, by_seed in factors(comparisons, name).items()}
            for name in distances
        },
        "bounds": [vars(verdict) for verdict in judge(comparisons, distances)],
    }
    return _finite(found)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _finite(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def markdown(comparisons: Sequence[Comparison], metric: str, title: str) -> str:
    """The report as people read it: distances, end points, bounds, and why a bound does not hold."""
    names = measured(comparisons)
    distances = judged_distances(metric, names)
    verdicts = judge(comparisons, distances)
    seeds = sorted({run.seed for run in comparisons})
    shown = f"mean (smallest to largest) over seeds {', '.join(map(str, seeds))}"
    parts = [
        f"# {title}",
        f"Distance to the run of the same seed at kappa 1, {shown}. `weights`: mean distance along the run, in shares "
        "of the way that the reference's student comes; metrics: mean absolute difference along the run. `spread` is "
        "kappa 1 with other seeds for data, dropout and augmentation where kappas part, `dropout` is kappa 1 with "
        "nothing but other dropout masks: so far runs of one recipe lie apart by chance.",
        _table(comparisons, distances, "distances"),
        f"End of the run, {shown}.",
        _table(comparisons, list(dict.fromkeys([*names, metric])), "ends"),
        "How many times farther the unscaled average is than the rule's: ratio of the mean distances (smallest to "
        "largest ratio of a seed).",
        _factor_table(comparisons, distances),
        "Bounds, on averages, seed by seed; the spread is the distance of the farther of the seed's spread runs. A "
        "bound that the unscaled average keeps as well tells nothing.",
        _verdict_table(verdicts, seeds),
        _broken(comparisons, verdicts),
        "What the plans of the rule's runs warn of, and the gradient noise that they measured:",
        _conditions(comparisons),
    ]
    return "\n\n".join(parts) + "\n"


def _table(comparisons: Sequence[Comparison], names: Sequence[str], what: str) -> str:
    heads = ["arm", "kappa", *(f"{name}, {side}" for name in names for side in SIDES)]
    lines = []
    for arm in ARM_ORDER:
        for kappa in sorted({run.kappa for run in comparisons if run.arm == arm}):
            runs = [run for run in comparisons if (run.arm, run.kappa) == (arm, kappa)]
            cells = [
                _cell([getattr(run, what)[name][side] for run in runs])
                if what == "ends" or (arm, kappa) != (RULE, 1)
                else "0"
                for name in names
                for side in SIDES
            ]
            lines.append([arm, f"{kappa:g}", *cells])
    return _markdown_table(heads, lines)


def _cell(values: Sequence[float]) -> str:
    mean, low, high = spread_of(values)
    return f"{mean:.4f}" if len(values) == 1 else f"{mean:.4f} ({low:.4f} to {high:.4f})"


def _factor_table(comparisons: Sequence[Comparison], distances: Sequence[str]) -> str:
    found = {name: factors(comparisons, name) for name in distances}

    def cell(name: str, kappa: float) -> str:
        by_seed = found[name][kappa].values()
        return f"{mean_factor(comparisons, name, kappa):.2f} ({min(by_seed):.2f} to {max(by_seed):.2f})"

    lines = [[f"{kappa:g}", *(cell(name, kappa) for name in distances)] for kappa in found[distances[0]]]
    return _markdown_table(["kappa", *distances], lines)


def _verdict_table(verdicts: Sequence[Verdict], seeds: Sequence[int]) -> str:
    lines = []
    for key in dict.fromkeys((each.kappa, each.bound, each.distance) for each in verdicts):
        found = {each.seed: each for each in verdicts if (each.kappa, each.bound, each.distance) == key}
        cells = [
            f"{'true' if found[seed].holds else '**false**'} ({found[seed].value:.4f}, {found[seed].limit:.4f})"
            for seed in seeds
        ]
        widest = [each.all_seeds for each in found.values()]
        widest_cell = "" if None in widest else "true" if all(widest) else "**false**"
        unscaled = [each.unscaled for each in found.values()]
        unscaled_cell = "" if None in unscaled else f"{sum(map(bool, unscaled))} of {len(unscaled)}"
        lines.append([f"{key[0]:g}", key[1], key[2], *cells, widest_cell, unscaled_cell])
    by_seed = (f"seed {seed} (value, limit)" for seed in seeds)
    heads = ["kappa", "bound", "by", *by_seed, "by the widest spread", "unscaled keeps it"]
    return _markdown_table(heads, lines)


def _broken(comparisons: Sequence[Comparison], verdicts: Sequence[Verdict]) -> str:
    if not verdicts:
        return "No bound applies: they are about kappas above 1."
    broken = [each for each in verdicts if not each.holds]
    if not broken:
        return "Every bound holds for every seed."
    rule = {(run.kappa, run.seed): run.distances for run in comparisons if run.arm == RULE}
    lines = [f"{len(broken)} of {len(verdicts)} do not hold:", ""]
    for each in broken:
        student = rule[each.kappa, each.seed][each.distance][STUDENT]
        lines.append(
            f"- kappa {each.kappa:g}, seed {each.seed}, by {each.distance}: not true that {each.bound} "
            f"({each.value:.4f}, limit {each.limit:.4f})"
            + ("; within the widest spread of the seeds" if each.all_seeds else "")
            + f"; the rule's own student is {student:.4f} away"
        )
    return "\n".join(lines)


def _conditions(comparisons: Sequence[Comparison]) -> str:
    """Whether the rule's runs were where the rules hold, as far as their plans and their noise tell."""
    lines = []
    for kappa in sorted({run.kappa for run in comparisons if run.arm == RULE}):
        here = [run for run in comparisons if (run.arm, run.kappa) == (RULE, kappa)]
        warnings = list(dict.fromkeys(text for run in here for text in run.run.result["warnings"]))
        lines += [f"- kappa {kappa:g}: {text}" for text in warnings or ["no warnings"]]
        lines.append(f"- kappa {kappa:g}: {_noise(here)}")
    return "\n".join(lines)


def _noise(runs: Sequence[Comparison]) -> str:
    found = [row for run in runs for row in run.run.result["noise"]]
    if not found:
        return "no gradient noise scale in the log (noise_scale_every)"
    scale, largest = (statistics.median(row[key] for row in found) for key in ("scale", "largest_kappa"))
    exceeded = ", which it exceeds" if runs[0].kappa > largest else ""
    return f"gradient noise scale {scale:.4g} units (median), largest useful kappa {largest:.3g}{exceeded}"


def _markdown_table(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(heads, *lines, strict=True)]
    text = [heads, ["-" * width for width in widths], *lines]
    return "\n".join(
        "| " + " | ".join(f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True)) + " |" for line in text
    )


def write_report(comparisons: Sequence[Comparison], folder: Path, *, metric: str, title: str) -> str:
    """Writes `sweep.csv`, `sweep.md` and `sweep.png`; returns the text of `sweep.md`.

    Raises:
        ImportError: without matplotlib, with the extra that brings it; table and CSV are then there.
    """
    from hf_ema_scaling.sweep.figure import plot_sweep

    folder.mkdir(parents=True, exist_ok=True)
    write_csv(comparisons, folder / "sweep.csv")
    text = markdown(comparisons, metric, title)
    (folder / "sweep.md").write_text(text, encoding="utf-8")
    plot_sweep(
        comparisons,
        folder / "sweep.png",
        metric=metric,
        distances=judged_distances(metric, measured(comparisons)),
        title=title,
    )
    return text
