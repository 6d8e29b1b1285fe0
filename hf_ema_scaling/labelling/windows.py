"""Rows of a data set, prepared a window at a time: only the needed columns, in the order of the data set."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from datasets import Audio, Dataset, IterableDataset

from hf_ema_scaling.data.bad_items import UNWANTED, BadItemError, BadItems
from hf_ema_scaling.labelling.inputs import Inputs, Prepared


class Item:
    """A row of the window that is being labelled: what is kept of it, and what the model reads or why it does not."""

    __slots__ = ("kept", "number", "prepared", "reason", "size")

    def __init__(self, number: int, kept: dict[str, Any]) -> None:
        self.number = number
        self.kept = kept
        self.prepared: Prepared | None = None
        self.reason: str | None = None
        self.size = 0.0


def needed(
    data: Dataset | IterableDataset, inputs: Inputs, kept: Sequence[str], taken: Iterable[str]
) -> Dataset | IterableDataset:
    """The columns that are read, audio undecoded.

    Args:
        data: to label.
        inputs: with the column of what the model reads.
        kept: columns that are written beside the labels.
        taken: names that the labels have already.

    Raises:
        ValueError: for a column that is not there, or one whose name is taken.
    """
    clash = sorted({*kept} & {*taken, inputs.unit})
    if clash:
        raise ValueError(f"the columns {', '.join(clash)} cannot be kept: the labels use these names; rename yours")
    wanted = list(dict.fromkeys([inputs.column, *kept]))
    if data.column_names is not None:
        missing = [name for name in wanted if name not in data.column_names]
        if missing:
            raise ValueError(f"no column {', '.join(missing)} in the data set: it has {', '.join(data.column_names)}")
    data = data.select_columns(wanted)
    for name in wanted:
        if data.features is not None and isinstance(data.features[name], Audio):
            data = data.cast_column(name, Audio(decode=False))
    return data


def rows_from(rows: Dataset | IterableDataset, done: int) -> Iterator[dict[str, Any]]:
    """The rows behind the first `done`."""
    if isinstance(rows, Dataset):
        return (rows[number] for number in range(done, len(rows)))
    return iter(rows.skip(done) if done else rows)


def windows(
    rows: Iterable[dict[str, Any]],
    done: int,
    inputs: Inputs,
    kept: Sequence[str],
    bad: BadItems,
    window: tuple[int, float],
) -> Iterator[list[Item]]:
    """The rows of one shard after another, prepared.

    Args:
        rows: those that are left.
        done: how many came before them.
        inputs: prepares a row.
        kept: columns to keep.
        bad: what happens to broken rows.
        window: rows, and size, at which one is closed.

    Raises:
        BadItemError: for a broken row, naming it, unless it is skipped.
    """
    items: list[Item] = []
    size = 0.0
    for number, row in enumerate(rows, start=done):
        item = Item(number, {name: row[name] for name in kept})
        try:
            item.prepared = inputs.prepare(row)
            item.size = item.prepared.size
        except BadItemError as error:
            if error.reason not in UNWANTED:
                bad.add(error.of(f"row {number + 1}"))
            item.reason, item.size = error.reason, error.size
        items.append(item)
        size += item.size
        if len(items) >= window[0] or size >= window[1]:
            yield items
            items, size = [], 0.0
    if items:
        yield items
