"""Plots of one run or many, on the reference clock."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Log = Mapping[str, Any]


def curve(history: Sequence[Log], key: str) -> tuple[list[float], list[float]]:
    """Clock positions and values of `key` in a `log_history`."""
    rows = [row for row in history if key in row and "clock/reference_step" in row]
    return [float(row["clock/reference_step"]) for row in rows], [float(row[key]) for row in rows]


def require_matplotlib() -> None:
    """To be called before long work that ends in a plot.

    Raises:
        ImportError: without matplotlib, with the extra that brings it.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ImportError('plots need matplotlib: pip install "hf-ema-scaling[report]"')


def plot_runs(
    histories: Mapping[str, Sequence[Log]], path: Path, *, metric: str = "wer", title: str = "", start: float = 0.0
) -> None:
    """Draws runs over one another: the metric of student and average, the momentum, the pseudo-labels kept.

    Args:
        histories: `log_history` of each run by name.
        path: PNG to write.
        metric: name of the metric after `eval_` and `eval_ema_`.
        title: title of the figure.
        start: where pseudo-labels start, marked by a line; 0 for nowhere.

    Raises:
        ImportError: without matplotlib, with the extra that brings it.
    """
    require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 7), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplot_mosaic([["metric", "metric"], ["momentum", "labels"]], height_ratios=[2, 1])
    for number, (name, history) in enumerate(histories.items()):
        for place, key, style, label in (
            ("metric", f"eval_{metric}", "--", "student"),
            ("metric", f"eval_ema_{metric}", "-", "average"),
            ("momentum", "ema/momentum", "-", "momentum"),
            ("labels", "pseudo/kept", "-", "kept"),
            ("labels", "pseudo/confidence", ":", "confidence"),
        ):
            clock, values = curve(history, key)
            if clock:
                axes[place].plot(clock, values, style, color=f"C{number}", label=f"{name}: {label}")
    axes["metric"].set(ylabel=metric.upper(), xlabel="reference steps", title=title)
    axes["momentum"].set(ylabel="momentum per optimizer step", xlabel="reference steps")
    axes["labels"].set(ylabel="share", xlabel="reference steps", title="pseudo-labels", ylim=(0, 1.02))
    for axis in axes.values():
        axis.grid(alpha=0.3)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize="small")
        if start:
            axis.axvline(start, color="grey", linewidth=0.8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
