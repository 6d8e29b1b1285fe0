"""Figures as PNG, by matplotlib: one run or many, on the reference clock."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hf_ema_scaling.report.charts import Chart, HeatMap, Section, sections
from hf_ema_scaling.report.runs import Log, curve, read_runs


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
    figure = _new_figure((11, 7))
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
    _save(figure, path)


def plot_section(section: Section, path: Path) -> None:
    """Draws the charts of a section side by side; what has one value only is drawn as bars.

    Args:
        section: what to draw.
        path: PNG to write.

    Raises:
        ImportError: without matplotlib, with the extra that brings it.
    """
    columns = min(2, len(section.charts))
    rows = -(-len(section.charts) // columns)
    figure = _new_figure((6.5 * columns, 3.6 * rows))
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for axis, chart in zip(axes, section.charts, strict=False):
        x_label = chart.x_label
        if isinstance(chart, HeatMap):
            _draw_heat_map(axis, chart)
        elif chart.single:
            x_label = _draw_bars(axis, chart)
        else:
            _draw_chart(axis, chart)
        # Names of runs and metrics are no formulas.
        axis.set_title(chart.title, fontsize="medium", parse_math=False)
        axis.set_xlabel(x_label, parse_math=False)
    for axis in axes[len(section.charts) :]:
        axis.set_axis_off()
    _save(figure, path)


def _draw_chart(axis: Any, chart: Chart) -> None:
    for line in chart.lines:
        marker = "." if len(line.x) <= 40 else ""
        style = {"linestyle": "--" if line.dashed else "-", "marker": marker, "color": f"C{line.run % 10}"}
        axis.plot(line.x, line.y, label=line.name, drawstyle="steps-pre" if line.stepped else "default", **style)
    if chart.logarithmic:
        axis.set_yscale("log")
    if chart.shared:
        low, high = axis.get_ylim()
        room = 0.02 * (high - low)
        axis.set_ylim(max(low, -room), min(high, 1 + room))
    for place, what in chart.marks:
        axis.axvline(place, color="grey", linewidth=0.8)
        # Places along x are values, those along y shares of the height.
        note = {"xytext": (3, 3), "textcoords": "offset points", "xycoords": axis.get_xaxis_transform()}
        axis.annotate(what, (place, 0), rotation=90, va="bottom", fontsize="x-small", color="dimgrey", **note)
    axis.grid(alpha=0.3)
    if len(chart.lines) > 1:
        for text in axis.legend(fontsize="small").get_texts():
            text.set_parse_math(False)


def _draw_bars(axis: Any, chart: Chart) -> str:
    """One bar for the one value of each line; returns what to write below them."""
    places = range(len(chart.lines))
    values = [line.y[0] for line in chart.lines]
    bars = axis.barh(places, values, height=0.6, color=[f"C{line.run % 10}" for line in chart.lines])
    for bar, line in zip(bars, chart.lines, strict=True):
        bar.set_alpha(0.5 if line.dashed else 1.0)
    axis.bar_label(bars, labels=[f"{value:.4g}" for value in values], padding=3, fontsize="small")
    for label in (
        axis.set_yticks(places, [line.name or chart.title for line in chart.lines]) and axis.get_yticklabels()
    ):
        label.set_parse_math(False)
    axis.invert_yaxis()
    axis.margins(x=0.2, y=0.3)
    at = sorted({line.x[0] for line in chart.lines})
    return f"at {', '.join(f'{x:g}' for x in at)} {chart.x_label}"


def draw_figures(folder: Path, target: Path) -> list[str]:
    """One PNG per section about a run.

    Args:
        folder: of the run, or of one of its checkpoints.
        target: folder for the figures.

    Returns:
        Names of the files written, in the order of the report.

    Raises:
        ImportError: without matplotlib, with the extra that brings it.
        FileNotFoundError: for a folder without a log, `trainer_state.json`.
    """
    require_matplotlib()
    written = []
    for section in sections(read_runs([folder])):
        plot_section(section, target / f"{section.slug}.png")
        written.append(f"{section.slug}.png")
    return written


def _draw_heat_map(axis: Any, chart: HeatMap) -> None:
    width = chart.bins[1] - chart.bins[0] if len(chart.bins) > 1 else 1.0
    first = max(0.0, 2 * chart.x[0] - chart.x[1]) if len(chart.x) > 1 else 0.0
    shares = [list(row) for row in zip(*chart.shares, strict=True)]
    colours = axis.pcolormesh([first, *chart.x], [*chart.bins, chart.bins[-1] + width], shares, cmap="Blues", vmin=0)
    axis.figure.colorbar(colours, ax=axis, label="share of labels")
    axis.set_ylabel(chart.y_label)


def _new_figure(size: tuple[float, float]) -> Any:
    require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _save(figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
