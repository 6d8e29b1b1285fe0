"""The steps of a run over streams: one item of the loader is what one process draws in one optimizer step."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from torch.utils.data import IterableDataset

from hf_ema_scaling.data.collator import Collate, MicroBatchCollator, TwoSourceDataset
from hf_ema_scaling.data.sampler import Draw, ScheduledBatchSampler
from hf_ema_scaling.data.streaming import Example, MakeReaders, StreamReader

Drawn = tuple[Draw, Example]


class StepStream(IterableDataset[tuple[list[Drawn], str | None]]):
    """Yields for each optimizer step the rows that one process draws, and where its streams stand after them.

    The sampler says which items a step takes, by running number; the i-th item of a source is the i-th row of its
    stream. Where processes read shards of their own, item i is the next row of process i mod world size. Rows that
    others draw are read and dropped. No more is read than the step at hand, and one row.

    The places (JSON) are those of the step they come with, however far ahead a loader reads: steps done, processes,
    sources by shards, and for each streamed source its `Place` and the items drawn over all processes.

    Args:
        sampler: of the run.
        rows: data of the run; says which columns are seen, and holds the sources that are not streamed.
        open_readers: makes readers that stand where `first_step` begins, by source.
        rank: of this process.
        first_step: steps before it are empty: a resumed run skips them.
        length_columns: rows are sorted inside a step by the first of these that they have.
    """

    def __init__(
        self,
        sampler: ScheduledBatchSampler,
        rows: TwoSourceDataset,
        open_readers: MakeReaders,
        *,
        rank: int = 0,
        first_step: int = 0,
        length_columns: Sequence[str] = (),
    ) -> None:
        self.sampler = sampler
        self.rows = rows
        self.rank = rank
        self.first_step = first_step
        self.length_columns = tuple(length_columns)
        self._open_readers = open_readers

    def __len__(self) -> int:
        return self.sampler.num_steps

    def __iter__(self) -> Iterator[tuple[list[Drawn], str | None]]:
        readers = self._open_readers()
        for number in range(len(self)):
            if number < self.first_step:
                yield [], None
                continue
            drawn = self._drawn(number, readers)
            yield drawn, json.dumps(self._places(number, readers))

    def _drawn(self, number: int, readers: dict[int, StreamReader]) -> list[Drawn]:
        draws = self.sampler.draws(number, self.rank)
        found: dict[int, Iterator[Drawn]] = {}
        for kind in {draw.source for draw in draws} | readers.keys():
            mine = [draw for draw in draws if draw.source == kind]
            if kind in readers:
                found[kind] = iter(self._streamed(number, kind, readers[kind], mine))
            else:
                found[kind] = iter(self.rows.__getitems__(mine))
        return [next(found[draw.source]) for draw in draws]

    def _streamed(self, number: int, kind: int, reader: StreamReader, draws: list[Draw]) -> list[Drawn]:
        """The draws of one source with their rows, and the number of each row in its pass as `index`."""
        wanted = {draw.index for draw in draws}
        read: dict[int, tuple[int, Example]] = {}
        own, processes = kind in self.sampler.by_rank, self.sampler.world_size
        for item in range(*self.sampler.drawn_of(kind, number)):
            if own and item % processes != self.rank:
                continue
            taken = reader.read()
            if item in wanted:
                read[item] = taken
        result = []
        for draw in self._by_length(number, draws, read):
            # Padding repeats a row; a process that has none of its own takes the one that it will read next.
            index, row = read[draw.index] if draw.index in read else next(iter(read.values()), None) or reader.peek()
            result.append((draw._replace(index=index), self.rows.visible(kind, row)))
        return result

    def _by_length(self, number: int, draws: list[Draw], read: dict[int, tuple[int, Example]]) -> list[Draw]:
        """The draws with items dealt to micro-batches, and to the teacher's batches, in order of length."""
        halved = self.sampler.halve_every and (number + 1) % self.sampler.halve_every == 0
        if self.sampler.batch_statistics or halved:
            return draws
        places = [place for place, draw in enumerate(draws) if draw.weight]
        lengths = [self._length(read[draws[place].index][1]) for place in places]
        if any(length is None for length in lengths):
            return draws
        order = np.argsort(np.array(lengths, dtype=np.float64), kind="stable").tolist()
        label_batches = [draws[place].label_batch for place in places]
        numbers = sorted(batch for batch in label_batches if batch is not None)
        result = list(draws)
        for slot, (place, other) in enumerate(zip(places, order, strict=True)):
            item = draws[places[other]]
            batch = numbers[slot] if len(numbers) == len(places) else draws[place].label_batch
            result[place] = draws[place]._replace(index=item.index, position=item.position, label_batch=batch)
        return result

    def _length(self, row: Example) -> float | None:
        return next((float(row[name]) for name in self.length_columns if name in row), None)

    def _places(self, number: int, readers: dict[int, StreamReader]) -> dict[str, Any]:
        last = number + 1 == len(self)
        sources = {
            str(kind): {**reader.place(verify=not last), "drawn": self.sampler.drawn_of(kind, number)[1]}
            for kind, reader in readers.items()
        }
        by_rank = sorted(self.sampler.by_rank)
        return {"steps": number + 1, "processes": self.sampler.world_size, "by_rank": by_rank, "sources": sources}


class StepCollator:
    """Collates what `StepStream` yields: the micro-batches (`MicroBatchCollator`), and as `stream` the places."""

    def __init__(self, collate: Collate) -> None:
        self.collate = MicroBatchCollator(collate)

    def __call__(self, step: tuple[list[Drawn], str | None]) -> dict[str, Any]:
        """The batch of one step."""
        rows, places = step
        return {**self.collate(rows), "stream": places}
