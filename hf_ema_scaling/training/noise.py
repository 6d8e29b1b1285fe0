"""Measures the gradient noise scale in training: `.grad` after the first part of a step against the whole step's.

The parts are sets of whole micro-batches that follow one another in the stream, each with its share of labelled and
unlabelled items, so that the first is a smaller step of the same kind. It costs two norms per measurement, no memory.

Steps whose items are sorted by length are measured, too: there the sampler sorts inside each half of each process
only, so that a first half is no more of the short items than a second. Such a step has the same samples in other
micro-batches, with a little more padding: its gradient is the same to rounding, and dropout draws other masks. All
other steps keep every bit, as do all runs whose items have no lengths: the same micro-batches run in the same order
whether or not a step is measured.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray
from torch import nn
from transformers.utils import logging

from hf_ema_scaling.data.sampler import ScheduledBatchSampler
from hf_ema_scaling.data.stream import LABELLED, UNLABELLED
from hf_ema_scaling.ema.sharding import gathered, is_sharded
from hf_ema_scaling.scaling import NoiseScale

logger = logging.get_logger(__name__)

# Measurements before the estimate is compared with a stage's kappa: |G|^2 of a single one is mostly chance.
ENOUGH = 20
# Of shares of a step's items.
ROUNDING = 1e-9

TOO_FEW = "a source has fewer than two micro-batches per process: lower per_device_train_batch_size"
UNEVEN = (
    "no border between its micro-batches leaves labelled and unlabelled items in proportion on both sides, on every "
    "process: lower per_device_train_batch_size"
)
BY_LENGTH = (
    "its items are sorted by length inside each reference batch, as BatchNorm needs the same micro-batches at every "
    "kappa, so that neither the first ones nor those of one process of several are a sample: measure on one process "
    "at steps of two reference batches or more, or without a duration or length column"
)
FEW_ITEMS = (
    "its items are sorted by length, and a source has too few of them for two on every process, one for each half: "
    "measure at larger batches or on fewer processes"
)
BUCKETED = (
    "items of like length share a reference batch (bucket_window), so that only whole reference batches are samples: "
    "measure on one process at steps of two of them or more, with items of every source in each, or set "
    "bucket_window=0"
)


@dataclass(frozen=True)
class Halves:
    """Where a step is divided.

    Sizes are counted in items, and an item stands for as many units as one of the run does on average: a measurement
    at the units of its own items would be at a random batch, which is biased upwards.

    Args:
        border: micro-batches of each process in the first part.
        items: items of each process in its first part.
        step_items: items of the whole step.
        item_units: units of an item of the run, on average.
        mean: from the step's `.grad`, the sum over its items over `n_ref * units / B`, to the mean over its items; 1
            in samples.
    """

    border: int
    items: tuple[int, ...]
    step_items: int
    item_units: float
    mean: float

    def together(self) -> Halves:
        """The same border for gradients that are reduced over the processes there: one part, of all processes."""
        return Halves(self.border, (sum(self.items),), self.step_items, self.item_units, self.mean)

    @property
    def small_batch(self) -> float:
        """Units of the first part: what the mean of the processes' squared norms is a measurement at."""
        return self.item_units * len(self.items) / sum(1.0 / items for items in self.items)

    @property
    def step_batch(self) -> float:
        """Units of the whole step."""
        return self.item_units * self.step_items

    def rescaling(self, rank: int) -> float:
        """From a process's `.grad` in the first part to the mean over its items there.

        `.grad` carries the factor `processes / (n_ref * units / B)`, units of the whole step.
        """
        return self.mean * self.step_items / (len(self.items) * self.items[rank])


