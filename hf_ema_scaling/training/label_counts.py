"""Counts of pseudo-labels over a stretch of a run, and what they say.

All of them are integers (fractions in fixed point), so sums over rows, steps and processes are the same in any order.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hf_ema_scaling.labels.base import PseudoLabel

FRACTION = 2**32
"""Fractions and scores are counted in parts of `1 / FRACTION`."""
BUCKETS = 4096
"""Tokens are counted by id modulo this. Where a vocabulary is larger, divergences are lower bounds."""
MASS = 2**16
"""What one token or class counts."""
SKETCH = 2**15
"""Bits of the sketch of distinct labels."""
CONFIDENCE_BINS = 10
SCORE_RANGE = 1e6
"""Scores beyond this, infinite ones among them, are counted as this."""
PARTS = 2**60
"""Numbers of a regression are counted in parts of `1 / PARTS`: Python's integers have no largest one."""


class LabelCounts:
    """Counts of pseudo-labels; a sum of two is that of both stretches.

    Args:
        numbers: whether labels are the numbers of a regression.

    Attributes:
        counts: numbers by name.
        targets: int64 `(up to BUCKETS,)`, what kept labels hold, in `MASS`.
        sketch: bits set by kept labels, for the number of distinct ones (linear counting, Whang et al. 1990).
    """

    def __init__(self, numbers: bool = False) -> None:
        self.numbers = numbers
        self.counts: Counter[str] = Counter()
        self.targets: NDArray[np.int64] = np.zeros(0, dtype=np.int64)
        self.sketch = 0

    def add_used(self, labels: Iterable[PseudoLabel]) -> None:
        """Count labels that rows of a step are trained on, or dropped with."""
        counts = self.counts
        for label in labels:
            counts["rows"] += 1
            counts["confidence"] += round(label.confidence * FRACTION)
            counts[f"bin_{min(int(label.confidence * CONFIDENCE_BINS), CONFIDENCE_BINS - 1)}"] += 1
            if label.reason is None:
                counts["kept"] += 1
                counts["tokens"] += len(label.ids)
                self.sketch |= 1 << _hash(label, self.numbers) % SKETCH
            else:
                counts[f"dropped_{label.reason}"] += 1

    def add_made(self, labels: Iterable[PseudoLabel]) -> None:
        """Count the scores of labels as the teacher makes them; the label cache does not keep scores."""
        for label in labels:
            for name, value in label.scores.items():
                bounded = min(max(value, -SCORE_RANGE), SCORE_RANGE) if value == value else -SCORE_RANGE
                self.counts[f"score_{name}"] += round(bounded * FRACTION)
                self.counts[f"scored_{name}"] += 1

    def add_targets(self, labels: Tensor, milliseconds: int | None) -> None:
        """Count targets as the loss sees them, of labelled rows or of kept pseudo-labels.

        Args:
            labels: class ids `(rows,)` or label ids `(rows, tokens)` with negative padding, integers; or the
                probabilities of classes `(rows, classes)`; or numbers `(rows,)` or `(rows, numbers)`, whose sums and
                squares are counted.
            milliseconds: duration of the rows; None where it is not known.
        """
        self.counts["target_rows"] += len(labels)
        if milliseconds is not None:
            self.counts["target_ms"] += milliseconds
        if self.numbers:
            self._add_numbers(labels)
            return
        if labels.is_floating_point():
            self._add_answers(labels)
            if labels.ndim == 2 and labels.shape[1] > 1:
                self._add_targets(np.rint(labels.double().sum(0).numpy() * MASS).astype(np.int64))
            return
        ids = labels[labels >= 0]
        if labels.ndim == 2:
            self.counts["target_tokens"] += ids.numel()
        self._add_targets(torch.bincount(ids % BUCKETS).numpy().astype(np.int64) * MASS)

    def _add_numbers(self, labels: Tensor) -> None:
        for place, column in enumerate(labels.double().reshape(len(labels), -1).T.tolist()):
            parts = [round(value * PARTS) for value in column if math.isfinite(value)]
            self.counts[f"number_{place}_rows"] += len(parts)
            self.counts[f"number_{place}_sum"] += sum(parts)
            self.counts[f"number_{place}_squares"] += sum(part * part for part in parts)

    def _add_answers(self, labels: Tensor) -> None:
        """Of rows with a yes or no (or its probability) for each class: how many say yes, and no, to any class."""
        answers = labels.double().reshape(len(labels), -1)
        if labels.ndim != 2 or not ((answers >= 0) & (answers <= 1)).all():
            self.counts["unanswered"] += len(labels)
            return
        self.counts["answered"] += len(labels)
        for name, surest in (("yes", answers.amax(-1)), ("no", 1 - answers.amin(-1))):
            # Rounded row by row, for the sum to be the same in any order.
            self.counts[f"answered_{name}"] += int(torch.round(surest * MASS).long().sum())

    def _add_targets(self, found: NDArray[np.int64]) -> None:
        self.targets = _padded_sum(self.targets, found[:BUCKETS])

    def merge(self, other: LabelCounts) -> None:
        """Add the counts of another stretch."""
        # Not update(): zeros of one would be missing in the other's JSON.
        for name, value in other.counts.items():
            self.counts[name] += value
        self.targets = _padded_sum(self.targets, other.targets)
        self.sketch |= other.sketch

    def state_dict(self) -> dict[str, Any]:
        """The counts, as JSON values."""
        return {
            "counts": dict(sorted(self.counts.items())),
            "targets": self.targets.tolist(),
            "sketch": f"{self.sketch:x}",
        }

    @classmethod
    def of(cls, states: Iterable[Mapping[str, Any]], numbers: bool = False) -> LabelCounts:
        """The sum of states; of none, nothing."""
        total = cls(numbers)
        for state in states:
            one = cls()
            one.counts.update({name: int(value) for name, value in state.get("counts", {}).items()})
            one.targets = np.array(state.get("targets", []), dtype=np.int64)
            one.sketch = int(state.get("sketch", "0"), 16)
            total.merge(one)
        return total

    @property
    def distinct(self) -> float:
        """Number of distinct kept labels, to about 1 % up to 10,000 of them; never more than there are labels."""
        empty = SKETCH - self.sketch.bit_count()
        estimate = SKETCH * math.log(SKETCH / empty) if empty else math.inf
        return min(estimate, float(self.counts["kept"]))

    def metrics(self, gold: LabelCounts, reasons: Sequence[str] = ()) -> dict[str, float]:
        """What the counts say, by the names of the log; nothing where no row was drawn.

        Args:
            gold: targets of labelled rows (`add_targets`), which label lengths and frequencies are compared with.
            reasons: reasons to be told of, beside those that occurred.

        Returns:
            `pseudo/kept`, `pseudo/confidence`, `pseudo/tokens` (per kept label) and `pseudo/dropped_<reason>`;
            `confidence/<bin>`, shares of labels by confidence; `score/<name>`, means of the labeler's scores; and of
            kept labels `pseudo/distinct` (share of distinct ones), `pseudo/kl` (Kullback-Leibler divergence of their
            tokens or classes from the labelled ones', nats), `pseudo/kl_limit` (what it were if all were the most
            frequent one), `pseudo/minority` and `pseudo/minority_labelled` (share of tokens or classes that are not
            the most frequent one, of kept and of labelled labels) and `pseudo/length_ratio` (tokens per second, or per
            row, over those of labelled rows). Of rows with several classes there are also `pseudo/yes` and
            `pseudo/no`, the share of kept labels that have any class, and that lack any (of probabilities the mean of
            the highest one, and of 1 less the lowest), and `pseudo/yes_labelled` and `pseudo/no_labelled`. Of numbers
            there are, in place of all these, `pseudo/spread` (standard deviation over that of labelled numbers; of
            several numbers the smallest such ratio).
        """
        counts = self.counts
        logs = {
            f"score/{name.removeprefix('scored_')}": counts[name.replace("scored_", "score_", 1)] / FRACTION / number
            for name, number in sorted(counts.items())
            if name.startswith("scored_")
        }
        rows, kept = counts["rows"], counts["kept"]
        if rows == 0:
            return logs
        logs |= {
            "pseudo/kept": kept / rows,
            "pseudo/confidence": counts["confidence"] / FRACTION / rows,
            "pseudo/tokens": counts["tokens"] / max(kept, 1),
        }
        occurred = {name.removeprefix("dropped_") for name in counts if name.startswith("dropped_")}
        for reason in sorted({*reasons, *occurred}):
            logs[f"pseudo/dropped_{reason}"] = counts[f"dropped_{reason}"] / rows
        for place in range(CONFIDENCE_BINS):
            logs[f"confidence/{place / CONFIDENCE_BINS:.1f}"] = counts[f"bin_{place}"] / rows
        if kept:
            logs["pseudo/distinct"] = self.distinct / kept
        if self.targets.any() and gold.targets.any():
            logs["pseudo/kl"], logs["pseudo/kl_limit"] = _divergence(self.targets, gold.targets)
            logs["pseudo/minority"], logs["pseudo/minority_labelled"] = self.minority, gold.minority
        if min(one.counts["answered"] for one in (self, gold)) and not self.counts["unanswered"]:
            for name in ("yes", "no"):
                for key, one in ((f"pseudo/{name}", self), (f"pseudo/{name}_labelled", gold)):
                    logs[key] = one.counts[f"answered_{name}"] / MASS / one.counts["answered"]
        spreads = [found / known for found, known in zip(self.deviations, gold.deviations, strict=False) if known > 0]
        if spreads:
            logs["pseudo/spread"] = min(spreads)
        ratio = self._length_ratio(gold)
        return logs if ratio is None else {**logs, "pseudo/length_ratio": ratio}

    @property
    def minority(self) -> float:
        """Share of counted tokens or classes that are not the most frequent one."""
        return 1 - int(self.targets.max()) / int(self.targets.sum()) if self.targets.any() else 0.0

    @property
    def deviations(self) -> list[float]:
        """Standard deviation of each number of a regression; nothing without rows."""
        found: list[float] = []
        while (rows := self.counts[f"number_{len(found)}_rows"]) > 0:
            total, squares = (self.counts[f"number_{len(found)}_{what}"] for what in ("sum", "squares"))
            # Exact up to here, so no digits are lost where the mean is far from zero.
            found.append(math.sqrt((rows * squares - total * total) / (rows * PARTS) ** 2))
        return found

    def _length_ratio(self, gold: LabelCounts) -> float | None:
        measure = "target_ms" if self.counts["target_ms"] and gold.counts["target_ms"] else "target_rows"
        lengths = [one.counts["target_tokens"] / max(one.counts[measure], 1) for one in (self, gold)]
        return lengths[0] / lengths[1] if lengths[1] and self.counts[measure] else None


def _hash(label: PseudoLabel, numbers: bool) -> int:
    content = np.asarray(label.values, dtype="<f4") if numbers else np.asarray(label.ids, dtype="<i4")
    # Not a checksum: those of similar labels fall too evenly, or too unevenly, for a sketch.
    digest = hashlib.blake2b(content.tobytes(), digest_size=8)
    return int.from_bytes(digest.digest(), "little")


def _padded_sum(a: NDArray[np.int64], b: NDArray[np.int64]) -> NDArray[np.int64]:
    if len(a) < len(b):
        a, b = b, a
    total = a.copy()
    total[: len(b)] += b
    return total


def _divergence(found: NDArray[np.int64], gold: NDArray[np.int64]) -> tuple[float, float]:
    """KL(found || gold) of unigrams, with one more of each token in gold; and that of its most frequent one alone."""
    # Zeros of the longer one are tokens that the other never held.
    zeros = np.zeros(max(len(found), len(gold)), dtype=np.int64)
    p, q = (_padded_sum(part, zeros) / MASS for part in (found, gold))
    p, q = p / p.sum(), (q + 1) / (q + 1).sum()
    held = p > 0
    return float((p[held] * np.log(p[held] / q[held])).sum()), float(-np.log(q.max()))
