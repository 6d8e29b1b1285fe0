"""What became of the rows: how many, and how many seconds or tokens, were kept and dropped for which reason."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

KEPT = "kept"


@dataclass
class LabellingSummary:
    """Counts by reason; `kept` for rows that have a label to train on.

    Args:
        unit: `seconds` or `tokens`.
        rows: number of rows by reason.
        sizes: their size by reason, in `unit`; audio that cannot be read has none.
    """

    unit: str
    rows: dict[str, int] = field(default_factory=dict)
    sizes: dict[str, float] = field(default_factory=dict)

    def add(self, reason: str | None, size: float) -> None:
        """Count one row."""
        name = reason or KEPT
        self.rows[name] = self.rows.get(name, 0) + 1
        self.sizes[name] = self.sizes.get(name, 0.0) + size

    @property
    def total(self) -> int:
        """Rows there were."""
        return sum(self.rows.values())

    def to_dict(self) -> dict[str, Any]:
        """JSON values, `kept` first and then in alphabetical order."""
        return {
            "unit": self.unit,
            "reasons": {
                name: {"rows": self.rows[name], self.unit: round(self.sizes[name], 6)} for name in self._names()
            },
        }

    @classmethod
    def merged(cls, unit: str, parts: Iterable[Mapping[str, Any]]) -> LabellingSummary:
        """The sum of what `to_dict` made of each part."""
        summary = cls(unit)
        for part in parts:
            for name, values in part["reasons"].items():
                summary.rows[name] = summary.rows.get(name, 0) + values["rows"]
                summary.sizes[name] = summary.sizes.get(name, 0.0) + values[unit]
        return summary

    def table(self) -> str:
        """The counts as people read them."""
        names = self._names()
        width = max(len("total"), *map(len, names)) if names else len("total")
        lines = [f"{'':>{width}}  {'rows':>10}  {self.unit:>12}"]
        lines += [f"{name:>{width}}  {self.rows[name]:>10}  {self.sizes[name]:>12.1f}" for name in names]
        lines.append(f"{'total':>{width}}  {self.total:>10}  {sum(self.sizes.values()):>12.1f}")
        return "\n".join(lines)

    def _names(self) -> list[str]:
        return sorted(self.rows, key=lambda name: (name != KEPT, name))
