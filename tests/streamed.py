"""Streams for tests: some of `datasets`, some of torch, and rows that say who they are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import datasets
import numpy as np
from torch.utils.data import IterableDataset

Row = dict[str, Any]


def rows(count: int, kind: str = "a") -> list[Row]:
    return [{"name": f"{kind}{i}", "size": (7 * i) % 5 + 1, "labels": i} for i in range(count)]


class Plain(IterableDataset[Row]):
    """A stream of torch without state; counts what it has given and how often it was begun."""

    def __init__(self, items: Sequence[Any]) -> None:
        self.items = items
        self.given = 0
        self.begun = 0

    def __iter__(self) -> Iterator[Row]:
        self.begun += 1
        for item in self.items:
            self.given += 1
            if isinstance(item, Exception):
                raise item
            yield item


class Permuted(IterableDataset[Row]):
    """The rows of a map-style data set in the order in which the trainers draw them from it."""

    def __init__(self, dataset: Any, seed: int, kind: int) -> None:
        self.dataset, self.seed, self.kind, self.epoch = dataset, seed, kind, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[Row]:
        order = np.random.default_rng([self.seed, self.kind, self.epoch]).permutation(len(self.dataset))
        for number in order.tolist():
            yield self.dataset[number]


def stream(items: list[Row], shards: int = 1) -> datasets.IterableDataset:
    """Of `datasets`, with state; shard i has the i-th run of rows."""
    return datasets.Dataset.from_list(items).to_iterable_dataset(num_shards=shards)


def of_shards(shards: list[list[Row]]) -> datasets.IterableDataset:
    """Of `datasets`, with shards of any lengths."""

    def generate(parts: list[list[Row]]) -> Iterator[Row]:
        for part in parts:
            yield from part

    return datasets.IterableDataset.from_generator(generate, gen_kwargs={"parts": shards})
