"""Optimizer steps that were skipped: how many, since when, and when there have been too many of them in a row."""

from __future__ import annotations

from typing import Any


class SkippedSteps:
    """Counts the steps that `on_nonfinite="skip"` or fp16 loss scaling skipped; part of a checkpoint.

    A gradient that is not finite now and then is one thing; a run whose every step is skipped is over, and goes on
    for as long as its schedule has steps.

    Args:
        limit: Steps in a row after which to stop; 0 for never.

    Attributes:
        total: Of the run.
        row: Now in a row.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.total = self.logged = self.row = self.first_step = 0
        self.first_clock = 0.0

    def taken(self) -> None:
        """A step was taken."""
        self.row = 0

    def skipped(self, number: int, clock: float, why: str) -> None:
        """A step was skipped.

        Args:
            number: Optimizer steps of the run, this one included.
            clock: Reference steps at its beginning.
            why: What was not finite, for the message.

        Raises:
            FloatingPointError: It was one too many in a row.
        """
        if self.row == 0:
            self.first_step, self.first_clock = number, clock
        self.row += 1
        self.total += 1
        if self.row == self.limit:
            raise FloatingPointError(
                f"{self.row} optimizer steps in a row were skipped, all since step {self.first_step} (reference step "
                f"{self.first_clock:.1f}), the last for {why}: weights and average are those of step "
                f"{self.first_step - 1}, and nothing is learned any more. Go on from a checkpoint before that with a "
                "lower learning_rate, and look at the inputs; max_skipped_steps says how many in a row are too many"
            )

    def logs(self) -> dict[str, float]:
        """For the training log: steps skipped since the last one, and in the run."""
        since, self.logged = self.total - self.logged, self.total
        return {"skip/steps": float(since), "skip/total": float(self.total)}

    def state_dict(self) -> dict[str, Any]:
        """For the checkpoint; JSON values."""
        return {
            "total": self.total,
            "logged": self.logged,
            "row": self.row,
            "first_step": self.first_step,
            "first_clock": self.first_clock,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores `state_dict()`; an empty dictionary starts anew."""
        self.total, self.logged = int(state.get("total", 0)), int(state.get("logged", 0))
        self.row, self.first_step = int(state.get("row", 0)), int(state.get("first_step", 0))
        self.first_clock = float(state.get("first_clock", 0.0))
