"""What is counted of pseudo-labels between two logs and between two looks of the collapse guard."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor

from hf_ema_scaling.labels.base import PseudoLabel
from hf_ema_scaling.training.classes_by_step import ClassesByStep
from hf_ema_scaling.training.label_counts import LabelCounts

REASONS = ("empty", "too_long", "confidence")
"""Reasons that are always told of, also where none occurred."""

Gather = Callable[[Any], list[Any]]
"""Collects JSON values of all processes, on all of them."""


class LabelStatistics:
    """Counts of pseudo-labels, the same on resume because they are part of a checkpoint.

    Args:
        reasons: reasons to be told of from the first log on.
        drain: gives counts that are kept elsewhere (on the device of the model), whenever counts are read.
        numbers: whether labels are the numbers of a regression.
        classes: whether a label is one class.

    Attributes:
        since_log: counts since the last log.
        window: counts since the last look of the collapse guard.
        by_step: classes of the labels made in each step since then, where a label is one class.
        stretch: counts since the guard last asked whether any label is kept.
        gold: targets of the labelled rows of the run so far.
    """

    def __init__(
        self,
        reasons: Iterable[str] = (),
        drain: Callable[[], Mapping[str, int]] = dict[str, int],
        *,
        numbers: bool = False,
        classes: bool = False,
    ) -> None:
        self.drain = drain
        self.classes = classes
        self.by_step, self._made = ClassesByStep(), list[PseudoLabel]()
        self.reasons = dict.fromkeys([*REASONS, *reasons])
        self.numbers = numbers
        self.since_log, self.window, self.stretch = LabelCounts(), LabelCounts(), LabelCounts()
        self.gold, self.step = LabelCounts(numbers), LabelCounts(numbers)

    @property
    def counts(self) -> Mapping[str, int]:
        """The numbers since the last log."""
        return self.since_log.counts

    def add(self, labels: Iterable[PseudoLabel]) -> None:
        """Count the labels of one micro-batch, with which its rows are trained on or dropped."""
        self.step.add_used(labels)

    def add_made(self, labels: Iterable[PseudoLabel]) -> None:
        """Count the scores of labels as they are made."""
        self.step.add_made(labels)
        if self.classes:
            self._made += labels

    def add_targets(self, labels: Tensor, milliseconds: int | None) -> None:
        """Count the targets of kept pseudo-labels."""
        self.step.add_targets(labels, milliseconds)

    def add_count(self, name: str, number: int) -> None:
        """Count something else, that others make a metric of."""
        self.step.counts[name] += number

    def end_step(self, number: int | None = None) -> None:
        """Take a step into the counts.

        Args:
            number: of the optimizer step; None where no labels were made since the last call.
        """
        if self._made and number is not None:
            self.by_step.add(number, self._made)
            self._made = []
        for part in (self.since_log, self.window, self.stretch):
            part.merge(self.step)
        for name in list(self.step.counts):
            # Told of from now on, also by a log without one.
            if name.startswith("dropped_"):
                self.reasons.setdefault(name.removeprefix("dropped_"))
        self.step = LabelCounts(self.numbers)

    def take_log(self, gather: Gather) -> tuple[LabelCounts, dict[str, float]]:
        """Counts and metrics over all processes since the last call, and a fresh start."""
        total, metrics = self._total(self.since_log, gather)
        self.since_log = LabelCounts()
        return total, metrics

    def take_window(self, gather: Gather) -> tuple[LabelCounts, dict[str, float]]:
        """Counts and metrics over all processes since `new_window`.

        Where labels are classes, metrics also have `pseudo/minority_within`, the share of labels that are not the most
        frequent class of their step, and `within`, the number of labels that it is of.
        """
        counts, metrics = self._total(self.window, gather)
        if self.classes:
            share, held = ClassesByStep.of(gather(self.by_step.state_dict())).minority()
            if held:
                metrics |= {"pseudo/minority_within": share, "within": held}
        return counts, metrics

    def new_window(self) -> None:
        """Begin the next window."""
        self.window, self.by_step = LabelCounts(), ClassesByStep()

    def take_stretch(self, gather: Gather) -> LabelCounts:
        """Counts over all processes since the last call, and a fresh start."""
        self._read()
        total = LabelCounts.of({"counts": counts} for counts in gather(dict(self.stretch.counts)))
        self.stretch = LabelCounts()
        return total

    def _read(self) -> None:
        self.step.counts.update(self.drain())
        self.end_step()

    def _total(self, counts: LabelCounts, gather: Gather) -> tuple[LabelCounts, dict[str, float]]:
        self._read()
        states = gather([counts.state_dict(), self.gold.state_dict(), list(self.reasons)])
        self.reasons = dict.fromkeys([*self.reasons, *(reason for state in states for reason in state[2])])
        total = LabelCounts.of(state[0] for state in states)
        return total, total.metrics(LabelCounts.of(state[1] for state in states), list(self.reasons))

    def state_dict(self, gather: Gather | None = None) -> dict[str, Any]:
        """The counts, over all processes where `gather` collects them."""
        self._read()
        parts = {"since_log": self.since_log, "window": self.window, "stretch": self.stretch, "gold": self.gold}
        mine = {name: part.state_dict() for name, part in parts.items()} | {"by_step": self.by_step.state_dict()}
        states = [mine] if gather is None else gather(mine)
        total = {name: LabelCounts.of(state[name] for state in states).state_dict() for name in parts}
        by_step = ClassesByStep.of(state["by_step"] for state in states)
        return {**total, "by_step": by_step.state_dict(), "reasons": sorted(self.reasons)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the counts."""
        self.step = LabelCounts(self.numbers)
        self.by_step, self._made = ClassesByStep.of([state.get("by_step", {})]), []
        self.since_log, self.window, self.stretch, self.gold = (
            LabelCounts.of([state.get(name, {})], self.numbers) for name in ("since_log", "window", "stretch", "gold")
        )
        self.reasons = dict.fromkeys([*self.reasons, *state.get("reasons", ())])
