"""The report as one HTML page that needs nothing else, and its figures beside it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from hf_ema_scaling.report import svg, tables
from hf_ema_scaling.report.charts import Chart, sections
from hf_ema_scaling.report.figures import plot_section
from hf_ema_scaling.report.runs import Run


def render(runs: Sequence[Run]) -> str:
    """The page: no scripts, nothing that is loaded, every text of the runs escaped."""
    environment = Environment(
        loader=PackageLoader("hf_ema_scaling"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"cell": _cell, "draw": _draw, "swatch": _swatch}
    page = environment.get_template("report.html.jinja")
    return page.render(
        title=_title(runs),
        version=version("hf-ema-scaling"),
        runs=runs,
        sections=sections(runs),
        comparison=tables.comparison(runs),
        recipes=tables.recipes(runs),
        stages=[table for run in runs if (table := tables.stages(run))],
        warnings=[(run.name, run.plan["warnings"]) for run in runs if run.plan.get("warnings")],
        evaluations=[table for run in runs if (table := tables.evaluations(run))],
        ledgers=[table for run in runs for table in tables.ledgers(run)],
        is_chart=lambda chart: isinstance(chart, Chart),
    )


def write_report(runs: Sequence[Run], output: Path, *, figures: bool = True) -> list[Path]:
    """Writes the page, and with `figures` one PNG per section into `<name of the page>_figures/` beside it.

    Args:
        runs: what to show, in this order.
        output: HTML file to write; replaced if it is there.
        figures: whether to draw the PNGs too, by matplotlib.

    Returns:
        The files written, the page first.

    Raises:
        ImportError: when figures are asked for without matplotlib; the page is then written.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(render(runs), encoding="utf-8")
    written = [output]
    if figures:
        for section in sections(runs):
            path = output.with_name(f"{output.stem}_figures") / f"{section.slug}.png"
            plot_section(section, path)
            written.append(path)
    return written


def _title(runs: Sequence[Run]) -> str:
    return runs[0].name if len(runs) == 1 else f"{len(runs)} runs compared"


def _draw(chart: Any, identity: str) -> Markup:
    # Built as a tree of elements, which escapes what it is given.
    return Markup(svg.draw(chart, identity))


def _swatch(line: Any) -> Markup:
    return Markup(svg.swatch(line))


def _cell(value: Any) -> str | Markup:
    """A cell as people read it; numbers keep all their digits in the `value` of a `data` element."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (list, tuple)):
        return Markup(", ").join(_cell(inner) for inner in value)
    if not isinstance(value, (int, float)):
        return str(value)
    shown = f"{value:.5g}" if isinstance(value, float) and math.isfinite(value) else str(value)
    return Markup('<data value="{}">{}</data>').format(repr(value), shown)
