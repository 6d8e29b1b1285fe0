"""What a run of a sweep leaves behind: metrics and weights of student and average at every evaluation."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_ema_scaling.training.mixin import EMATrainerMixin

FloatArray = npt.NDArray[np.float64]

RESULT = "result.json"
SIDES = STUDENT, AVERAGE = "student", "average"
PREFIXES = {STUDENT: "eval_", AVERAGE: "eval_ema_"}


def flat_weights(model: nn.Module) -> Tensor:
    """Trainable parameters, tied ones once, in the model's order: float32 `(parameters,)`."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.cat([parameter.detach().to("cpu", torch.float32).flatten() for parameter in trained])


def weights_file(folder: Path, point: int) -> Path:
    """Weights at a point: 0 where the recorded part starts, then one number per evaluation."""
    return folder / f"weights-{point:03}.safetensors"


class TrajectoryRecorder(TrainerCallback):
    """Writes the weights of student and average when the clock is at `start`, and at every evaluation after it.

    Args:
        folder: receives one file per point.
        start: in reference steps; no step may cross it.
    """

    def __init__(self, folder: Path, start: float) -> None:
        self.folder = folder
        self.start = start
        self.trainer: EMATrainerMixin | None = None
        """The trainer that the callback was added to; set it before training."""
        self.points = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The weights of a run that starts, or branches, where the recorded part does."""
        if self._clock(state) >= self.start:
            self._write()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The weights of the start, or those that are about to be evaluated."""
        # Batches in seconds or tokens pass the start by a part of an item.
        starts = not self.points and self._clock(state) >= self.start
        if starts or (self.points and control.should_evaluate):
            self._write()

    def _clock(self, state: TrainerState) -> float:
        assert self.trainer is not None
        return self.trainer.sampler.step(state.global_step - 1).end if state.global_step else 0.0

    def _write(self) -> None:
        assert self.trainer is not None and self.trainer.average is not None
        model = self.trainer.model
        weights = {STUDENT: flat_weights(model)}
        with self.trainer.average.swapped(model):
            weights[AVERAGE] = flat_weights(model)
        save_file(weights, weights_file(self.folder, self.points))
        self.points += 1


@dataclass(frozen=True)
class Trajectory:
    """A finished run after its branch.

    Args:
        folder: where its weights are.
        clock: reference steps of the evaluations, float64 `(points,)`.
        metrics: values at each of them by metric, `eval_*` of the student and `eval_ema_*` of the average, as in
            Trainer's log; float64 `(points,)`.
        result: everything else that `result.json` says.
    """

    folder: Path
    clock: FloatArray
    metrics: dict[str, FloatArray]
    result: dict[str, Any]

    @classmethod
    def read(cls, folder: Path) -> Trajectory:
        """The run in `folder`.

        Raises:
            FileNotFoundError: when it is not finished.
        """
        result = json.loads((folder / RESULT).read_text(encoding="utf-8"))
        clock, metrics = result.pop("clock"), result.pop("metrics")
        return cls(
            folder,
            np.array(clock, dtype=np.float64),
            # A value that is not finite was written as null.
            {key: np.array(values, dtype=np.float64) for key, values in metrics.items()},
            result,
        )

    def weights(self, point: int) -> dict[str, Tensor]:
        """Flat weights of `student` and `average` at a point, 0 for the start: float32 `(parameters,)` each."""
        return load_file(weights_file(self.folder, point))

    def names(self) -> list[str]:
        """Metrics that were measured of student and average, without their prefixes."""
        found = [key.removeprefix(PREFIXES[AVERAGE]) for key in self.metrics if key.startswith(PREFIXES[AVERAGE])]
        return [name for name in found if PREFIXES[STUDENT] + name in self.metrics]

    def metric(self, name: str, weights: str) -> FloatArray:
        """The curve of a metric, for `student` or `average`.

        Raises:
            ValueError: for a metric that was not measured, with those that were.
        """
        key = PREFIXES[weights] + name
        if key not in self.metrics:
            raise ValueError(f"no metric {name!r} in {self.folder}; there are {', '.join(self.names())}")
        return self.metrics[key]


def evaluated(history: Sequence[Mapping[str, Any]], start: float) -> tuple[list[float], dict[str, list[float | None]]]:
    """Clock positions after `start`, and metrics at each of them, from a `log_history`; one row for all sets."""
    points: dict[float, dict[str, float]] = {}
    for row in history:
        clock = row.get("clock/reference_step", 0.0)
        if clock > start:
            values = {key: float(value) for key, value in row.items() if key.startswith("eval_")}
            if values:
                points.setdefault(clock, {}).update(values)
    clocks = sorted(points)
    keys = [key for key in points[clocks[0]] if all(key in points[clock] for clock in clocks)] if clocks else []
    metrics = {key: [points[clock][key] for clock in clocks] for key in keys}
    # JSON knows neither NaN nor infinity.
    return clocks, {key: [v if math.isfinite(v) else None for v in values] for key, values in metrics.items()}
