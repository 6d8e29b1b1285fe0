"""Metrics of student and average, by evaluation set."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

COLUMNS = {
    "wer": "WER",
    "cer": "CER",
    "exact_match": "exact",
    "probe_accuracy": "probe accuracy",
    "f1": "F1",
    "precision": "precision",
    "recall": "recall",
    "accuracy": "accuracy",
    "error_rate": "error rate",
    "loss": "loss",
}
"""Metrics that results are told in, and what people call them."""

# Lazy, so that of probe_accuracy and accuracy the longer name wins over a set called probe.
KEY = re.compile(rf"eval_(ema_)?((?:.+_)??)({'|'.join(COLUMNS)})", re.DOTALL)
_SPEED = re.compile(r"(.+_)?(runtime|samples_per_second|steps_per_second|model_preparation_time|jit_compilation_time)")


@dataclass(frozen=True)
class Score:
    """One metric on one evaluation set.

    Args:
        evaluation_set: its name, empty for the only one.
        metric: its name, without prefixes.
        student: value of the student, None if it was not measured.
        average: value of the average.
    """

    evaluation_set: str
    metric: str
    student: float | None
    average: float | None

    @property
    def label(self) -> str:
        """What people call the metric."""
        return COLUMNS.get(self.metric, self.metric)


def scores(metrics: Mapping[str, Any]) -> list[Score]:
    """Every evaluation metric in `metrics` (keys `eval_*` and `eval_ema_*`), in the order of the student's keys.

    Names of sets are told from those of metrics where the metric is one of `COLUMNS`; other metrics keep the whole
    name. Values that are no finite number count as not measured.
    """
    found: dict[tuple[str, str], dict[str, float]] = {}
    for key, value in metrics.items():
        if not key.startswith("eval_"):
            continue
        if match := KEY.fullmatch(key):
            ema, name, metric = match.groups(default="")
        else:
            ema = "ema_" if key.startswith("eval_ema_") else ""
            name, metric = "", key.removeprefix("eval_").removeprefix(ema)
        if _SPEED.fullmatch(metric) or isinstance(value, bool) or not isinstance(value, int | float):
            continue
        if math.isfinite(value):
            found.setdefault((name.strip("_"), metric), {})[ema] = float(value)
    return [Score(name, metric, values.get(""), values.get("ema_")) for (name, metric), values in found.items()]
