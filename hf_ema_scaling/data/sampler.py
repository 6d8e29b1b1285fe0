"""`ScheduledBatchSampler`: one dataloader batch is one optimizer step."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Sampler

from hf_ema_scaling.data.stream import LABELLED, UNLABELLED, ReferenceStream
from hf_ema_scaling.scaling.borders import StepBorders

# Reference steps by which a step border may miss a position of the stream and still mean it.
BORDER_TOLERANCE = 1e-6

# In the place of the number of a micro-batch: the item is labelled in this step, but not trained on.
LABELLED_ONLY = -1


class Draw(NamedTuple):
    """One item of one step, as the sampler hands it to the data set."""

    source: int
    """`LABELLED` or `UNLABELLED`."""
    index: int  # type: ignore[assignment]  # hides tuple.index
    """Row in that source."""
    position: int
    """Place in the reference stream: the identity that seeds augmentation. Of an item that is labelled only, the place
    of the item whose slot of the label pool it takes."""
    micro_batch: int
    """Number of the micro-batch on this process, or `LABELLED_ONLY`."""
    weight: float
    """1.0, or 0.0 for padding that only keeps the processes in step and for items that are labelled only."""
    label_batch: int | None = None
    """Number of the teacher's batch on this process; `None` where the teacher takes micro-batches, or nothing."""


class SampledStep(NamedTuple):
    """What one optimizer step covers."""

    start: float
    """Clock before the step, in reference steps."""
    end: float
    """Clock after it."""
    stage_kappa: float
    """Batch over reference batch of the stage the step belongs to; of a step that is cut short its own, `kappa`."""
    units: float
    """Units drawn."""
    items: int
    """Items drawn."""

    @property
    def kappa(self) -> float:
        """Reference steps covered: units / B."""
        return self.end - self.start


