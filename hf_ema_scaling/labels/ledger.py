"""The ledger: how many pseudo-labels were kept and dropped, for which reason, of which source, over the whole run."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

LEDGER_NAME = "ledger.json"
KEPT = "kept"
UNIT_SCALE = 2**20
"""Units are counted in parts of 2**-20, as integers, so that their sum has no order."""

Book = dict[str, dict[str, list[int]]]
"""Source -> reason, or `KEPT` -> items, then units and further measures in parts of `1 / UNIT_SCALE`."""


class Ledger:
    """Counts of pseudo-labels by source and reason.

    `used` counts every unlabelled row that the run drew, with the label it was trained on or dropped with. `made`
    counts labels when the teacher makes them. Without a label cache both count the same rows, but for `too_long`: that
    a label does not fit the student's frames shows when it is used. With a cache a label is made once and used several
    times, or not at all.

    Args:
        unit: what units are, for the table: samples, seconds or tokens.
        also: what else is known of items: their seconds, their tokens.
    """

    def __init__(self, unit: str, also: Sequence[str] = ()) -> None:
        self.unit = unit
        self.measures = (unit, *(name for name in also if name != unit))
        self.used: Book = {}
        self.made: Book = {}

    @staticmethod
    def add(book: Book, source: str, reasons: Iterable[str | None], *sizes: Iterable[float]) -> None:
        """Count labels of one source, by reason (None for those kept), each with its units and further measures."""
        reasons_of = book.setdefault(source, {})
        for reason, *values in zip(reasons, *sizes, strict=True):
            cell = reasons_of.setdefault(str(reason or KEPT), [0] * (1 + len(values)))
            cell[0] += 1
            for place, size in enumerate(values, 1):
                cell[place] += round(float(size) * UNIT_SCALE)

    @property
    def reasons(self) -> list[str]:
        """Every reason that a label was dropped for, in alphabetical order."""
        books = (*self.used.values(), *self.made.values())
        return sorted({reason for book in books for reason in book} - {KEPT})

    def state_dict(self) -> dict[str, Any]:
        """The counts, as JSON values, in an order of their own."""
        return {"used": _sorted(self.used), "made": _sorted(self.made)}

    def load_state_dict(self, *states: Mapping[str, Any]) -> None:
        """Take the sum of states (of the processes of a run), or start anew without one."""
        for name in ("used", "made"):
            total: Book = {}
            for state in states:
                for source, reasons in state.get(name, {}).items():
                    for reason, counts in reasons.items():
                        # States of earlier versions have fewer measures.
                        cell = total.setdefault(source, {}).setdefault(reason, [0] * (1 + len(self.measures)))
                        for place, count in enumerate(counts[: len(cell)]):
                            cell[place] += count
            setattr(self, name, _sorted(total))

    def to_dict(self) -> dict[str, Any]:
        """For people and model cards: items, units and further measures by source and reason, and the unit."""
        books = {
            name: {
                source: {
                    reason: {"items": items, **dict(zip(self.measures, map(_units, sizes), strict=True))}
                    for reason, (items, *sizes) in reasons.items()
                }
                for source, reasons in _sorted(book).items()
            }
            for name, book in (("used", self.used), ("made", self.made))
        }
        return {"unit": self.unit, **books}

    def save(self, folder: str | Path) -> None:
        """Write `ledger.json` into a folder: beside its place first, then renamed."""
        path = Path(folder) / LEDGER_NAME
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{LEDGER_NAME}.partial")
        partial.write_text(json.dumps(self.to_dict(), indent=1) + "\n", encoding="utf-8")
        partial.replace(path)

    def table(self) -> str:
        """What was used, as a table: one row for each source and outcome, with shares of the source's units."""
        rows: list[Sequence[str]] = [("source", "outcome", "items", *self.measures, "share")]
        for source, reasons in _sorted(self.used).items():
            total = sum(cell[1] for cell in reasons.values())
            for reason in (KEPT, *sorted(set(reasons) - {KEPT})):
                items, *sizes = reasons.get(reason, [0] * (1 + len(self.measures)))
                share = f"{sizes[0] / total:.1%}" if total else "-"
                rows.append((source, reason, str(items), *(f"{_units(size):.10g}" for size in sizes), share))
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        return "\n".join(
            "  ".join(
                cell.ljust(width) if column < 2 else cell.rjust(width)
                for column, (cell, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in rows
        )


def _units(parts: int) -> float:
    return round(parts / UNIT_SCALE, 3)


def _sorted(book: Book) -> Book:
    return {source: dict(sorted(book[source].items())) for source in sorted(book)}
