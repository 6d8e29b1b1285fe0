"""A kind of recipe that trains in a second, and runs with made-up figures."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import save_file
from transformers import EvalPrediction

from hf_ema_scaling.recipe.registry import RECIPES, RecipeKind
from hf_ema_scaling.sweep.distances import Comparison
from hf_ema_scaling.sweep.trajectory import Trajectory, weights_file
from hf_ema_scaling.training.arguments import EMATrainingArguments
from hf_ema_scaling.training.trainer import EMATrainer


@dataclass
class TinyArguments:
    rows: int = 24
    dropout: float = 0.1
    unequal: bool = False
    init_seed: int | None = None


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    return {"accuracy": float((np.argmax(prediction.predictions, -1) == prediction.label_ids).mean())}


def build_tiny(model: TinyArguments, args: EMATrainingArguments) -> Any:
    return EMATrainer(
        tiny.bert(dropout=model.dropout, seed=args.seed if model.init_seed is None else model.init_seed),
        args,
        train_dataset=tiny.sentences(model.rows, lengths=(2, 9) if model.unequal else (6, 7)),
        eval_dataset={"clean": tiny.sentences(8, 1), "noisy": tiny.sentences(8, 2)},
        compute_metrics=accuracy,
        data_collator=tiny.pad_sentences if model.unequal else None,
    )


@pytest.fixture(autouse=True)
def kind(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kind `tiny`, in this process."""
    monkeypatch.setitem(RECIPES, "tiny", RecipeKind((TinyArguments, EMATrainingArguments), build_tiny))


@pytest.fixture
def recipe() -> dict[str, Any]:
    """A recipe of 4 + 8 reference steps."""
    return {
        "recipe": "tiny",
        "reference_batch_size": 4,
        "kappa": 1,
        "small_batch_until": 4,
        "max_steps": 12,
        "eval_steps": 4,
        "logging_steps": 2,
        "learning_rate": 1e-2,
        "ema_momentum": 0.9,
        "per_device_train_batch_size": 4,
        "use_cpu": True,
        "dataloader_pin_memory": False,
    }


Curves = Mapping[str, Any]


@pytest.fixture
def trajectory(tmp_path: Path) -> Callable[..., Trajectory]:
    """A run with these metrics, and weights `(points + 1, parameters)` of student and average."""

    def make(
        name: str, metrics: Curves, *, student: Any = None, average: Any = None, clock: Any = (8.0, 12.0)
    ) -> Trajectory:
        folder = tmp_path / name
        folder.mkdir()
        for point, pair in enumerate(zip(student or (), average or (), strict=True)):
            tensors = [torch.tensor(weights, dtype=torch.float32) for weights in pair]
            save_file(dict(zip(("student", "average"), tensors, strict=True)), weights_file(folder, point))
        curves = {key: np.array(values, dtype=np.float64) for key, values in metrics.items()}
        result = {"optimizer_steps": 3, "seconds": 1.0, "warnings": ["kappa is large"]}
        result |= {"noise": [], "data": {"labelled_items": 24}}
        return Trajectory(folder, np.array(clock), curves, result)

    return make


@pytest.fixture
def comparison(trajectory: Callable[..., Trajectory]) -> Callable[..., Comparison]:
    """A run with these distances by weights and by loss, (average, student)."""

    def make(arm: str, kappa: float, seed: int, average: float, student: float, repeat: int = 0) -> Comparison:
        run = trajectory(f"{arm}-{kappa}-{seed}-{repeat}", {"eval_loss": [2.0, 1.0], "eval_ema_loss": [2.0, 0.5]})
        sides = {"average": average, "student": student}
        return Comparison(arm, kappa, seed, {"weights": sides, "loss": sides}, run, repeat)

    return make
