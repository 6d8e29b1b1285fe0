"""A classifier that talks itself into one class, and one that does not."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import tiny
import torch
from torch import Tensor

from hf_ema_scaling.labels import PseudoLabel

WINDOW = 10.0


class Classes:
    """The most probable class."""

    def label(self, teacher: Callable[..., Any], batch: Mapping[str, Tensor]) -> list[PseudoLabel]:
        with torch.no_grad():
            confidences, classes = teacher(**batch).logits.softmax(-1).max(-1)
        return [PseudoLabel((i,), p) for i, p in zip(classes.tolist(), confidences.tolist(), strict=True)]

    def with_targets(self, inputs: Mapping[str, Tensor], labels: list[PseudoLabel]) -> dict[str, Tensor]:
        return {**inputs, "labels": torch.tensor([label.ids[0] if label.kept else 0 for label in labels])}


class Silent(Classes):
    """Drops all it labels, or what one process does."""

    def __init__(self, silent: bool = True) -> None:
        self.silent = silent

    def label(self, teacher: Callable[..., Any], batch: Mapping[str, Tensor]) -> list[PseudoLabel]:
        labels = super().label(teacher, batch)
        return [dataclasses.replace(label, reason="empty") for label in labels] if self.silent else labels


def sentences(count: int, seed: int) -> datasets.Dataset:
    """Of three classes, which the first token tells."""
    tokens = np.random.default_rng(seed).integers(0, 18, (count, 6))
    rows = {"input_ids": tokens.tolist(), "labels": (tokens[:, 0] % 3).tolist()}
    return datasets.Dataset.from_dict(rows).with_format("torch")


def trainer(
    folder: Path, *, planted: bool, pl: Any = None, labeler: Any = None, unlabelled: Any = None, **changes: Any
) -> Any:
    """Planted: no threshold, no momentum, a high rate, seven unlabelled rows in eight."""
    values: dict[str, Any] = {
        "max_steps": 40,
        "reference_batch_size": 16,
        "ema_momentum": 0.0 if planted else 0.9,
        "learning_rate": 0.1 if planted else 3e-3,
        "logging_strategy": "steps",
        "logging_steps": 10,
        "save_strategy": "steps",
        "save_steps": 5,
    }
    pseudo = {"pl_start": 10.0, "unlabeled_ratio": 7.0, "collapse_window": WINDOW}
    return tiny.trainer(
        tiny.bert(),
        tiny.arguments(folder, **(values | changes)),
        sentences(64, 0),
        unlabeled_dataset=unlabelled or sentences(400, 1).remove_columns("labels"),
        labeler=labeler or Classes(),
        pseudo_label_args=tiny.pseudo(**(pseudo | (pl or {}))),
    )


class InTurns(Classes):
    """Calls all rows of a step one class, and those of the next step the next class."""

    step: Callable[[], int]
    """The number of the step."""

    def label(self, teacher: Callable[..., Any], batch: Mapping[str, Tensor]) -> list[PseudoLabel]:
        return [PseudoLabel((self.step() % 3,), 0.9) for _ in batch["input_ids"]]
