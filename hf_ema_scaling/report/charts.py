"""Which curves a report shows: the log's keys, by section, each key a chart of all runs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from hf_ema_scaling.report.runs import CLOCK, Run, number

POINTS = 600
"""Points of a line that are drawn; of longer ones the least and the greatest of each stretch."""
MARKS = 6
"""Marks that a chart has room for."""
LOG_RATIO = 200.0
"""Positive values that differ by more than this are drawn on a logarithmic axis."""
AXES = {CLOCK: "reference steps", "step": "optimizer steps", "units": "data seen ({unit})"}


@dataclass(frozen=True)
class Line:
    """A curve; `run` is the number of its run, which gives its colour. A stepped one has each value since the last."""

    name: str
    run: int
    x: Sequence[float]
    y: Sequence[float]
    dashed: bool = False
    stepped: bool = False

    def corners(self) -> list[tuple[float, float]]:
        """Points to be joined by straight lines."""
        points = list(zip(self.x, self.y, strict=True))
        if not self.stepped:
            return points
        turns = [(before, value) for before, (_, value) in zip(self.x, points[1:], strict=False)]
        return [point for pair in zip(points, turns, strict=False) for point in pair] + points[-1:]


@dataclass(frozen=True)
class Chart:
    """Curves over one axis; `marks` are places on it with what happens there."""

    key: str
    title: str
    x_label: str
    lines: Sequence[Line]
    marks: Sequence[tuple[float, str]] = ()

    @property
    def single(self) -> bool:
        """Whether no line has more than one point, so that there is no curve to see."""
        return all(len(line.x) < 2 for line in self.lines)

    @property
    def logarithmic(self) -> bool:
        """Whether the values spread over so many sizes that only their logarithms can be told apart.

        Not of learning rates, whose schedules have shapes that people know.
        """
        if self.key == "learning_rate":
            return False
        values = [value for line in self.lines for value in line.y]
        return min(values) > 0 and max(values) / min(values) > LOG_RATIO

    @property
    def shared(self) -> bool:
        """Whether the values are shares or momenta, so that an axis beyond 0 and 1 shows what cannot be."""
        values = [value for line in self.lines for value in line.y]
        return self.key.startswith(_SHARES) and min(values) >= 0 and max(values) <= 1


@dataclass(frozen=True)
class HeatMap:
    """Shares by bin (rows) along a run (columns): `shares[column][row]`."""

    key: str
    title: str
    x_label: str
    y_label: str
    x: Sequence[float]
    bins: Sequence[float]
    shares: Sequence[Sequence[float]]


@dataclass(frozen=True)
class Section:
    """Charts under one heading; `slug` names it in links and files."""

    slug: str
    title: str
    charts: Sequence[Chart | HeatMap]


_SECTIONS = {
    "metrics": "Metrics of student and average",
    "training": "Training",
    "average": "Batch and average",
    "pseudo_labels": "Pseudo-labels",
    "noise": "Gradient noise",
    "other": "Other",
}
_PLAIN = {"loss": "training", "grad_norm": "training", "learning_rate": "training"}
_FAMILIES = {
    "clip": "training",
    "skip": "training",
    "ema": "average",
    "batch": "average",
    "noise": "noise",
    **dict.fromkeys(
        ("pseudo", "pl", "cache", "confidence", "score", "student", "gradient", "hidden", "calibration", "collapse"),
        "pseudo_labels",
    ),
}
_STEPPED = ("ema/momentum", "ema/kappa", "batch/units")
_SHARES = (
    "ema/momentum",
    "clip/rate",
    "pseudo/kept",
    "pseudo/confidence",
    "pseudo/dropped_",
    "gradient/unlabelled_share",
)
_EVENTS = ("skip/", "pseudo/dropped_")
"""Counts or shares of what may never happen; then there is nothing to draw."""
_HISTOGRAM = "confidence/"
# Trainer's own accounts, which are no curves.
_NO_CURVE = ("epoch", "step", "total_flos", "train_", "clock/")
_NO_METRIC = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time", "jit_compilation_time")
_TITLES = {
    "loss": "Training loss",
    "grad_norm": "Gradient norm",
    "learning_rate": "Learning rate",
    "clip/rate": "Share of steps that were clipped",
    "skip/steps": "Steps skipped since the last log",
    "skip/total": "Steps skipped in the run",
    "ema/momentum": "Momentum per optimizer step",
    "ema/kappa": "kappa: batch over reference batch",
    "ema/distance": "Distance of the average from the student",
    "batch/units": "Units per optimizer step",
    "pseudo/kept": "Share of pseudo-labels kept",
    "pseudo/confidence": "Mean confidence of the teacher",
    "pseudo/tokens": "Tokens per label kept",
    "pl/weight": "Weight of pseudo-labels in the loss",
    "noise/scale": "Gradient noise scale in units",
    "noise/largest_kappa": "Largest useful kappa",
}
_FAMILY_TITLES = {
    "pseudo": "Pseudo-labels",
    "pl": "Pseudo-labels",
    "cache": "Label cache",
    "ema": "Average",
    "hidden": "Against the hidden truth",
    "noise": "Gradient noise",
    "clip": "Clipping",
    "student": "Student's loss",
}
_METRIC_TITLES = {"wer": "WER", "cer": "CER", "f1": "F1", "mae": "MAE", "mse": "MSE", "bleu": "BLEU", "chrf": "chrF"}
_METRICS = ("probe_accuracy", "exact_match", "accuracy", "error_rate", "precision", "recall", "loss", *_METRIC_TITLES)


def title_of(key: str) -> str:
    """A key of the log as people read it; what no title is known for is told by its words."""
    if key in _TITLES or "/" not in key:
        return _TITLES.get(key) or _words(key)
    family, _, rest = key.partition("/")
    head = _FAMILY_TITLES.get(family, _words(family))
    words = _METRIC_TITLES.get(rest) or rest.replace("_", " ").replace("/", ", ")
    return f"{head}: {words}"


def metric_title(name: str) -> str:
    """A metric with the set that it is of: `dev_clean_wer` is `WER on dev clean`."""
    for metric in _METRICS:
        if name == metric or name.endswith(f"_{metric}"):
            told = _METRIC_TITLES.get(metric) or _words(metric)
            where = name.removesuffix(metric).strip("_").replace("_", " ")
            return f"{told} on {where}" if where else told
    return _words(name)


def _words(name: str) -> str:
    words = name.replace("_", " ")
    return words[:1].upper() + words[1:]


def metric_names(runs: Sequence[Run]) -> list[str]:
    """Metrics of evaluations of student or average, without their prefixes: `wer`, `dev_loss`; losses last."""
    keys = dict.fromkeys(key for run in runs for key in (*run.logged(), *run.metrics) if key.startswith("eval_"))
    names = dict.fromkeys(key.removeprefix("eval_").removeprefix("ema_") for key in keys)
    return sorted((name for name in names if not name.endswith(_NO_METRIC)), key=lambda name: name.endswith("loss"))


def sections(runs: Sequence[Run]) -> list[Section]:
    """All charts of the runs, by section, without the empty ones."""
    charts: dict[str, list[Chart | HeatMap]] = {slug: [] for slug in _SECTIONS}
    axes = [CLOCK, *(["step"] if any(run.has_clock for run in runs) else [])]
    if len({(run.recipe.get("reference_batch_size"), run.recipe.get("unit")) for run in runs}) > 1:
        axes.append("units")
    for name in metric_names(runs):
        for axis in axes:
            lines = [
                line
                for key, side, dashed in ((f"eval_{name}", "student", True), (f"eval_ema_{name}", "average", False))
                for line in _lines(runs, key, axis, side, dashed=dashed)
            ]
            lines.sort(key=lambda line: line.run)
            # One value each is the same on every axis.
            if lines and (axis == CLOCK or any(len(line.x) > 1 for line in lines)):
                marks = _marks(runs) if axis == CLOCK else ()
                charts["metrics"].append(Chart(f"eval_{name}", metric_title(name), _label(runs, axis), lines, marks))
    logged = dict.fromkeys(key for run in runs for key in run.logged())
    for key in (*(key for key in _TITLES if key in logged), *(key for key in logged if key not in _TITLES)):
        slug = _section_of(key)
        if slug is not None and (lines := _lines(runs, key, CLOCK)) and not _never(key, lines):
            charts[slug].append(Chart(key, title_of(key), _label(runs, CLOCK), lines, _marks(runs)))
    charts["pseudo_labels"] += [found for run in runs if (found := _histogram(run, _label(runs, CLOCK)))]
    return [Section(slug, title, charts[slug]) for slug, title in _SECTIONS.items() if charts[slug]]


def _never(key: str, lines: Sequence[Line]) -> bool:
    return key.startswith(_EVENTS) and not any(value for line in lines for value in line.y)


def _section_of(key: str) -> str | None:
    if key.startswith(("eval_", *_NO_CURVE)) or _bin(key) is not None:
        return None
    if "/" not in key:
        return _PLAIN.get(key, "other")
    return _FAMILIES.get(key.partition("/")[0], "other")


def _label(runs: Sequence[Run], axis: str) -> str:
    if axis == CLOCK and not any(run.has_clock for run in runs):
        axis = "step"
    return AXES[axis].format(unit="; ".join(sorted({str(run.recipe.get("unit", "units")) for run in runs})))


def _lines(runs: Sequence[Run], key: str, axis: str, side: str = "", *, dashed: bool = False) -> list[Line]:
    lines = []
    for place, run in enumerate(runs):
        x, y = thinned(*run.curve(key, axis))
        if x:
            lines.append(
                Line(": ".join(part for part in (run.name, side) if part), place, x, y, dashed, key in _STEPPED)
            )
    return lines


def thinned(x: Sequence[float], y: Sequence[float], points: int = POINTS) -> tuple[list[float], list[float]]:
    """At most `points` points of a curve, its extremes among them: the least and the greatest of each stretch.

    First and last point stay. A curve that is short enough is returned as it is.
    """
    if len(x) <= points:
        return list(x), list(y)
    stretches = (points - 2) // 2
    inner = len(x) - 2
    kept = {0, len(x) - 1}
    for part in range(stretches):
        places = range(1 + part * inner // stretches, 1 + (part + 1) * inner // stretches)
        kept |= {min(places, key=y.__getitem__), max(places, key=y.__getitem__)}
    return [x[place] for place in sorted(kept)], [y[place] for place in sorted(kept)]


def _marks(runs: Sequence[Run]) -> tuple[tuple[float, str], ...]:
    """Where pseudo-labels start and where stages begin; where that is too much, what all runs share."""
    shared: dict[tuple[float, str], int] = {}
    for run in runs:
        marks = [(run.recipe.get("pl_start"), "pseudo-labels start")]
        marks += [(stage.get("start"), "new batch") for stage in run.stages[1:]]
        for value, what in marks if run.has_clock else ():
            if (place := number(value)) is not None and place > 0:
                shared[place, what] = shared.get((place, what), 0) + 1
    if len(shared) > MARKS:
        shared = {mark: count for mark, count in shared.items() if count == len(runs)}
    places: dict[float, list[str]] = {}
    for place, what in sorted(shared, reverse=True):
        places.setdefault(place, []).append(what)
    return tuple((place, ", ".join(places[place])) for place in sorted(places))


def _bin(key: str) -> float | None:
    """The lower border of a bin of the histogram of confidence that `key` is."""
    try:
        return float(key.removeprefix(_HISTOGRAM)) if key.startswith(_HISTOGRAM) else None
    except ValueError:
        return None


def _histogram(run: Run, x_label: str) -> HeatMap | None:
    """Confidence over the run, from the bins in the log, `confidence/<lower border>` with shares of labels."""
    bins = sorted((lower, key) for key in run.logged() if (lower := _bin(key)) is not None)
    columns: dict[float, list[float]] = {}
    for row_number, (_, key) in enumerate(bins):
        for x, share in zip(*run.curve(key), strict=True):
            columns.setdefault(x, [0.0] * len(bins))[row_number] = share
    if not columns:
        return None
    kept = sorted(columns)[:: math.ceil(len(columns) / 120)]
    title = f"Confidence of pseudo-labels: {run.name}"
    borders = [border for border, _ in bins]
    return HeatMap(_HISTOGRAM.rstrip("/"), title, x_label, "confidence", kept, borders, [columns[x] for x in kept])


def describe(chart: Chart | HeatMap) -> str:
    """A chart in words, for those who do not see it."""
    if isinstance(chart, HeatMap):
        mean = [sum(share * lower for share, lower in zip(column, chart.bins, strict=True)) for column in chart.shares]
        return (
            f"Shares of labels by {chart.y_label} over {chart.x_label}, {len(chart.bins)} bins. Mean lower border of "
            f"a label's bin: {mean[0]:.3g} at first, {mean[-1]:.3g} at last."
        )
    parts = [
        f"{line.name} from {line.y[0]:.4g} at {line.x[0]:g} to {line.y[-1]:.4g} at {line.x[-1]:g}, "
        f"least {min(line.y):.4g}, greatest {max(line.y):.4g}"
        for line in chart.lines
    ]
    marks = "".join(f" {what[0].upper()}{what[1:]} at {place:g}." for place, what in chart.marks)
    return f"{chart.title} over {chart.x_label}. {'; '.join(parts)}.{marks}"
