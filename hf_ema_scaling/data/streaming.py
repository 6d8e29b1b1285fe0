"""Streams: data sets that can only be read in order, pass after pass, and where a run stands in one."""

from __future__ import annotations

import copy
import json
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import datasets
import numpy as np
import torch
from datasets.distributed import split_dataset_by_node
from datasets.iterable_dataset import BufferShuffledExamplesIterable
from torch.utils.data import IterableDataset
from tqdm.auto import tqdm
from transformers.utils import logging

logger = logging.get_logger(__name__)

Example = Mapping[str, Any]
Place = dict[str, Any]
"""Where a reader stands; JSON values. `passes`: passes done; `rows`: rows read of this one; `state`: what the data set
says of it (`state_dict`), or None; `next`: `row_digest` of the row that follows, or None."""


class StreamError(ValueError):
    """A stream gives no rows, a row that cannot be read, or other rows than before."""


def is_stream(dataset: Any) -> bool:
    """Whether a data set can only be iterated: an `IterableDataset` of `datasets` or of torch."""
    return isinstance(dataset, datasets.IterableDataset | IterableDataset)


def split_by_shards(dataset: Any, world_size: int) -> bool:
    """Whether each process reads shards of its own; else each reads every row and keeps what it draws.

    As `split_dataset_by_node` decides: where the number of shards is a multiple of the number of processes.
    """
    return isinstance(dataset, datasets.IterableDataset) and world_size > 1 and dataset.num_shards % world_size == 0


def row_digest(row: Any) -> int:
    """CRC-32 of the content of a row; of what is no number, text, bytes, array or nest of these only the type."""

    def update(value: Any, crc: int) -> int:
        if isinstance(value, Mapping):
            for key in sorted(value, key=str):
                crc = update(value[key], update(str(key), crc))
            return crc
        if isinstance(value, torch.Tensor):
            value = value.detach().cpu().float().numpy() if value.is_floating_point() else value.cpu().numpy()
        if isinstance(value, list | tuple) and set(map(type, value)) in ({int}, {float}):
            value = np.asarray(value)
        if isinstance(value, np.ndarray) and value.dtype != object:
            return zlib.crc32(np.ascontiguousarray(value).tobytes(), update([str(value.dtype), *value.shape], crc))
        if isinstance(value, list | tuple | np.ndarray):
            for item in value:
                crc = update(item, crc)
            return update(len(value), crc)
        if isinstance(value, bytes):
            return zlib.crc32(value, crc)
        known = value is None or isinstance(value, str | int | float | np.generic)
        return zlib.crc32((repr(value) if known else type(value).__name__).encode(), crc)

    return update(row, 0)


