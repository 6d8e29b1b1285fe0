"""Rows of a data set, prepared a window at a time: only the needed columns, in the order of the data set."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from datasets import Audio, Dataset, IterableDataset

from hf_ema_scaling.data.bad_items import UNWANTED, BadItemError, BadItems
from hf_ema_scaling.data.streaming import row_digest
from hf_ema_scaling.labelling.inputs import Inputs, Prepared


class Item:
    """A row of the window that is being labelled: what is kept of it, and what the model reads or why it does not."""

    __slots__ = ("digest", "kept", "number", "prepared", "reason", "size")

    def __init__(self, number: int, kept: dict[str, Any]) -> None:
        self.number = number
        self.kept = kept
        self.prepared: Prepared | None = None
        self.reason: str | None = None
        self.size = 0.0
        self.digest: int | None = None
        """Of what was read of the row, by which it is known again; of the last row of a window only."""


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


def rows_from(rows: Dataset | IterableDataset, done: int, last: int | None = None) -> Iterator[dict[str, Any]]:
    """The rows behind the first `done`.

    Args:
        rows: of the data set.
        done: how many are labelled.
        last: of a stream, `Item.digest` of the last of them; None where it is not known.

    Raises:
        ValueError: for a stream that is not the one that was labelled before.
    """
    if isinstance(rows, Dataset):
        return (rows[number] for number in range(done, len(rows)))
    if not done or last is None:
        return iter(rows.skip(done) if done else rows)
    left = iter(rows.skip(done - 1))
    before = next(left, None)
    if before is None or _digest(before) != last:
        found = "there is none" if before is None else "its content is another"
        raise ValueError(
            f"the labels that are there end with row {done} of a stream, and now {found}: the stream has changed, or "
            "its order (a shuffle without a fixed seed). Choose another output folder, or give the same stream"
        )
    return left


def _digest(row: dict[str, Any]) -> int:
    """Of the content of a row; where audio has its bytes, whatever its path is."""

    def without_path(value: Any) -> Any:
        named = isinstance(value, dict) and value.get("bytes") is not None
        return {name: part for name, part in value.items() if name != "path"} if named else value

    return row_digest({name: without_path(value) for name, value in row.items()})


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
    row: dict[str, Any] = {}
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
            item.digest = _digest(row)
            yield items
            items, size = [], 0.0
    if items:
        items[-1].digest = _digest(row)
        yield items
