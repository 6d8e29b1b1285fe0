"""The pool of pseudo-labelled items that unlabelled items are drawn from, as a function of seed and position alone.

slimIPL (arXiv 2010.11524) keeps a cache of pseudo-labelled items, draws its unlabelled items from there, and replaces
each of them, with a given probability, by a new item that is labelled at that moment. Which items are drawn and which
of them leave needs no labels, so it is all laid out before the run.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from hf_ema_scaling.data.passes import DataSource, Passes

# Distinguishes the seeds of passes over the pool from those of passes over the data.
POOL_SEED = 1


class PooledPasses(Passes):
    """Passes over a pool of items, which come from passes over a data set.

    First come the items that fill the pool, in the order of passes over the data: item k gets slot k. From then on a
    pass visits every slot of the pool once, in an order of its own (sorted by length inside windows, as passes over
    data are), and gives the item that it holds. After each visit the item is replaced, with probability `refresh`, by
    the next item of the passes over the data. So an item is drawn as often as a geometric distribution says, 1 /
    `refresh` times on average, about one length of the pool apart.

    Args:
        source: sizes of the data set.
        kind: `UNLABELLED`, for the seeds.
        seed: seed of all permutations and replacements.
        bucket_window: reference batches per bucketing window.
        fill: units of the items that fill the pool; the last one may reach past it.
        refresh: probability that an item is replaced once it has been drawn.
    """

    def __init__(
        self, source: DataSource, kind: int, seed: int, bucket_window: int, *, fill: float, refresh: float
    ) -> None:
        super().__init__(source, kind, seed, bucket_window)
        self.fill = fill
        self.refresh = refresh
        self.fresh = Passes(source, kind, seed, bucket_window)
        self.pool: NDArray[np.int32] = np.empty(0, dtype=np.int32)
        self._slots: list[NDArray[np.int32]] = []
        self._entering: list[NDArray[np.int32]] = []

    def slots(self, drawn: int) -> NDArray[np.int32]:
        """Slot of the first `drawn` items."""
        return _first(self._slots, drawn)

    def entering(self, drawn: int) -> NDArray[np.int32]:
        """Row that takes the slot of each of the first `drawn` items once it has been drawn; -1 where it stays."""
        return _first(self._entering, drawn)

    def _next_pass(self, batch: float, begun: float) -> NDArray[np.int32]:
        if len(self.pool) == 0:
            self.pool = self.fresh.take(self.fill, batch, begun)
            self._slots.append(np.arange(len(self.pool), dtype=np.int32))
            self._entering.append(np.full(len(self.pool), -1, dtype=np.int32))
            return self.pool.copy()
        rng = np.random.default_rng([self.seed, self.kind, self.passes, POOL_SEED])
        self.passes += 1
        order = rng.permutation(len(self.pool)).astype(np.int32)
        leaves = rng.random(len(self.pool)) < self.refresh
        slots = self._bucketed(order, self._held(), rng, batch, begun)
        rows = self.pool[slots]
        entering = np.full(len(slots), -1, dtype=np.int32)
        entering[leaves] = self.fresh.items(int(leaves.sum()), batch)
        # Each slot is visited once, so what enters during a pass is drawn by a later one.
        self.pool[slots[leaves]] = entering[leaves]
        self._slots.append(slots)
        self._entering.append(entering)
        return rows

    def _held(self) -> DataSource:
        """Sizes of the items in the pool, by slot."""
        lengths = self.source.lengths
        return DataSource(self.source.units[self.pool], None if lengths is None else lengths[self.pool])


def _first(parts: list[NDArray[np.int32]], count: int) -> NDArray[np.int32]:
    return np.concatenate([np.empty(0, dtype=np.int32), *parts])[:count]


class LabelEvents(NamedTuple):
    """Labels that the teacher makes in one step, in stream order."""

    positions: NDArray[np.int64]
    """Stream position at which each is made: identifies it within the run."""
    rows: NDArray[np.int32]
    """Row of the unlabelled set."""
    drawn: NDArray[np.bool_]
    """Whether the item is drawn at that position; the others take the place of the item that is."""


@dataclass(frozen=True)
class LabelPool:
    """The pool of a run: what is held where, at every position of its stream."""

    size: int
    """Slots."""
    full_at: int
    """Stream position at which the pool is full; items drawn before are labelled as they are drawn."""
    slot: NDArray[np.int32]
    """Slot that each item of the stream enters or is drawn from; -1 for labelled items."""
    entering: NDArray[np.int32]
    """Row that takes the slot after the draw; -1 where the item stays, and for labelled items."""
    index: NDArray[np.int32]
    """Row of each item of the stream in its source."""

    def events(self, first: int, last: int) -> LabelEvents:
        """What is labelled in a step that covers the stream positions from `first` up to `last`."""
        entering = self.entering[first:last]
        drawn = (self.slot[first:last] >= 0) & (np.arange(first, last) < self.full_at)
        inside = np.flatnonzero(drawn | (entering >= 0))
        rows = np.where(drawn, self.index[first:last], entering)[inside]
        return LabelEvents(first + inside, rows, drawn[inside])

    def made_at(self, first: int, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Where the labels of unlabelled items are made, for items of the step that begins at `first`.

        Args:
            first: stream position at which the step begins.
            positions: stream positions of unlabelled items of that step, in any order.

        Returns:
            For each item the position among those of `events` at which its label is made, or -1 where that was before
            the step, so that its slot holds it when the step begins.
        """
        if len(positions) == 0:
            return positions
        events = self.events(first, int(positions.max()) + 1).positions
        # Events and draws of a slot side by side, in stream order; an item that replaces another enters after it.
        places = np.concatenate([events, positions])
        draws = np.repeat([False, True], [len(events), len(positions)])
        times = 2 * places + (~draws & (places >= self.full_at))
        slots = self.slot[places]
        order = np.lexsort((draws, times, slots))
        latest = np.maximum.accumulate(np.where(draws[order], -1, np.arange(len(order))))
        known = (latest >= 0) & (slots[order[latest]] == slots[order])
        made = np.empty(len(places), dtype=np.int64)
        made[order] = np.where(known, places[order[latest]], -1)
        return made[len(events) :]

    def held(self, position: int) -> NDArray[np.int32]:
        """Row of the unlabelled set in each slot after `position` items of the stream; -1 for an empty slot."""
        rows = np.full(self.size, -1, dtype=np.int32)
        events = self.events(0, position)
        # Of assignments to one slot the last one stays.
        rows[self.slot[events.positions]] = events.rows
        return rows
