"""Labels from the cache: which of a step's labels are made in it, which were made before, and how old they are."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator

from hf_ema_scaling.data.collator import MicroBatch
from hf_ema_scaling.data.label_pool import LabelPool
from hf_ema_scaling.data.sampler import ScheduledBatchSampler
from hf_ema_scaling.labels.base import PseudoLabel
from hf_ema_scaling.labels.cache import LabelCache, pack_labels, unpack_labels

FIELDS = ("drawn", "labelled", "age")


class CachedLabels:
    """The label cache of a run, the same on every process: each labels its share and receives that of the others.

    Args:
        sampler: of the run, over a stream with a pool.
        accelerator: of the run.
        checkpoint: folder to continue from, with the optimizer steps done there; None for a new run.

    Raises:
        LabelCacheError: for a checkpoint without the labels that the pool holds at that point.
    """

    def __init__(
        self, sampler: ScheduledBatchSampler, accelerator: Accelerator, checkpoint: tuple[Path, int] | None = None
    ) -> None:
        pool = sampler.stream.pool
        assert pool is not None
        self.pool: LabelPool = pool
        self.sampler = sampler
        self.accelerator = accelerator
        self.cache = LabelCache(pool.size)
        self.counts = dict.fromkeys(FIELDS, 0.0)
        if checkpoint is not None:
            folder, steps = checkpoint
            held = pool.held(int(sampler.positions[steps]))
            if (held >= 0).any():
                self.cache = LabelCache.load(folder, held)

    def labels(
        self, number: int, found: Mapping[int, PseudoLabel], micro_batches: Iterable[MicroBatch]
    ) -> dict[int, PseudoLabel]:
        """The label of every unlabelled row that this process draws in a step; the cache takes in the new ones.

        Args:
            number: optimizer step.
            found: labels that this process made in the step, by stream position (`LabelPool.events`).
            micro_batches: of this process, unlabelled and not padding.

        Raises:
            RuntimeError: when a label of the step was not made.
        """
        first, last = int(self.sampler.positions[number]), int(self.sampler.positions[number + 1])
        clock = float(self.sampler.stream.clock(first))
        events = self.pool.events(first, last)
        # What is labelled is known on every process, so either all of them exchange labels or none does.
        made = dict(found)
        if len(events.positions):
            made = exchanged(found, self.accelerator)
        missing = [position for position in events.positions.tolist() if position not in made]
        if missing:
            raise RuntimeError(f"no process labelled the items at stream positions {missing[:5]} in step {number}")
        labels: dict[int, PseudoLabel] = {}
        for batch in micro_batches:
            positions = np.array(batch["positions"], dtype=np.int64)
            sources = self.pool.made_at(first, positions).tolist()
            slots = self.pool.slot[positions].tolist()
            for position, source, slot, row in zip(batch["positions"], sources, slots, batch["indices"], strict=True):
                labels[position] = made[source] if source >= 0 else self.cache.get(slot, row)
        self._count(first, last, clock, len(events.positions))
        slots = self.pool.slot[events.positions].tolist()
        for position, slot, row in zip(events.positions.tolist(), slots, events.rows.tolist(), strict=True):
            self.cache.put(slot, row, made[position], clock)
        return labels

    def _count(self, first: int, last: int, clock: float, labelled: int) -> None:
        """Count a step, over all processes: every one knows all that is drawn."""
        drawn = first + np.flatnonzero(self.pool.slot[first:last] >= 0)
        before = drawn[self.pool.made_at(first, drawn) < 0]
        ages = clock - self.cache.clock[self.pool.slot[before]]
        self.counts["drawn"] += len(drawn)
        self.counts["labelled"] += labelled
        self.counts["age"] += float(ages.sum())

    def logs(self) -> dict[str, float]:
        """`cache/size` (labels held), and since the last call `cache/age` (mean, in reference steps, of the labels
        used) and `cache/relabelled` (labels made per item drawn); nothing where no item was drawn.
        """
        counts, self.counts = self.counts, dict.fromkeys(FIELDS, 0.0)
        if counts["drawn"] == 0:
            return {}
        return {
            "cache/size": float(len(self.cache)),
            "cache/age": counts["age"] / counts["drawn"],
            "cache/relabelled": counts["labelled"] / counts["drawn"],
        }

    def state_dict(self) -> dict[str, float]:
        """The counters, equal on all processes."""
        return dict(self.counts)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the counters."""
        self.counts = {name: float(state.get(name, 0.0)) for name in FIELDS}


def exchanged(found: Mapping[int, PseudoLabel], accelerator: Accelerator) -> dict[int, PseudoLabel]:
    """The labels that all processes made; every process must call it.

    Two collectives: the shapes, then the labels as one int64 tensor, padded to the largest.
    """
    if accelerator.num_processes == 1:
        return dict(found)
    mine = pack_labels(found)
    shapes = accelerator.gather(torch.tensor([mine.shape], device=accelerator.device)).tolist()
    padded = torch.zeros(max(rows for rows, _ in shapes), max(width for _, width in shapes), dtype=torch.int64)
    padded[: mine.shape[0], : mine.shape[1]] = mine
    everything = accelerator.gather(padded.to(accelerator.device)).cpu().split(len(padded))
    return unpack_labels(torch.cat([part[:rows] for part, (rows, _) in zip(everything, shapes, strict=True)]))
