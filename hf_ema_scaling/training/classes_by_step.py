"""Classes of pseudo-labels step by step: what a teacher that goes from one class to another would hide in a window.

Labels of one class each that change from step to step have all classes over a window, in their right shares. Within a
step they have one, and that is what is looked at here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hf_ema_scaling.data.sampler import ScheduledBatchSampler
from hf_ema_scaling.data.stream import LABELLED
from hf_ema_scaling.labels.base import PseudoLabel
from hf_ema_scaling.training.label_counts import MASS

PART_LABELS = 4
"""Steps are joined until they hold so many labels: of fewer most have one class by chance."""
MOST_STEPS = 1000
"""The last so many steps of a window are remembered."""
GOLD_STEPS = 500
"""Steps of a run whose labelled rows say what is usual."""


class ClassesByStep:
    """Counts of classes for each optimizer step; the sum of two is that of both processes.

    Attributes:
        steps: mass of each class (in `MASS`, as integers) of the labels kept, by the number of the step.
    """

    def __init__(self) -> None:
        self.steps: dict[int, Counter[int]] = {}

    def add(self, step: int, labels: Iterable[PseudoLabel]) -> None:
        """Count the labels that a step made and kept, soft ones by their probabilities."""
        counts = self.steps.setdefault(step, Counter())
        for label in labels:
            if label.kept and len(label.values) > 1:
                counts.update({place: round(value * MASS) for place, value in enumerate(label.values)})
            elif label.kept and label.ids:
                counts[label.ids[0]] += MASS
        while len(self.steps) > MOST_STEPS:
            del self.steps[min(self.steps)]

    def minority(self) -> tuple[float, float]:
        """Share of labels that are not the most frequent class of their step, and the number of labels that it is of.

        Steps with fewer than `PART_LABELS` are joined with those that follow; of no labels, the share is 1.
        """
        return minority_of_parts(self.steps[step] for step in sorted(self.steps))

    def state_dict(self) -> dict[str, Any]:
        """The counts, as JSON values."""
        return {
            str(step): {str(place): mass for place, mass in sorted(self.steps[step].items())}
            for step in sorted(self.steps)
        }

    @classmethod
    def of(cls, states: Iterable[Mapping[str, Any]]) -> ClassesByStep:
        """The sum of states; of none, nothing."""
        total = cls()
        for state in states:
            for step, counts in state.items():
                total.steps.setdefault(int(step), Counter()).update({int(place): n for place, n in counts.items()})
        return total


def minority_of_parts(steps: Iterable[Mapping[int, int]]) -> tuple[float, float]:
    """As `ClassesByStep.minority`, of masses by class of consecutive steps."""
    part: Counter[int] = Counter()
    most = total = 0
    for counts in steps:
        part.update(counts)
        # Probabilities are rounded one by one.
        if (held := part.total()) >= PART_LABELS * MASS - MASS // 2:
            most, total = most + max(part.values()), total + held
            part = Counter()
    return (1 - most / total, total / MASS) if total else (1.0, 0.0)


def labelled_minority(sampler: ScheduledBatchSampler, labels: Sequence[Any] | NDArray[Any]) -> float | None:
    """The share of labelled rows that are not the most frequent class of their step: what is usual in this run.

    It is below that of the whole set because steps are small, and far below it where length tells the class and
    batches hold rows of similar length.

    Args:
        sampler: of the run.
        labels: class of each labelled row.

    Returns:
        None where the first `GOLD_STEPS` steps do not hold enough labels.
    """
    classes = np.asarray(labels)
    found = []
    for number in range(min(sampler.num_steps, GOLD_STEPS)):
        rows = [
            sampler.stream.index[positions]
            for positions in sampler.sources(number)
            if sampler.stream.source[positions[0]] == LABELLED
        ]
        values, counts = np.unique(classes[np.concatenate(rows)] if rows else classes[:0], return_counts=True)
        found.append({int(value): int(count) * MASS for value, count in zip(values, counts, strict=True)})
    share, held = minority_of_parts(found)
    return share if held else None
