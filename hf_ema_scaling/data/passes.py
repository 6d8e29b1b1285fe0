"""Passes over one data set: which of its items come next, in a seeded order that batches only cut."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

LABELLED = 0
UNLABELLED = 1

# Share of a reference step below which a difference of clock positions is rounding, not data.
CLOCK_DUST = 1e-9


@dataclass(frozen=True)
class DataSource:
    """The sizes of one data set, as the stream needs them.

    Args:
        units: float64 `(items,)`: what each item counts for - 1.0 in samples, its duration in seconds, its tokens.
        lengths: float64 `(items,)` or `None`: what padding depends on (frames, seconds, tokens). Used to put items of
            similar length together; `None` keeps the random order.
        in_order: whether items are drawn in their own order, as those of a stream, and not in a random one.
    """

    units: NDArray[np.float64]
    lengths: NDArray[np.float64] | None = None
    in_order: bool = False

    def __post_init__(self) -> None:
        if self.units.ndim != 1 or len(self.units) == 0:
            raise ValueError(f"a data source needs at least one item, got sizes of shape {self.units.shape}")
        bad = np.flatnonzero(~(np.isfinite(self.units) & (self.units > 0)))
        if len(bad):
            raise ValueError(
                f"item {bad[0]} has size {self.units[bad[0]]}; every item needs a finite size above 0 "
                f"({len(bad)} of {len(self.units)} do not): drop those items from the data set"
            )
        if self.lengths is not None and len(self.lengths) != len(self.units):
            raise ValueError(f"{len(self.lengths)} lengths for {len(self.units)} items")

    @classmethod
    def of_samples(cls, items: int, lengths: NDArray[np.float64] | None = None) -> DataSource:
        """`items` items that count one unit each."""
        return cls(np.ones(items, dtype=np.float64), lengths)

    @classmethod
    def of_stream(cls, items: int) -> DataSource:
        """As many rows of a stream, one unit each, as a run draws at most: item i is its row i, pass after pass."""
        return cls(np.broadcast_to(np.float64(1.0), (items,)), in_order=True)

    def __len__(self) -> int:
        return len(self.units)


class Passes:
    """Consecutive seeded passes over one source; `take` continues where the last one stopped."""

    def __init__(self, source: DataSource, kind: int, seed: int, bucket_window: int) -> None:
        self.source = source
        self.kind = kind
        self.seed = seed
        self.bucket_window = bucket_window
        self.passes = 0
        self.rest: NDArray[np.int32] = np.empty(0, dtype=np.int32)

    def take(self, units: float, batch: float, begun: float = 0.0, stop: float | None = None) -> NDArray[np.int32]:
        """The next items, until they make up at least `units`; passes begun here are bucketed by `batch` units.

        The first item taken is taken for the first of a reference batch of which `begun` units are drawn already. With
        `stop` these are the first of them, up to so many units, with the same bits.
        """
        left = 0.0 if stop is None else units - stop
        taken: list[NDArray[np.int32]] = []
        missing = units
        while missing > left:
            if len(self.rest) == 0:
                self.rest = self._next_pass(batch, begun=(begun + units - missing) % batch)
            sums = np.cumsum(self.source.units[self.rest])
            count = min(int(np.searchsorted(sums, missing - left, side="left")) + 1, len(self.rest))
            taken.append(self.rest[:count])
            missing -= sums[count - 1]
            self.rest = self.rest[count:]
        return np.concatenate(taken) if taken else np.empty(0, dtype=np.int32)

    def items(self, count: int, batch: float) -> NDArray[np.int32]:
        """The next `count` items; passes begun here are bucketed by `batch` units."""
        taken: list[NDArray[np.int32]] = [np.empty(0, dtype=np.int32)]
        while count > 0:
            if len(self.rest) == 0:
                self.rest = self._next_pass(batch, begun=0.0)
            taken.append(self.rest[:count])
            self.rest = self.rest[count:]
            count -= len(taken[-1])
        return np.concatenate(taken)

    def _next_pass(self, batch: float, begun: float) -> NDArray[np.int32]:
        """The items of one pass, which begins when `begun` units of a reference batch are drawn already."""
        if self.source.in_order:
            return np.arange(len(self.source), dtype=np.int32)
        rng = np.random.default_rng([self.seed, self.kind, self.passes])
        self.passes += 1
        order = rng.permutation(len(self.source)).astype(np.int32)
        return self._bucketed(order, self.source, rng, batch, begun)

    def _bucketed(
        self, order: NDArray[np.int32], source: DataSource, rng: np.random.Generator, batch: float, begun: float
    ) -> NDArray[np.int32]:
        """`order`, a permutation of the items of `source`, by length inside windows."""
        if self.bucket_window == 0 or source.lengths is None:
            return order
        parts: list[NDArray[np.int32]] = []
        windows = _cut(order, source.units, batch * self.bucket_window, begun)
        for number, window in enumerate(windows):
            window = window[np.argsort(source.lengths[window], kind="stable")]
            batches = _cut(window, source.units, batch, 0.0 if number else begun)
            # What the pass before left of its last batch stays first, and this pass's own unfilled last batch stays
            # last: elsewhere they would shift every other batch off its border.
            first = 1 if number == 0 and begun > CLOCK_DUST * batch else 0
            unfilled = source.units[batches[-1]].sum() < batch * (1 - CLOCK_DUST)
            last = len(batches) - 1 if number == len(windows) - 1 and unfilled else len(batches)
            last = max(first, last)
            parts.extend(batches[:first])
            parts.extend(batches[i] for i in first + rng.permutation(last - first))
            parts.extend(batches[last:])
        return np.concatenate(parts)


def _cut(items: NDArray[np.int32], sizes: NDArray[np.float64], size: float, begun: float) -> list[NDArray[np.int32]]:
    """`items` in pieces of `size` units, the first one shorter by the `begun` units it already has."""
    units = sizes[items]
    piece_of = np.floor((begun + np.cumsum(units) - units) / size + CLOCK_DUST)
    return np.split(items, np.flatnonzero(np.diff(piece_of)) + 1)
