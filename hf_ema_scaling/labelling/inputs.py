"""What the model reads of a row, and batches of bounded size."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor


@dataclass(frozen=True)
class Prepared:
    """What the model reads of one row.

    Args:
        inputs: arrays or lists by input name, without padding.
        length: in samples, frames or tokens.
        size: in seconds of audio or tokens: what the summary counts.
        cost: what it takes of a batch, in the same unit; more than its size where the model always hears a window.
            None for the size.
    """

    inputs: dict[str, Any]
    length: int
    size: float
    cost: float | None = None

    @property
    def share(self) -> float:
        """What it takes of a batch."""
        return self.size if self.cost is None else self.cost


class Inputs(Protocol):
    """How rows of one kind are read."""

    column: str
    unit: str
    same_length: bool
    """Whether rows of a batch must have one length, since padding would change their labels."""

    def prepare(self, row: Mapping[str, Any]) -> Prepared:
        """One row for the model.

        Raises:
            BadItemError: a row that the model cannot read.
        """
        ...

    def collate(self, rows: Sequence[Prepared]) -> dict[str, Tensor]:
        """A padded batch."""
        ...


def batches(rows: Sequence[Prepared], limit: float, same_length: bool) -> Iterator[list[int]]:
    """Row numbers of each batch: the longest rows first, padded size at most `limit`, at least one row.

    Args:
        rows: to be batched.
        limit: in units of `Prepared.size`; rows count as long as the longest of their batch.
        same_length: whether rows of a batch must have one length.
    """
    order = sorted(range(len(rows)), key=lambda number: -rows[number].length)
    batch: list[int] = []
    for number in order:
        longest = rows[batch[0]] if batch else None
        if longest is not None and (
            (len(batch) + 1) * longest.share > limit or (same_length and rows[number].length != longest.length)
        ):
            yield batch
            batch = []
        batch.append(number)
    if batch:
        yield batch