class ScheduledBatchSampler(Sampler[list[Draw]]):
    """Cuts a reference stream into optimizer steps: the whole run as one virtual epoch.

    Yields, for each optimizer step, `world_size` lists in a row, which is how accelerate's `BatchSamplerShard` deals
    them to processes; `len` is `steps * world_size`. Deterministic and without state, so skipping n batches resumes a
    run exactly. Deliberately without a `batch_size` attribute: accelerate would take the lists for constant and lose
    some.

    A micro-batch holds one source and at most `micro_batch_size` items. Every process gets the same number of them
    from each source; where items do not suffice, a repeated item with weight 0 fills the gap. Sources take turns, so
    that the first micro-batches of a step have their share of both. Items are sorted by length inside a step. With
    `batch_statistics=True` (BatchNorm) micro-batches never cross a reference-batch border either, so at steps of whole
    reference batches the statistics are those of kappa 1.

    With `halve_every = n` the steps n, 2n, ... (counted from 1) are halved in stream order, each source by itself, and
    items are dealt to processes in that order and sorted inside each half of each process only: its first
    micro-batches are then a sample of the step and not its short items. Such a step draws the same items, and only its
    micro-batches are others. Where sorting changes nothing no step is halved, nor with `batch_statistics`, nor where a
    half would leave a process without items of a source. Streams with bucketing are halved at borders of reference
    batches, for inside of these items lie in order of length, and on one process only.

    Args:
        stream: the items of the run in order.
        borders: clock positions at which steps end.
        micro_batch_size: items per micro-batch and process, a memory limit only.
        world_size: number of processes.
        batch_statistics: keep micro-batches inside reference batches.
        halve_every: optimizer steps between those that are halved; 0 for none.
        label_batch_size: unlabelled items per batch of the teacher and process, a memory limit only; the items of a
            step are sorted by length for it. `None` without such batches: the teacher labels micro-batches, but for
            items that enter the stream's label pool without being drawn, which are labelled in batches of
            `micro_batch_size`.
        by_rank: sources whose item i belongs to process i mod `world_size`, because each reads a part of its own.

    Raises:
        ValueError: for sizes below 1, or borders that leave out the stream's `pl_start`, a change of its ratio or its
            end.
    """

    def __init__(
        self,
        stream: ReferenceStream,
        borders: StepBorders,
        *,
        micro_batch_size: int,
        world_size: int = 1,
        batch_statistics: bool = False,
        halve_every: int = 0,
        label_batch_size: int | None = None,
        by_rank: Collection[int] = (),
    ) -> None:
        if micro_batch_size < 1:
            raise ValueError(f"micro_batch_size must be at least 1, got {micro_batch_size}")
        if label_batch_size is not None and label_batch_size < 1:
            raise ValueError(f"label_batch_size must be at least 1, got {label_batch_size}")
        if world_size < 1:
            raise ValueError(f"world_size must be at least 1, got {world_size}")
        changes = [("a change of the ratio", clock) for clock in stream.ratio_changes]
        for name, clock in (("pl_start", stream.pl_start), *changes, ("the end of the run", stream.reference_steps)):
            if clock is not None and np.abs(borders.borders - clock).min() > BORDER_TOLERANCE:
                raise ValueError(
                    f"no step ends at {name}, reference step {clock:g} of the stream (the steps reach "
                    f"{borders.position:g}): give plan and stream the same run length, pl_start and ratio_changes"
                )
        self.stream = stream
        self.micro_batch_size = micro_batch_size
        self.world_size = world_size
        self.batch_statistics = batch_statistics
        self.halve_every = halve_every
        self.label_batch_size = label_batch_size
        self.by_rank = frozenset(by_rank)
        positions = stream.position(borders.borders)
        # In seconds a small step may fall inside one long utterance and draw nothing: it is no step of the run.
        self._planned = np.flatnonzero(np.diff(positions) > 0)
        self._stage_kappa = borders.stage_kappa[self._planned]
        self._cut = borders.cut[self._planned]
        self.borders = borders
        self.positions: NDArray[np.int64] = np.concatenate([positions[:1], positions[self._planned + 1]])
        self._passes = stream.labelled_passes(self.positions)
        self._drawn_of: dict[int, NDArray[np.int64]] = {}

    @property
    def num_steps(self) -> int:
        """Optimizer steps of the run."""
        return len(self.positions) - 1

    def __len__(self) -> int:
        return self.num_steps * self.world_size

    def step(self, number: int) -> SampledStep:
        """What optimizer step `number` (from 0) covers.

        Raises:
            IndexError: past the run's last step.
        """
        if not 0 <= number < self.num_steps:
            raise IndexError(f"step {number} of a run of {self.num_steps} steps")
        first, last = int(self.positions[number]), int(self.positions[number + 1])
        start, end = float(self.stream.clock(first)), float(self.stream.clock(last))
        units = float(self.stream.cumulative_units[last] - self.stream.cumulative_units[first])
        # What a short step draws is far from its nominal kappa where items are long.
        stage_kappa = end - start if self._cut[number] else float(self._stage_kappa[number])
        return SampledStep(start, end, stage_kappa, units, last - first)

    def done(self, steps: int) -> StepBorders:
        """The borders of the first `steps` optimizer steps, which a resumed run keeps."""
        return self.borders.prefix(int(self._planned[steps - 1]) + 1 if steps else 0)

    def labelled_passes(self, number: int) -> float:
        """Passes over the labelled set before step `number`."""
        return float(self._passes[number])

    def micro_batches(self, number: int) -> list[NDArray[np.int64]]:
        """Stream positions of each micro-batch of a step, over all processes: process r takes r, r + world_size, ...

        The count is a multiple of `world_size`; an empty array is a place that padding fills.
        """
        if self.batch_statistics:
            return self._inside_reference_batches(number)
        halves = self._halves(number)
        if not halves:
            return self._in_turns([self._dealt(positions) for positions in self.sources(number)])
        return [group for half in halves for group in self._in_turns([self._fairly_dealt(part) for part in half])]

    def sources(self, number: int) -> list[NDArray[np.int64]]:
        """Stream positions of a step in order, for each source that it draws from."""
        first, last = int(self.positions[number]), int(self.positions[number + 1])
        return [positions for _, positions in self._by_source(first, last)]

    def drawn_of(self, kind: int, number: int) -> tuple[int, int]:
        """Items drawn of a source over all processes, before step `number` and after it."""
        if kind not in self._drawn_of:
            drawn = np.concatenate([[0], np.cumsum(self.stream.source == kind)])
            self._drawn_of[kind] = drawn[self.positions]
        before, after = self._drawn_of[kind][number : number + 2].tolist()
        return before, after

    def half(self, number: int) -> int | None:
        """Micro-batches of each process in the first half of a step that is halved; None where it is not."""
        halves = self._halves(number)
        return sum(map(self._rounds, halves[0])) if halves else None

    def _halves(self, number: int) -> list[list[NDArray[np.int64]]]:
        """Stream positions of both halves of a step, for each source; none where it need not or cannot be halved."""
        if self.batch_statistics or self.halve_every == 0 or (number + 1) % self.halve_every:
            return []
        sources = self.sources(number)
        if self.stream.bucketed:
            borders = self.reference_borders(number)
            # Reference batches are the samples of such a stream: what one process of several draws is none.
            if len(borders) == 0 or self.world_size > 1:
                return []
            middle = self.stream.clock(self.positions[number : number + 2]).mean()
            border = borders[np.argmin(np.abs(self.stream.clock(borders) - middle))]
            parts = [np.split(positions, [np.searchsorted(positions, border)]) for positions in sources]
        elif any(map(self.stream.lengths_differ, sources)):
            # By number and not by units: a half that ends where its units reach a target is no sample of lengths.
            parts = [np.split(positions, [(len(positions) + 1) // 2]) for positions in sources]
        else:
            return []
        if min(len(part) for both in parts for part in both) < self.world_size:
            return []
        return [[both[half] for both in parts] for half in (0, 1)]

    def _rounds(self, positions: NDArray[np.int64]) -> int:
        """Micro-batches of each process that positions of one source take."""
        return -(-len(positions) // (self.world_size * self.micro_batch_size))

    def _dealt(self, positions: NDArray[np.int64]) -> list[NDArray[np.int64]]:
        """Micro-batches of one source, sorted by length over all processes that may have the items."""
        if self._bound(positions):
            return self._fairly_dealt(positions)
        return np.array_split(self.stream.sort_by_length(positions), self._rounds(positions) * self.world_size)

    def _fairly_dealt(self, positions: NDArray[np.int64]) -> list[NDArray[np.int64]]:
        """The same, sorted on each process: items are dealt in stream order, so that each has a sample of them."""
        mine = [self.stream.sort_by_length(items) for items in self._shares(positions)]
        split = [np.array_split(items, self._rounds(positions)) for items in mine]
        return [group for dealt in zip(*split, strict=True) for group in dealt]

    def _bound(self, positions: NDArray[np.int64]) -> bool:
        """Whether items at these positions of one source belong to processes."""
        return bool(len(positions)) and int(self.stream.source[positions[0]]) in self.by_rank

    def _shares(self, positions: NDArray[np.int64]) -> list[NDArray[np.int64]]:
        """The positions of one source that each process takes."""
        if not self._bound(positions):
            return [positions[rank :: self.world_size] for rank in range(self.world_size)]
        owners = self.stream.index[positions] % self.world_size
        return [positions[owners == rank] for rank in range(self.world_size)]

    def _in_turns(self, sources: list[list[NDArray[np.int64]]]) -> list[NDArray[np.int64]]:
        """Micro-batches of all sources, in rounds of one for each process."""
        rounds: list[tuple[float, list[NDArray[np.int64]]]] = []
        for pieces in sources:
            items, done = sum(map(len, pieces)), 0
            for i in range(0, len(pieces), self.world_size):
                dealt = pieces[i : i + self.world_size]
                rounds.append((done / items, dealt))
                done += sum(map(len, dealt))
        rounds.sort(key=lambda item: item[0])
        return [piece for _, pieces in rounds for piece in pieces]

    def reference_borders(self, number: int) -> NDArray[np.int64]:
        """Stream positions of the reference-batch borders inside a step."""
        first, last = int(self.positions[number]), int(self.positions[number + 1])
        step = self.step(number)
        inner = self.stream.position(np.arange(np.floor(step.start) + 1, np.ceil(step.end)))
        return np.unique(inner[(inner > first) & (inner < last)])

    def _inside_reference_batches(self, number: int) -> list[NDArray[np.int64]]:
        first, last = int(self.positions[number]), int(self.positions[number + 1])
        borders = [first, *self.reference_borders(number).tolist(), last]
        dealt: dict[int, list[tuple[int, NDArray[np.int64]]]] = {LABELLED: [], UNLABELLED: []}
        for low, high in pairwise(borders):
            for kind, positions in self._by_source(low, high):
                if self._bound(positions):
                    pieces = self._fairly_dealt(positions)
                else:
                    positions = self.stream.sort_by_length(positions)
                    pieces = np.array_split(positions, -(-len(positions) // self.micro_batch_size))
                dealt[kind].extend((low, piece) for piece in pieces)
        # A round is one micro-batch of one source for each process; rounds follow their first reference batch.
        rounds: list[list[tuple[int, NDArray[np.int64]]]] = []
        for pieces_of_kind in dealt.values():
            pieces_of_kind.extend([(last, np.empty(0, dtype=np.int64))] * (-len(pieces_of_kind) % self.world_size))
            rounds.extend(
                pieces_of_kind[i : i + self.world_size] for i in range(0, len(pieces_of_kind), self.world_size)
            )
        rounds.sort(key=lambda pieces: pieces[0][0])
        return [piece for pieces in rounds for _, piece in pieces]

    def _by_source(self, first: int, last: int) -> Iterator[tuple[int, NDArray[np.int64]]]:
        kinds = self.stream.source[first:last]
        for kind in (LABELLED, UNLABELLED):
            positions = first + np.flatnonzero(kinds == kind)
            if len(positions):
                yield kind, positions

    def draws(self, number: int, rank: int) -> list[Draw]:
        """The items of step `number` on process `rank`; last those that are labelled only."""
        return self._draws(number, self.micro_batches(number), rank)

    def _draws(self, number: int, groups: list[NDArray[np.int64]], rank: int) -> list[Draw]:
        drawn: list[Draw] = []
        label_batches, labelled_only = self._label_batches(number, groups, rank)
        for micro_batch, slot in enumerate(range(rank, len(groups), self.world_size)):
            weight = 1.0 if len(groups[slot]) else 0.0
            # Padding repeats an item of the first process that has one of the same source in the round.
            positions = groups[slot] if weight else self._round_of(groups, slot - rank)[:1]
            rows = (self.stream.source[positions], self.stream.index[positions], positions)
            drawn.extend(
                Draw(source, index, position, micro_batch, weight, label_batches.get(position) if weight else None)
                for source, index, position in zip(*(row.tolist() for row in rows), strict=True)
            )
        return drawn + labelled_only

    def _round_of(self, groups: list[NDArray[np.int64]], first: int) -> NDArray[np.int64]:
        """Positions of the round of micro-batches that begins with `groups[first]`."""
        return np.concatenate(groups[first : first + self.world_size])

    def labels_micro_batches(self, number: int) -> bool:
        """Whether the teacher labels the unlabelled micro-batches of a step, and not batches of its own."""
        pool = self.stream.pool
        return self.label_batch_size is None and (pool is None or self.positions[number + 1] <= pool.full_at)

    def _label_batches(
        self, number: int, groups: list[NDArray[np.int64]], rank: int
    ) -> tuple[dict[int, int], list[Draw]]:
        """The teacher's batch of each position that is labelled and drawn on a process, and what is labelled only.

        An item is labelled where it is drawn; those that are not drawn in the step are dealt in order of length.
        """
        if self.labels_micro_batches(number):
            return {}, []
        positions = np.sort(np.concatenate([np.empty(0, dtype=np.int64), *groups[rank :: self.world_size]]))
        positions = positions[self.stream.source[positions] == UNLABELLED]
        rows, drawn = self.stream.index[positions], len(positions)
        if self.stream.pool is not None:
            positions = positions[positions < self.stream.pool.full_at]
            events = self.stream.pool.events(int(self.positions[number]), int(self.positions[number + 1]))
            entering, others = events.positions[~events.drawn], events.rows[~events.drawn]
            mine = self._by_length(others)[rank :: self.world_size]
            rows, drawn = np.concatenate([self.stream.index[positions], others[mine]]), len(positions)
            positions = np.concatenate([positions, entering[mine]])
        batches: dict[int, int] = {}
        labelled_only: list[Draw] = []
        size = self.label_batch_size or self.micro_batch_size
        pieces = np.array_split(self._by_length(rows), -(-len(rows) // size)) if len(rows) else []
        for batch, piece in enumerate(pieces):
            batches.update((int(positions[i]), batch) for i in piece if i < drawn)
            labelled_only.extend(
                Draw(UNLABELLED, int(rows[i]), int(positions[i]), LABELLED_ONLY, 0.0, batch)
                for i in piece
                if i >= drawn
            )
        return batches, labelled_only

    def _by_length(self, rows: NDArray[np.int32]) -> NDArray[np.intp]:
        """The order of length of rows of the unlabelled set; their own order where lengths are unknown or equal."""
        lengths = self.stream.lengths_of(rows)
        return np.arange(len(rows)) if lengths is None else np.argsort(lengths, kind="stable")

    def __iter__(self) -> Iterator[list[Draw]]:
        for number in range(self.num_steps):
            groups = self.micro_batches(number)
            for rank in range(self.world_size):
                yield self._draws(number, groups, rank)