class StreamReader:
    """Rows of a stream in its order; when a pass ends the next one begins (`set_epoch` first, where there is one).

    Args:
        dataset: the stream.
        name: of the trainer's argument, for messages.
        share: rank and number of processes where each reads shards of its own (`split_by_shards`), else None.
    """

    def __init__(self, dataset: Any, name: str, share: tuple[int, int] | None = None) -> None:
        whole = _unread(dataset)
        self.dataset: Any = whole if share is None else split_dataset_by_node(whole, *share)
        self.name = name if share is None else f"{name} (the shards of process {share[0]})"
        self._says_all = hasattr(self.dataset, "state_dict") and not _has_buffer(getattr(whole, "_ex_iterable", None))
        self.passes = 0
        self.rows = 0
        self._iterator: Iterator[Example] | None = None
        self._ahead: tuple[int, Example] | None = None
        self._before: Place = {}

    def read(self) -> tuple[int, Example]:
        """The next row, and its number in its pass, from 0.

        Raises:
            StreamError: where there is none in a whole pass, or it cannot be read.
        """
        if self._ahead is not None:
            row, self._ahead = self._ahead, None
            return row
        return self._advance()

    def peek(self) -> tuple[int, Example]:
        """What `read` gives next, without taking it."""
        if self._ahead is None:
            self._before = self._here()
            self._ahead = self._advance()
        return self._ahead

    def place(self, *, verify: bool) -> Place:
        """Where the reader stands after the last row taken; with `verify` also the digest of the row that follows."""
        verify = verify and (self.passes > 0 or self.rows > 0)  # a stream that nobody needs yet stays closed
        following = row_digest(self.peek()[1]) if verify else None
        return {**(self._here() if self._ahead is None else self._before), "next": following}

    def resume(self, place: Place) -> None:
        """Continue at a place, by what the data set saved, or by reading the pass up to it once more.

        The next row must be the right one in both cases.

        Raises:
            StreamError: where also a second reading gives other rows.
        """
        self.passes, self.rows = place["passes"], place["rows"]
        if self.rows == 0:
            return
        why = "it has no state that could be saved (no state_dict, or rows in a shuffle buffer)"
        if place["state"] is not None and hasattr(self.dataset, "load_state_dict"):
            try:
                self.dataset.load_state_dict(place["state"])
                self._open()
                following = row_digest(self.peek()[1])
                self._before = place  # the data set itself says it once it is read on
                if place["next"] in (None, following):
                    return
                why = "its saved state leads elsewhere"
            except Exception as error:
                why = f"its saved state cannot be loaded ({type(error).__name__}: {error})"
            self.dataset.load_state_dict({})
        self._iterator = self._ahead = None
        self.passes, self.rows = place["passes"], 0
        logger.warning(f"{self.name}: reading {place['rows']} rows of pass {self.passes + 1} once more, for {why}.")
        self.skip(place["rows"])
        other = self.passes != place["passes"] or (
            place["next"] is not None and row_digest(self.peek()[1]) != place["next"]
        )
        if other:
            raise StreamError(
                f"{self.name} gives other rows than before the checkpoint: row {place['rows']} of pass "
                f"{place['passes'] + 1} differs. Give the same data, and every shuffle a fixed seed"
            )

    def skip(self, count: int) -> None:
        """Read `count` rows and drop them."""
        for _ in tqdm(range(count), desc=f"skipping rows of {self.name}", disable=not sys.stderr.isatty()):
            self.read()

    def _here(self) -> Place:
        state = None
        if self._iterator is not None and self._says_all:
            state = _as_json(self.dataset.state_dict())
        return {"passes": self.passes, "rows": self.rows, "state": state}

    def _open(self) -> Iterator[Example]:
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(self.passes)
        self._iterator = iter(self.dataset)
        return self._iterator

    def _advance(self) -> tuple[int, Example]:
        while True:
            iterator = self._iterator or self._open()
            try:
                row = next(iterator)
            except StopIteration:
                if self.rows == 0:
                    again = f" in pass {self.passes + 1}: can it be iterated more than once?" if self.passes else ""
                    raise StreamError(f"{self.name} is empty{again}") from None
                self.passes, self.rows, self._iterator = self.passes + 1, 0, None
                continue
            except Exception as error:
                raise StreamError(
                    f"{self.name}: row {self.rows} (from 0) of pass {self.passes + 1} cannot be read "
                    f"({type(error).__name__}: {error}); repair it, or leave it out by a filter before what fails"
                ) from error
            if not isinstance(row, Mapping):
                raise StreamError(
                    f"{self.name}: row {self.rows} is a {type(row).__name__}; a stream must yield rows one by one, as "
                    "dictionaries"
                )
            self.rows += 1
            return self.rows - 1, row


class StreamHead:
    """The first rows of a stream by number, for looks at the data before a run; it keeps what it has read.

    Args:
        dataset: the stream.
        name: of the trainer's argument, for messages.
    """

    def __init__(self, dataset: Any, name: str) -> None:
        self._reader = StreamReader(dataset, name)
        self._rows: list[Example] = []

    def at_most(self, count: int) -> int:
        """How many of the first `count` rows there are.

        Raises:
            StreamError: as `StreamReader.read`.
        """
        while len(self._rows) < count and not self._reader.passes:
            _, row = self._reader.read()
            if not self._reader.passes:
                self._rows.append(row)
        return min(count, len(self._rows))

    def __getitem__(self, index: int) -> Example:
        if self.at_most(index + 1) <= index:
            raise IndexError(f"row {index} of a stream of {len(self._rows)} rows")
        return self._rows[index]


def _unread(dataset: Any) -> Any:
    """A stream of `datasets` that shares no state with the given one or what it was made of; one of torch as it is.

    Two streams of one origin, or one that is read twice, would move each other's state: their parts hold it, and
    `copy.copy` of such a stream is the stream itself.
    """
    if not isinstance(dataset, datasets.IterableDataset):
        return dataset
    return datasets.IterableDataset(
        _separate(dataset._ex_iterable),
        info=dataset._info,
        split=dataset._split,
        formatting=dataset._formatting,
        distributed=dataset._distributed,
        token_per_repo_id=dataset._token_per_repo_id,
    )


def _separate(part: Any) -> Any:
    part = copy.copy(part)
    if hasattr(part, "ex_iterable"):
        part.ex_iterable = _separate(part.ex_iterable)
    if hasattr(part, "ex_iterables"):
        part.ex_iterables = [_separate(inner) for inner in part.ex_iterables]
    return part


def _has_buffer(part: Any) -> bool:
    """Whether rows wait in a shuffle buffer, which `state_dict` leaves out."""
    if isinstance(part, BufferShuffledExamplesIterable) and part.buffer_size > 1:
        return True
    inner = [getattr(part, "ex_iterable", None), *getattr(part, "ex_iterables", ())]
    return any(_has_buffer(other) for other in inner if other is not None)


def _as_json(state: Any) -> Any | None:
    """The state, if JSON keeps it as it is."""
    try:
        return state if json.loads(json.dumps(state)) == state else None
    except (TypeError, ValueError):
        return None


MakeReaders = Callable[[], dict[int, StreamReader]]
