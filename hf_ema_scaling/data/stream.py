"""The order in which a run sees its data: one stream of items, the same at every batch size.

The stream is a pure function of the data's sizes, the seed and the recipe at the reference batch. Batch sizes,
processes and micro-batches only cut it (`sampler.py`): runs at different kappa see the same items in the same order.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from hf_ema_scaling.data.label_pool import LabelPool, PooledPasses
from hf_ema_scaling.data.passes import CLOCK_DUST, LABELLED, UNLABELLED, DataSource, Passes

__all__ = ["LABELLED", "UNLABELLED", "DataSource", "ReferenceStream"]


class ReferenceStream:
    """Every item a run draws, in order, laid out as reference batches.

    Before `pl_start` all units are labelled. From there on each source has a cumulative target, a continuous and
    piecewise linear function of the clock, and the source that is furthest behind gives the next item: after any
    number of items, also across a change of the ratio, both are off by at most one item of either source. Items before
    a change do not depend on it. Passes over a source are seeded permutations; batches may straddle passes; nothing is
    dropped.

    With `bucket_window > 0` each pass is cut into windows of that many reference batches, sorted by length inside a
    window, cut into reference batches and those shuffled: a reference batch then holds items of similar length from
    each source (in seconds, batches are off their borders by an utterance or two). The windows do not know kappa. A
    pass is cut for the ratio at which it begins.

    Args:
        labelled: sizes of the labelled set.
        reference_batch_size: B in units, over both sources.
        reference_steps: length of the run in reference steps.
        unlabelled: sizes of the unlabelled set, or `None`.
        pl_start: reference step at which unlabelled items begin (needs `unlabelled`).
        unlabelled_ratio: unlabelled units per labelled unit from `pl_start` on.
        ratio_changes: pairs of a reference step after `pl_start` and the ratio from there on.
        seed: seed of the permutations.
        bucket_window: reference batches per bucketing window; 0 for none.
        cache_steps: reference steps whose unlabelled items make up the pool of pseudo-labelled items; 0 for no pool.
        cache_refresh: probability that an item of the pool is replaced once it has been drawn.

    With a pool the unlabelled items of the first `cache_steps` reference steps from `pl_start` on are those of a run
    without one, and fill it; from then on unlabelled items are drawn from it (`PooledPasses`). Its size stays, also
    where the ratio changes later. Units are those of the items drawn, whenever they were labelled;
    items that enter the pool count where they are drawn.

    It holds 13 bytes for each item drawn in the run, 21 with a pool.

    Raises:
        ValueError: for sizes, ratios or starts that cannot be laid out, naming the value.
    """

    def __init__(
        self,
        labelled: DataSource,
        *,
        reference_batch_size: float,
        reference_steps: float,
        unlabelled: DataSource | None = None,
        pl_start: float = 0.0,
        unlabelled_ratio: float = 1.0,
        ratio_changes: Sequence[tuple[float, float]] = (),
        seed: int = 0,
        bucket_window: int = 0,
        cache_steps: float = 0.0,
        cache_refresh: float = 0.1,
    ) -> None:
        if not (np.isfinite(reference_batch_size) and reference_batch_size > 0):
            raise ValueError(f"reference_batch_size must be above 0, got {reference_batch_size}")
        if not (np.isfinite(reference_steps) and reference_steps > 0):
            raise ValueError(f"the run needs a length above 0 reference steps, got {reference_steps}")
        if bucket_window < 0:
            raise ValueError(f"bucket_window counts reference batches, got {bucket_window}")
        if unlabelled is not None:
            for ratio in (unlabelled_ratio, *(ratio for _, ratio in ratio_changes)):
                if not (np.isfinite(ratio) and ratio > 0):
                    raise ValueError(f"unlabelled_ratio must be above 0, got {ratio}")
            if not 0 <= pl_start < reference_steps:
                raise ValueError(
                    f"pl_start={pl_start} lies outside the run of {reference_steps} reference steps: no unlabelled "
                    "item would ever be drawn"
                )
            clocks = [pl_start, *(clock for clock, _ in ratio_changes), reference_steps]
            if not all(low < high for low, high in pairwise(clocks)):
                raise ValueError(
                    f"changes of the ratio must lie in order between pl_start={pl_start} and the end of the run at "
                    f"{reference_steps}, got {clocks[1:-1]}"
                )
            if cache_steps and not (np.isfinite(cache_steps) and cache_steps > 0 and 0 < cache_refresh <= 1):
                raise ValueError(
                    f"cache_steps must be 0 or above and cache_refresh in (0, 1], got {cache_steps}, {cache_refresh}"
                )
        elif ratio_changes:
            raise ValueError(f"the ratio changes at {ratio_changes[0][0]}, but there is no unlabelled source")
        self.reference_batch_size = float(reference_batch_size)
        self.reference_steps = float(reference_steps)
        self.labelled_items = len(labelled)
        self._labelled_size = float(labelled.units.mean())
        self.bucketed = bucket_window > 0
        self.pl_start = float(pl_start) if unlabelled is not None else None
        self.ratio_changes = tuple(clock for clock, _ in ratio_changes)
        total = self.reference_steps * self.reference_batch_size
        dust = CLOCK_DUST * self.reference_batch_size
        supervised = total if unlabelled is None else pl_start * self.reference_batch_size
        batch = self.reference_batch_size
        passes = Passes(labelled, LABELLED, seed, bucket_window)
        first = passes.take(supervised - dust, batch)
        source = np.zeros(len(first), dtype=np.int8)
        index = first
        units = labelled.units[first]
        second: Passes | None = None
        if unlabelled is not None:
            begun = units.sum()
            # In seconds the last utterance before `pl_start` may reach past a change.
            starts = [0.0, *(max(0.0, clock * batch - begun) for clock, _ in ratio_changes)]
            ratios = np.array([unlabelled_ratio, *(ratio for _, ratio in ratio_changes)])
            targets = [_Target(starts, 1.0 / (1.0 + ratios)), _Target(starts, ratios / (1.0 + ratios))]
            # One item more than the target of each source: the interleaving may run ahead by one.
            extra = max(labelled.units.max(), unlabelled.units.max())
            second = Passes(unlabelled, UNLABELLED, seed, bucket_window)
            if cache_steps:
                fill = targets[1].reached_at(max(0.0, (pl_start + cache_steps) * batch - begun)) - dust
                second = PooledPasses(
                    unlabelled, UNLABELLED, seed, bucket_window, fill=max(fill, dust), refresh=cache_refresh
                )
            both = (passes, second)
            drawn = [
                target.take(source_passes, total - begun, extra=extra, batch=batch)
                for target, source_passes in zip(targets, both, strict=True)
            ]
            sizes = [labelled.units[drawn[0]], unlabelled.units[drawn[1]]]
            # Merging by when targets ask for an item always draws from the source that is furthest behind.
            keys = np.concatenate([t.keys(np.cumsum(s) - s, dust) for t, s in zip(targets, sizes, strict=True)])
            order = np.argsort(keys, kind="stable")
            kinds = np.repeat(np.array([LABELLED, UNLABELLED], dtype=np.int8), [len(d) for d in drawn])
            source = np.concatenate([source, kinds[order]])
            index = np.concatenate([index, np.concatenate(drawn)[order]])
            units = np.concatenate([units, np.concatenate(sizes)[order]])
        cumulative = np.concatenate([[0.0], np.cumsum(units)])
        end = int(np.searchsorted(cumulative, total - dust, side="left"))
        self.source: NDArray[np.int8] = source[:end]
        self.index: NDArray[np.int32] = index[:end]
        self.cumulative_units: NDArray[np.float64] = cumulative[: end + 1]
        self.pool: LabelPool | None = None
        if isinstance(second, PooledPasses):
            self.pool = self._pool(second)
        self._lengths = (labelled.lengths, None if unlabelled is None else unlabelled.lengths)
        self._unlabelled_units = None if unlabelled is None else unlabelled.units

    def _pool(self, passes: PooledPasses) -> LabelPool:
        places = np.flatnonzero(self.source == UNLABELLED)
        size = len(passes.pool)
        if len(places) <= size:
            raise ValueError(
                f"the run ends before its pool of {size} pseudo-labelled items is full, {len(places)} unlabelled "
                "items after pl_start: lower cache_steps, or set it to 0 for labels that are made as items are drawn"
            )
        slot, entering = np.full((2, len(self.index)), -1, dtype=np.int32)
        slot[places], entering[places] = passes.slots(len(places)), passes.entering(len(places))
        return LabelPool(size, int(places[size - 1]) + 1, slot, entering, self.index)

    def __len__(self) -> int:
        return len(self.index)

    @property
    def examples_per_reference_batch(self) -> float:
        """n_ref: items of the labelled set's mean size in a reference batch - the constant the loss is divided by.

        It depends on the labelled set and B alone, so neither the length of the run nor unlabelled data changes what
        a labelled example weighs.
        """
        return self.reference_batch_size / self._labelled_size

    def position(self, clock: float | NDArray[np.float64]) -> NDArray[np.int64]:
        """Items drawn when the clock reaches `clock` reference steps: never more than one item past the target."""
        target = (np.asarray(clock, dtype=np.float64) - CLOCK_DUST) * self.reference_batch_size
        return np.minimum(np.searchsorted(self.cumulative_units, target, side="left"), len(self))

    def clock(self, position: int | NDArray[np.int64]) -> NDArray[np.float64]:
        """The clock, in reference steps, after `position` items."""
        return self.cumulative_units[position] / self.reference_batch_size

    def sort_by_length(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """`positions` of one source ordered by item length (stream order where lengths are unknown or equal)."""
        if len(positions) == 0:
            return positions
        lengths = self._lengths[int(self.source[positions[0]])]
        if lengths is None:
            return positions
        return positions[np.argsort(lengths[self.index[positions]], kind="stable")]

    def lengths_of(self, rows: NDArray[np.int32]) -> NDArray[np.float64] | None:
        """Lengths of rows of the unlabelled set; None where they are unknown."""
        lengths = self._lengths[UNLABELLED]
        return None if lengths is None else lengths[rows]

    def units_of(self, rows: NDArray[np.int32]) -> NDArray[np.float64]:
        """Units of rows of the unlabelled set.

        Raises:
            ValueError: where there is none.
        """
        if self._unlabelled_units is None:
            raise ValueError("the stream has no unlabelled source")
        return self._unlabelled_units[rows]

    def lengths_differ(self, positions: NDArray[np.int64]) -> bool:
        """Whether lengths of these `positions` of one source are known and not all equal, so that sorting matters."""
        lengths = self._lengths[int(self.source[positions[0]])] if len(positions) else None
        return lengths is not None and bool(np.ptp(lengths[self.index[positions]]) > 0)

    def labelled_passes(self, position: NDArray[np.int64]) -> NDArray[np.float64]:
        """Passes over the labelled set that the first `position` items make up."""
        drawn = np.concatenate([[0], np.cumsum(self.source == LABELLED)])
        return drawn[position] / self.labelled_items


class _Target:
    """Units of one source to have been drawn by a position in units of both: continuous and piecewise linear.

    Args:
        starts: where the pieces start, in order, the first at 0.
        shares: of the source, in each piece.
    """

    def __init__(self, starts: list[float], shares: NDArray[np.float64]) -> None:
        self.starts = starts
        self.shares = shares
        lengths = np.diff(starts)
        self.reached: list[float] = [0.0, *np.cumsum(lengths * shares[:-1]).tolist()]

    def reached_at(self, position: float) -> float:
        """The target at a position."""
        piece = bisect_right(self.starts, position) - 1
        return float(self.reached[piece] + (position - self.starts[piece]) * self.shares[piece])

    def take(self, passes: Passes, end: float, *, extra: float, batch: float) -> NDArray[np.int32]:
        """The items for the target at `end`, and `extra` units more."""
        taken: list[NDArray[np.int32]] = []
        drawn = 0.0
        for piece, (start, reached, share) in enumerate(zip(self.starts, self.reached, self.shares, strict=True)):
            units = reached + (end - start) * share + extra - drawn
            stop = units
            if piece + 1 < len(self.reached):
                stop = self.reached[piece + 1] - CLOCK_DUST * batch * share - drawn
            # Where the last utterance overshot its piece, the first reference batch of this one has begun.
            taken.append(passes.take(units, batch * share, begun=max(0.0, drawn - reached), stop=stop))
            drawn += passes.source.units[taken[-1]].sum()
        return np.concatenate(taken)

    def keys(self, drawn: NDArray[np.float64], dust: float) -> NDArray[np.float64]:
        """Where the target reaches `drawn` units of the source.

        Keys before a change of share are bit for bit those without it, and all keys after it are larger.
        """
        keys = drawn / self.shares[0]
        for start, reached, share in zip(self.starts[1:], self.reached[1:], self.shares[1:], strict=True):
            keys = np.where(keys < start - dust, keys, np.maximum(start, start + (drawn - reached) / share))
        return keys
