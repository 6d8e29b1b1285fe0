"""What `test_streaming.py` runs on two gloo processes; each process writes what it saw to `<folder>/<rank>.pt`."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import datasets
import tiny
import torch
from two_processes import dropped, seen

LABELLED, UNLABELLED = tiny.speech(11), tiny.speech(13, 1, labels=False)
STOPS = (2, 4, 6)
MOVED = 3
"""Optimizer step of the checkpoints that one process writes before two start."""


def of_shards(data: datasets.Dataset, *sizes: int) -> datasets.IterableDataset:
    """A stream with shards of these sizes."""

    edges = [sum(sizes[:i]) for i in range(len(sizes) + 1)]
    shards = [list(range(low, high)) for low, high in pairwise(edges)]

    def parts(shards: list[list[int]]) -> Iterator[dict[str, Any]]:
        for number in (number for shard in shards for number in shard):
            yield {name: value.tolist() for name, value in data[number].items() if name != "duration"}

    return datasets.IterableDataset.from_generator(parts, gen_kwargs={"shards": shards})


def run(folder: Path, split: str, *, kappa: float = 2.0, init: int = 0, dropout: float = 0.0, **changes: Any) -> Any:
    """By rows: no number of shards that two processes could share; by shards: shares of 7 to 4 and of 6 to 7."""
    labelled, unlabelled = {
        "rows": (of_shards(LABELLED, 11), of_shards(UNLABELLED, 4, 4, 5)),
        "shards": (of_shards(LABELLED, 7, 4), of_shards(UNLABELLED, 3, 3, 3, 4)),
    }[split]
    values = {"max_steps": 12, "reference_batch_size": 5, "per_device_train_batch_size": 2, "adam_epsilon": 1e-3}
    return tiny.trainer(
        tiny.wav2vec2(dropout=dropout, seed=init),
        tiny.arguments(
            folder,
            **(values | {"save_strategy": "steps", "save_steps": 1, "kappa": kappa} | changes),
            logging_strategy="steps",
            logging_steps=2,
        ),
        labelled,
        unlabeled_dataset=unlabelled,
        pseudo_label_args=tiny.pseudo(pl_start=2.0, unlabeled_ratio=1.5, unlabeled_weight=0.7),
        labeler=tiny.ContentLabeler(dropped),
    )


def batch_norm(folder: Path) -> Any:
    args = tiny.arguments(folder, max_steps=4, reference_batch_size=3, per_device_train_batch_size=1, kappa=2.0)
    return tiny.trainer(
        tiny.parakeet(),
        args,
        of_shards(tiny.speech(9, features=8), 6, 3),
        unlabeled_dataset=of_shards(tiny.speech(8, 1, features=8, labels=False), 4, 4),
        pseudo_label_args=tiny.pseudo(pl_start=2.0, unlabeled_ratio=0.5),
        labeler=tiny.ContentLabeler(dropped),
    )


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    results: dict[str, Any] = {}

    def train(name: str, made: Any, **more: Any) -> None:
        made.train(**more)
        results[name] = seen(made)

    train("rows", run(folder / "rows", "rows"))
    for kappa in (1, 2):
        train(f"shards-{kappa}", run(folder / f"shards-{kappa}", "shards", kappa=kappa))
    for split in ("rows", "shards"):
        train(f"whole-{split}", run(folder / f"whole-{split}", split, dropout=0.1))
        for stop in STOPS:
            torch.manual_seed(99 + rank)
            made = run(folder / f"resumed-{split}", split, dropout=0.1, init=5)
            checkpoint = str(folder / f"whole-{split}" / f"checkpoint-{stop}")
            train(f"resumed-{split}-{stop}", made, resume_from_checkpoint=checkpoint)
    train("moved", run(folder / "moved", "rows"), resume_from_checkpoint=str(folder / f"one/checkpoint-{MOVED}"))
    try:
        run(folder / "bound", "shards").train(resume_from_checkpoint=str(folder / f"bound/checkpoint-{MOVED}"))
    except ValueError as error:
        results["refused"] = str(error)
    unlike = run(folder / "unlike", "shards")
    unlike.train_dataset = LABELLED.to_iterable_dataset(num_shards=4).shuffle(seed=7 + rank, buffer_size=4)
    try:
        unlike.train()
    except ValueError as error:
        results["unlike"] = str(error)
    train("batch_norm", batch_norm(folder / "batch_norm"))
    torch.save(results, folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
