"""What is counted between two logs: pseudo-labels by outcome, and how often gradients were clipped."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from hf_ema_scaling.ema import DeadTeacherError
from hf_ema_scaling.labels.base import PseudoLabel

LABELLESS_ROWS = 1000
REASONS = ("empty", "too_long", "no_eos", "confidence")


class LabelStatistics:
    """Counts pseudo-labels since the last log; the same on resume because the counters are part of a checkpoint."""

    FIELDS = ("rows", "kept", "tokens", "confidence", *(f"dropped_{reason}" for reason in REASONS))

    def __init__(self) -> None:
        self.dropped_in_a_row = 0
        self.counts = dict.fromkeys(self.FIELDS, 0.0)

    def add(self, labels: Iterable[PseudoLabel]) -> None:
        """Count the labels of one micro-batch.

        Raises:
            KeyError: for a reason code that is not in `REASONS`.
            DeadTeacherError: after `LABELLESS_ROWS` rows in a row without a label that is kept.
        """
        for label in labels:
            self.counts["rows"] += 1
            self.counts["confidence"] += label.confidence
            if label.reason is None:
                self.counts["kept"] += 1
                self.counts["tokens"] += len(label.ids)
                self.dropped_in_a_row = 0
            else:
                self.counts[f"dropped_{label.reason}"] += 1
                self.dropped_in_a_row += 1
        if self.dropped_in_a_row >= LABELLESS_ROWS:
            reasons = ", ".join(f"{self.counts[f'dropped_{reason}']:.0f} {reason}" for reason in REASONS)
            raise DeadTeacherError(
                f"the teacher gave the last {self.dropped_in_a_row} unlabelled rows no label that is kept (since the "
                f"last log: {reasons}): start pseudo-labels later (pl_start), or lower min_confidence"
            )

    def logs(self, total: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Shares and means over all processes since the last call, and a fresh start.

        Args:
            total: sums a float64 vector over the processes.

        Returns:
            `pseudo/kept`, `pseudo/confidence`, `pseudo/tokens` (per kept label) and `pseudo/dropped_<reason>`; nothing
            when no row was labelled.
        """
        counts = self.state_dict(total)
        self.counts = dict.fromkeys(self.FIELDS, 0.0)
        rows = counts["rows"]
        if rows == 0:
            return {}
        shares = {f"pseudo/dropped_{reason}": counts[f"dropped_{reason}"] / rows for reason in REASONS}
        return {
            "pseudo/kept": counts["kept"] / rows,
            "pseudo/confidence": counts["confidence"] / rows,
            "pseudo/tokens": counts["tokens"] / max(counts["kept"], 1.0),
            **shares,
        }

    def state_dict(self, total: Callable[[Tensor], Tensor] | None = None) -> dict[str, float]:
        """The counters, over all processes where `total` sums a float64 vector over them."""
        counts = self.counts
        if total is not None:
            summed = total(torch.tensor([counts[name] for name in self.FIELDS], dtype=torch.float64)).tolist()
            counts = dict(zip(self.FIELDS, summed, strict=True))
        # Rows in a row are those of one process: their sum over processes would be a row that never was.
        return {**counts, "dropped_in_a_row": float(self.dropped_in_a_row)}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Restore the counters."""
        self.counts = {name: float(state.get(name, 0.0)) for name in self.FIELDS}
        self.dropped_in_a_row = int(state.get("dropped_in_a_row", 0))