def halve(sampler: ScheduledBatchSampler, number: int) -> Halves | str:
    """Where step `number` can be divided, as near to its middle as possible, or why it cannot.

    At a valid border no item of the first part comes after one of its source in the second, by construction and not by
    chance, and on each process the first part has its share of both sources, to half an item. Where items are sorted
    by length or bucketed these are the sampler's own halves; with batch statistics, reference batches. Parts need not
    be equal: the estimator knows their sizes.
    """
    stream, world = sampler.stream, sampler.world_size
    groups = sampler.micro_batches(number)
    rounds = len(groups) // world
    sums = stream.cumulative_units
    units = np.array([(sums[group + 1] - sums[group]).sum() for group in groups]).reshape(rounds, world)
    before = units.cumsum(0)[:-1]  # (borders, processes)
    total = float(units.sum())
    sizes = np.array([len(group) for group in groups]).reshape(rounds, world)
    step_items = int(sizes.sum())

    def at(border: int) -> Halves:
        first = tuple(sizes[:border].sum(0).tolist())
        examples = stream.examples_per_reference_batch * total / stream.reference_batch_size
        return Halves(border, first, step_items, float(sums[-1]) / len(stream), examples / step_items)

    by_length = stream.bucketed or any(map(stream.lengths_differ, sampler.sources(number)))
    in_order = np.ones(len(before), dtype=bool)
    if by_length and not sampler.batch_statistics:
        half = sampler.half(number)
        if half is None:
            return BUCKETED if stream.bucketed else FEW_ITEMS
        return at(half)
    if by_length:
        in_order = _between_reference_batches(sampler, number, groups)
    shared = (before > 0).all(1)
    lowest, highest = np.full_like(before, -np.inf), np.full_like(before, np.inf)
    for kind in (LABELLED, UNLABELLED):
        chosen = [group if len(group) and stream.source[group[0]] == kind else group[:0] for group in groups]
        counts = np.array([len(group) for group in chosen]).reshape(rounds, world)
        items = counts.sum()
        if items == 0:
            continue
        if counts.any(1).sum() < 2:
            return TOO_FEW
        first = counts.cumsum(0)[:-1]
        shared &= (first > 0).all(1) & (first.sum(1) < items)
        lowest = np.maximum(lowest, (first - 0.5) / items)
        highest = np.minimum(highest, (first + 0.5) / items)
    shared &= (lowest <= highest + ROUNDING).all(1)
    valid = np.flatnonzero(shared & in_order)
    if len(valid) == 0:
        return UNEVEN if in_order.any() else BUCKETED if stream.bucketed else BY_LENGTH
    return at(int(valid[np.argmin(np.abs(before[valid].sum(1) - total / 2))]) + 1)


