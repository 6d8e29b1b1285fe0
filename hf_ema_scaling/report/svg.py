"""Charts as inline SVG, in colours that the page sets: dark, light or printed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from xml.etree import ElementTree as ET

from hf_ema_scaling.report.charts import Chart, HeatMap, Line, describe

WIDTH, HEIGHT = 560, 300
LEFT, RIGHT, TOP, BOTTOM = 64, 14, 22, 44
COLOURS = 8
"""Runs beyond this take the colours of the first ones again, with markers of their own."""
MARKED = 40
"""Lines of at most so many points show each of them."""
_SHAPES = ("circle", "square", "diamond", "triangle")


@dataclass(frozen=True)
class Scale:
    """From values to pixels; `ticks` are values that are easy to read."""

    low: float
    high: float
    start: float
    end: float
    ticks: Sequence[float]
    logarithmic: bool = False

    def __call__(self, value: float) -> float:
        """The pixel of a value."""
        low, high, at = (
            map(math.log, (self.low, self.high, value)) if self.logarithmic else (self.low, self.high, value)
        )
        return self.start + (at - low) / (high - low) * (self.end - self.start)


def scale(
    values: Sequence[float],
    start: float,
    end: float,
    *,
    logarithmic: bool = False,
    tight: bool = False,
    share: bool = False,
) -> Scale:
    """The scale that all values fit into, with room around them unless `tight`; of a `share` hardly beyond 0 and 1."""
    low, high = min(values), max(values)
    if logarithmic:
        low, high = low / 1.15, high * 1.15
        decades = range(math.ceil(math.log10(low)), math.floor(math.log10(high)) + 1)
        every = math.ceil(len(decades) / 6)
        return Scale(low, high, start, end, [10.0**decade for decade in decades[::every]], True)
    if low == high:
        room = abs(low) * 0.1 or 1.0
    else:
        room = 0.0 if tight else (high - low) * 0.06
        # Values near zero are read against it.
        if not tight and 0 < low < 0.4 * high:
            low, room = 0.0, high * 0.06
    bottom, top = low if low == 0 and not tight else low - room, high + room
    if share:
        least = 0.02 * (top - bottom)
        bottom, top = max(bottom, -least), min(top, 1 + least)
    return Scale(bottom, top, start, end, ticks(bottom, top))


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """At most `most` multiples of 1, 2 or 5 times a power of ten between two values."""
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    # The dust keeps a step that is itself such a number.
    step = next(size * power for size in (1, 2, 5, 10) if size * power >= rough * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [index * step for index in range(first, last + 1)]


def draw(chart: Chart | HeatMap, identity: str) -> str:
    """An `svg` element with a title and a description; `identity` is unique on the page."""
    image = ET.Element(
        "svg",
        {
            "viewBox": f"0 0 {WIDTH} {HEIGHT}",
            "role": "img",
            "class": "chart",
            "aria-labelledby": f"{identity}-title {identity}-text",
        },
    )
    _text(image, "title", chart.title, id=f"{identity}-title")
    _text(image, "desc", describe(chart), id=f"{identity}-text")
    if isinstance(chart, Chart):
        _curves(image, chart)
    else:
        _heat_map(image, chart)
    return ET.tostring(image, encoding="unicode")


def swatch(line: Line) -> str:
    """A short piece of a line, for a legend."""
    image = ET.Element("svg", {"viewBox": "0 0 30 10", "class": "swatch", "aria-hidden": "true"})
    _part(image, "line", _style(line), x1=0, y1=5, x2=30, y2=5)
    _marker(image, line, 15, 5)
    return ET.tostring(image, encoding="unicode")


def _curves(image: ET.Element, chart: Chart) -> None:
    xs = [value for line in chart.lines for value in line.x]
    ys = [value for line in chart.lines for value in line.y]
    x = scale([*xs, *([0.0] if min(xs) > 0 else [])], LEFT, WIDTH - RIGHT, tight=True)
    y = scale(ys, HEIGHT - BOTTOM, TOP, logarithmic=chart.logarithmic, share=chart.shared)
    _axes(image, x, y, chart.x_label)
    places = [(place, what) for place, what in chart.marks if x.low <= place <= x.high]
    for number, (place, what) in enumerate(places):
        _part(image, "line", "mark", x1=x(place), y1=TOP, x2=x(place), y2=HEIGHT - BOTTOM)
        room = (places[number + 1][0] if number + 1 < len(places) else x.high) - place
        if x(x.low + room) - x.start > 6.2 * len(what):
            _text(image, "text", what, x=x(place) + 3, y=TOP - 6, **{"class": "note"})
    for line in chart.lines:
        path = " ".join(f"{x(at):.2f},{y(value):.2f}" for at, value in line.corners())
        _part(image, "polyline", _style(line), points=path)
        if len(line.x) <= MARKED:
            for at, value in zip(line.x, line.y, strict=True):
                point = _marker(image, line, x(at), y(value))
                _text(point, "title", f"{line.name}: {value:.6g} at {at:g}")


def _heat_map(image: ET.Element, chart: HeatMap) -> None:
    width = chart.bins[1] - chart.bins[0] if len(chart.bins) > 1 else 1.0
    x = scale([0.0, *chart.x], LEFT, WIDTH - RIGHT, tight=True)
    y = Scale(
        chart.bins[0], chart.bins[-1] + width, HEIGHT - BOTTOM, TOP, ticks(chart.bins[0], chart.bins[-1] + width)
    )
    _axes(image, x, y, chart.x_label)
    most = max(max(column) for column in chart.shares) or 1.0
    # A column tells of the stretch up to it.
    starts = [max(0.0, 2 * chart.x[0] - chart.x[1]) if len(chart.x) > 1 else 0.0, *chart.x[:-1]]
    for start, end, column in zip(starts, chart.x, chart.shares, strict=True):
        for lower, share in zip(chart.bins, column, strict=True):
            if share > 0:
                top, height = y(lower + width), y(lower) - y(lower + width)
                cell = _part(image, "rect", "cell", x=x(start), y=top, width=x(end) - x(start), height=height)
                cell.set("fill-opacity", f"{share / most:.3f}")
                _text(cell, "title", f"{share:.1%} of labels with confidence from {lower:g} to {lower + width:.3g}")


def _axes(image: ET.Element, x: Scale, y: Scale, x_label: str) -> None:
    for value in y.ticks:
        _part(image, "line", "grid", x1=LEFT, y1=y(value), x2=WIDTH - RIGHT, y2=y(value))
        _text(image, "text", tick_text(value, y.ticks), x=LEFT - 7, y=y(value), **{"class": "y tick"})
    for value in x.ticks:
        _part(image, "line", "grid", x1=x(value), y1=TOP, x2=x(value), y2=HEIGHT - BOTTOM)
        _text(image, "text", tick_text(value, x.ticks), x=x(value), y=HEIGHT - BOTTOM + 17, **{"class": "x tick"})
    _part(image, "line", "axis", x1=LEFT, y1=HEIGHT - BOTTOM, x2=WIDTH - RIGHT, y2=HEIGHT - BOTTOM)
    middle = (LEFT + WIDTH - RIGHT) / 2
    _text(image, "text", x_label, x=middle, y=HEIGHT - 8, **{"class": "label"})


def tick_text(value: float, all_ticks: Sequence[float]) -> str:
    """A tick with as many digits as tell it from the next ones."""
    largest = max(abs(tick) for tick in all_ticks)
    if (largest and not 1e-3 <= largest < 1e6) or _spans_decades(all_ticks):
        return f"{value:.5g}"
    steps = [b - a for a, b in pairwise(all_ticks)]
    digits = max(0, -math.floor(math.log10(min(steps)) + 1e-9)) if steps else 2
    return f"{value:.{digits}f}"


def _spans_decades(all_ticks: Sequence[float]) -> bool:
    return len(all_ticks) > 1 and all_ticks[0] > 0 and all_ticks[1] / all_ticks[0] > 5


def _style(line: Line) -> str:
    return f"curve run{line.run % COLOURS}" + (" dashed" if line.dashed else "")


def _marker(image: ET.Element, line: Line, x: float, y: float) -> ET.Element:
    style = f"point run{line.run % COLOURS}" + (" hollow" if line.dashed else "")
    # The same colour comes again after all colours, with the next shape.
    shape = _SHAPES[(line.run + line.run // COLOURS) % len(_SHAPES)]
    if shape == "circle":
        return _part(image, "circle", style, cx=x, cy=y, r=3)
    if shape == "square":
        return _part(image, "rect", style, x=x - 2.8, y=y - 2.8, width=5.6, height=5.6)
    corners: dict[str, Sequence[tuple[float, float]]] = {
        "diamond": ((0, -4), (4, 0), (0, 4), (-4, 0)),
        "triangle": ((0, -3.8), (3.7, 2.8), (-3.7, 2.8)),
    }
    return _part(image, "polygon", style, points=" ".join(f"{x + dx:.2f},{y + dy:.2f}" for dx, dy in corners[shape]))


def _part(parent: ET.Element, tag: str, style: str, **values: float | str) -> ET.Element:
    words = {name: value if isinstance(value, str) else f"{value:.2f}" for name, value in values.items()}
    return ET.SubElement(parent, tag, {"class": style, **words})


def _text(parent: ET.Element, tag: str, content: str, **values: float | str) -> ET.Element:
    words = {name: value if isinstance(value, str) else f"{value:.2f}" for name, value in values.items()}
    element = ET.SubElement(parent, tag, words)
    element.text = content
    return element
