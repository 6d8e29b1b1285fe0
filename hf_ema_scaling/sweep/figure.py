"""The figure of a sweep: curves on the reference clock, and distances against kappa."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hf_ema_scaling.report import require_matplotlib
from hf_ema_scaling.sweep.bounds import spread_of
from hf_ema_scaling.sweep.distances import WEIGHTS, Comparison
from hf_ema_scaling.sweep.jobs import NONE, RULE, SPREAD, UNSCALED
from hf_ema_scaling.sweep.trajectory import AVERAGE, STUDENT

LINES = (
    # arm, side, style, label
    (RULE, AVERAGE, "C0o-", "average, rule"),
    (UNSCALED, AVERAGE, "C3s-", "average, unscaled"),
    (NONE, AVERAGE, "C1^", "average, nothing scaled"),
    (RULE, STUDENT, "C7o:", "student, rule"),
)
PANELS = {"rule": (RULE,), "EMA not scaled": (UNSCALED,), "nothing scaled, and spread": (NONE, SPREAD)}


def plot_sweep(
    comparisons: Sequence[Comparison], path: Path, *, metric: str, distances: Sequence[str], title: str
) -> None:
    """Draws a sweep: above the average's metric on the reference clock by arm, below distances against kappa.

    Curves are means over seeds; the bars of a distance reach from the smallest to the largest seed.

    Args:
        comparisons: all runs.
        path: PNG to write.
        metric: the curve, a metric that was measured.
        distances: one panel each.
        title: of the figure.

    Raises:
        ImportError: without matplotlib, with the extra that brings it.
    """
    require_matplotlib()
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 9), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    upper, lower = figure.subfigures(2, 1, squeeze=False)[:, 0]
    kappas = sorted({run.kappa for run in comparisons})
    places = np.linspace(0.0, 0.85, len(kappas))
    colours = {kappa: colormaps["viridis"](place) for kappa, place in zip(kappas, places, strict=True)}
    axes = upper.subplots(1, len(PANELS), sharex=True, sharey=True)
    for axis, (name, arms) in zip(axes, PANELS.items(), strict=True):
        for arm, kappa in dict.fromkeys([(RULE, 1.0), *((arm, kappa) for arm in arms for kappa in kappas)]):
            style: dict[str, Any] = {"color": colours[kappa], "label": f"kappa {kappa:g}"}
            if kappa == 1:
                style = {"color": "C3", "label": "other seeds, kappa 1"} if arm == SPREAD else {"color": "black"}
                style = {"label": "reference, kappa 1", "linewidth": 2} | style
            _curve(axis, [run for run in comparisons if (run.arm, run.kappa) == (arm, kappa)], metric, style)
        axis.set_title(f"{name}: {metric} of the average", fontsize="medium")
        axis.set(xlabel="reference steps")
        axis.grid(alpha=0.3)
        axis.legend(fontsize="small")
    for axis, name in zip(lower.subplots(1, len(distances), squeeze=False)[0], distances, strict=True):
        _distances(axis, comparisons, name, kappas)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def _curve(axis: Any, runs: Sequence[Comparison], metric: str, style: dict[str, Any]) -> None:
    """The mean over seeds of a metric of the average."""
    if runs:
        curves = [run.run.metric(metric, AVERAGE) for run in runs]
        axis.plot(runs[0].run.clock, np.mean(curves, axis=0), marker=".", **style)


def _distances(axis: Any, comparisons: Sequence[Comparison], name: str, kappas: Sequence[float]) -> None:
    """A distance to kappa 1 against kappa: means, and bars from the smallest to the largest seed."""
    spread = [run.distances[name][AVERAGE] for run in comparisons if run.arm == SPREAD]
    axis.axhspan(min(spread), max(spread), color="C2", alpha=0.25, label="spread of kappa 1, average")
    axis.axhline(np.mean(spread), color="C2", linewidth=1)
    for arm, side, style, label in LINES:
        points = []
        for kappa in kappas:
            values = [run.distances[name][side] for run in comparisons if (run.arm, run.kappa) == (arm, kappa)]
            if values and kappa != 1:
                points.append((kappa, *spread_of(values)))
        if points:
            x, mean, low, high = map(np.array, zip(*points, strict=True))
            axis.errorbar(x, mean, yerr=(mean - low, high - mean), fmt=style, ms=5, capsize=3, label=label)
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_xticks(kappas, [f"{kappa:g}" for kappa in kappas])
    what = "between weights, in ways of the student" if name == WEIGHTS else f"of {name}, mean difference"
    axis.set_title(f"distance to kappa 1 {what}", fontsize="medium")
    axis.set(xlabel="kappa")
    axis.grid(alpha=0.3, which="both")
    axis.legend(fontsize="small")