def _between_reference_batches(
    sampler: ScheduledBatchSampler, number: int, groups: list[NDArray[np.int64]]
) -> NDArray[np.bool_]:
    """Whether a border between rounds of micro-batches is one between reference batches, to which sorting keeps.

    None is with several processes, whose own micro-batches are not samples of the reference batch.
    """
    world, end = sampler.world_size, len(sampler.stream)
    if world > 1:
        return np.zeros(len(groups) // world - 1, dtype=bool)
    latest = np.array([group.max(initial=-1) for group in groups]).reshape(-1, world).max(1)
    earliest = np.array([group.min(initial=end) for group in groups]).reshape(-1, world).min(1)
    latest = np.maximum.accumulate(latest)[:-1]
    earliest = np.minimum.accumulate(earliest[::-1])[::-1][1:]
    return (latest < earliest) & np.isin(earliest, sampler.reference_borders(number))


def gradient_square(model: nn.Module) -> float:
    """Squared norm of all gradients, without a copy of them."""
    grads = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    return float(gathered(torch.nn.utils.get_total_norm(grads))) ** 2


class NoiseMeter:
    """Measures every so many optimizer steps, and says when a stage's batch exceeds the largest useful one.

    A step that cannot be divided (`halve`) is not measured; each reason is said once. With several processes the
    smaller batches are the processes' own: between micro-batches `.grad` holds what a process has seen alone, and the
    mean over processes of the squared norms is a measurement at the harmonic mean of their units. (It is not the
    squared norm of the averaged half, which would take an all-reduce of all gradients.)

    FSDP2 keeps no gradients of one process alone that could be measured: there the pass at the border reduces them as
    the last one does, and what is measured is the first part of all processes together. Such a step is the same to
    rounding, and has one reduction more.

    Dropout and augmentation are part of the noise, as they are part of the step; that batches in seconds or tokens
    hold a varying number of items is not. Measured before clipping. Gradients that are not finite are not counted.
    Passes over the data draw without replacement: where a step is a large part of a pass, what is measured is the
    noise that the run sees, not that of independent draws. Where few directions carry the gradient (tens, not
    thousands) twenty measurements are still mostly chance, and the warning may come early.

    Args:
        every: optimizer steps between measurements; 0 for none.
        reference_batch_size: B in units.
        accelerator: for the processes and the gradient scaler.
    """

    def __init__(self, every: int, reference_batch_size: float, accelerator: Accelerator) -> None:
        self.every = every
        self.reference_batch_size = reference_batch_size
        self.accelerator = accelerator
        self.scale = NoiseScale()
        self.last: tuple[float, float] | None = None
        """Squared norms of the last measurement: of the first part, rescaled, and of the whole step."""
        self._said: set[str] = set()
        self._halves: Halves | None = None
        self._sharded = False
        self._small = 0.0
        self._stage_kappa = 0.0
        self._warned: set[float] = set()
        self._measures = True

    def needs_sync(self, number: int) -> bool:
        """Whether gradients must be reduced in the backward pass of micro-batch `number`, counted from 1."""
        return self._sharded and self._halves is not None and number == self._halves.border

    def begin(self, sampler: ScheduledBatchSampler, number: int, model: nn.Module) -> None:
        """Before the micro-batches of optimizer step `number`, counted from 0."""
        self._halves = None
        if self.every == 0:
            return
        stage_kappa = sampler.step(number).stage_kappa
        if stage_kappa != self._stage_kappa:
            self._stage_kappa = stage_kappa
            self._compare()
        if (number + 1) % self.every:
            return
        halves = halve(sampler, number)
        self._measures = isinstance(halves, Halves)
        if isinstance(halves, Halves):
            self._sharded = is_sharded(model)
            self._halves = halves.together() if self._sharded else halves
        elif halves not in self._said and self.accelerator.is_main_process:
            self._said.add(halves)
            logger.warning(
                f"The gradient noise scale is not measured at optimizer step {number} nor others like it, because "
                f"{halves}."
            )

    def after_micro_batch(self, model: nn.Module, done: int, last: bool) -> None:
        """After the backward pass of micro-batch number `done`, counted from 1; `last` of the step or not."""
        if self._halves is None or not (last or done == self._halves.border):
            return
        square = gradient_square(model) / self._loss_scale() ** 2
        if not last:
            self._small = square * self._halves.rescaling(0 if self._sharded else self.accelerator.process_index) ** 2
            return
        if self.accelerator.num_processes > 1 and not self._sharded:
            mine = torch.tensor(self._small, device=self.accelerator.device)
            self._small = float(self.accelerator.reduce(mine, reduction="mean"))
        sizes = {"small_batch": self._halves.small_batch, "big_batch": self._halves.step_batch}
        self.last = self._small, square * self._halves.mean**2
        if self.scale.add(*self.last, **sizes):
            self._compare()

    def _loss_scale(self) -> float:
        scaler: Any = getattr(self.accelerator, "scaler", None)
        return 1.0 if scaler is None else float(scaler.get_scale())

    def _compare(self) -> None:
        largest = self.scale.largest_useful_kappa(self.reference_batch_size)
        if largest is None or self.scale.count < ENOUGH or self._stage_kappa <= largest:
            return
        if self._stage_kappa in self._warned:
            return
        self._warned.add(self._stage_kappa)
        if self.accelerator.is_main_process:
            logger.warning(
                f"kappa={self._stage_kappa:g} of this stage exceeds the largest useful one, {largest:.3g}: the "
                f"gradient noise scale is {self.scale.value:.4g} units ({self.scale.count} measurements). Beyond it a "
                "larger batch saves few steps, and scaling rules are derived for batches well below it: lower the "
                "batch of this stage, or begin it later"
            )

    def logs(self) -> dict[str, float]:
        """`noise/scale` in units and `noise/largest_kappa`; nothing without an estimate, or of steps not halved."""
        if not self._measures:
            return {}
        value, largest = self.scale.value, self.scale.largest_useful_kappa(self.reference_batch_size)
        return {} if value is None or largest is None else {"noise/scale": value, "noise/largest_kappa": largest}

    def state_dict(self) -> dict[str, Any]:
        """For the counters in a checkpoint; the same on every process."""
        own = {"stage_kappa": self._stage_kappa, "warned": sorted(self._warned), "measures": self._measures}
        return {**self.scale.state_dict(), **own}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore `state_dict()`; an empty mapping starts anew."""
        self.scale.load_state_dict(state)
        self._stage_kappa = float(state.get("stage_kappa", 0.0))
        self._warned = set(state.get("warned", ()))
        self._measures = bool(state.get("measures", True))
        self._said.clear()
