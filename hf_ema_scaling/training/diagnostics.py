"""What is counted of pseudo-labels between two logs and between two looks of the collapse guard."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor

from hf_ema_scaling.ema import DeadTeacherError
from hf_ema_scaling.labels.base import PseudoLabel
from hf_ema_scaling.training.label_counts import LabelCounts

LABELLESS_ROWS = 1000
REASONS = ("empty", "too_long", "confidence")
"""Reasons that are always told of, also where none occurred."""

Gather = Callable[[Any], list[Any]]
"""Collects JSON values of all processes, on all of them."""


class LabelStatistics:
    """Counts of pseudo-labels, the same on resume because they are part of a checkpoint.

    Args:
        reasons: reasons to be told of from the first log on.
        drain: gives counts that are kept elsewhere (on the device of the model), whenever counts are read.

    Attributes:
        since_log: counts since the last log.
        window: counts since the last look of the collapse guard.
        gold: targets of the labelled rows of the run so far.
        dropped_in_a_row: rows of this process since the last label that was kept.
    """

    def __init__(self, reasons: Iterable[str] = (), drain: Callable[[], Mapping[str, int]] = dict[str, int]) -> None:
        self.drain = drain
        self.reasons = dict.fromkeys([*REASONS, *reasons])
        self.since_log, self.window, self.gold = LabelCounts(), LabelCounts(), LabelCounts()
        self.step = LabelCounts()
        self.dropped_in_a_row = 0

    @property
    def counts(self) -> Mapping[str, int]:
        """The numbers since the last log."""
        return self.since_log.counts

    def add(self, labels: Iterable[PseudoLabel]) -> None:
        """Count the labels of one micro-batch, with which its rows are trained on or dropped.

        Raises:
            DeadTeacherError: after `LABELLESS_ROWS` rows in a row without a label that is kept.
        """
        labels = list(labels)
        self.step.add_used(labels)
        for label in labels:
            self.dropped_in_a_row = 0 if label.kept else self.dropped_in_a_row + 1
        if self.dropped_in_a_row >= LABELLESS_ROWS:
            self.end_step()
            dropped = {name: n for name, n in sorted(self.counts.items()) if name.startswith("dropped_")}
            reasons = ", ".join(f"{number} {name.removeprefix('dropped_')}" for name, number in dropped.items())
            raise DeadTeacherError(
                f"the teacher gave the last {self.dropped_in_a_row} unlabelled rows no label that is kept (since the "
                f"last log: {reasons}): start pseudo-labels later (pl_start), or loosen the filters and min_confidence"
            )

    def add_made(self, labels: Iterable[PseudoLabel]) -> None:
        """Count the scores of labels as they are made."""
        self.step.add_made(labels)

    def add_targets(self, labels: Tensor, milliseconds: int | None) -> None:
        """Count the targets of kept pseudo-labels."""
        self.step.add_targets(labels, milliseconds)

    def add_count(self, name: str, number: int) -> None:
        """Count something else, that others make a metric of."""
        self.step.counts[name] += number

    def end_step(self) -> None:
        """Take a step into the counts."""
        self.since_log.merge(self.step)
        self.window.merge(self.step)
        for name in list(self.step.counts):
            # Told of from now on, also by a log without one.
            if name.startswith("dropped_"):
                self.reasons.setdefault(name.removeprefix("dropped_"))
        self.step = LabelCounts()

    def take_log(self, gather: Gather) -> tuple[LabelCounts, dict[str, float]]:
        """Counts and metrics over all processes since the last call, and a fresh start."""
        total, metrics = self._total(self.since_log, gather)
        self.since_log = LabelCounts()
        return total, metrics

    def take_window(self, gather: Gather) -> tuple[LabelCounts, dict[str, float]]:
        """Counts and metrics over all processes since `window` was emptied."""
        return self._total(self.window, gather)

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
        parts = {"since_log": self.since_log, "window": self.window, "gold": self.gold}
        mine = {name: part.state_dict() for name, part in parts.items()}
        states = [mine] if gather is None else gather(mine)
        total = {name: LabelCounts.of(state[name] for state in states).state_dict() for name in parts}
        # Rows in a row are those of one process: their sum over processes would be a row that never was.
        return {**total, "dropped_in_a_row": self.dropped_in_a_row, "reasons": sorted(self.reasons)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the counts."""
        self.step = LabelCounts()
        self.since_log, self.window, self.gold = (
            LabelCounts.of([state.get(name, {})]) for name in ("since_log", "window", "gold")
        )
        self.dropped_in_a_row = int(state.get("dropped_in_a_row", 0))
        self.reasons = dict.fromkeys([*self.reasons, *state.get("reasons", ())])
