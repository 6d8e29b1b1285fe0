"""Runs with filters, and a processor that decodes the labels of the tiny speech models."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import tiny
from torch import Tensor
from transformers import Wav2Vec2CTCTokenizer, Wav2Vec2FeatureExtractor, Wav2Vec2Processor

from hf_ema_scaling.labels import PseudoLabel


def processor(folder: Path) -> Wav2Vec2Processor:
    """Ids 1 to 8 are a space and the letters b to h."""
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = {token: i for i, token in enumerate(["<pad>", "|", *"bcdefgh"])}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    tokenizer = Wav2Vec2CTCTokenizer(
        str(folder / "vocab.json"), bos_token=None, eos_token=None, unk_token=None, word_delimiter_token="|"
    )
    return Wav2Vec2Processor(Wav2Vec2FeatureExtractor(return_attention_mask=True), tokenizer)


class Content:
    """Labels, confidences and scores of a row by its content alone."""

    def __init__(self, drop: Callable[[PseudoLabel], str | None] = lambda label: None) -> None:
        self.drop = drop

    def label(self, teacher: Callable[..., Any], batch: Mapping[str, Tensor]) -> list[PseudoLabel]:
        return [self.of(float(row[0])) for row in batch["input_values"]]

    def of(self, first: float) -> PseudoLabel:
        number = int(abs(first) * 1000)
        ids = tuple(1 + (number // 7**place) % 8 for place in range(1 + number % 5))
        label = PseudoLabel(ids, number % 97 / 97, scores={"blank": number % 3 / 4})
        return PseudoLabel(label.ids, label.confidence, self.drop(label), scores=label.scores)


def unlabelled(count: int = 20) -> datasets.Dataset:
    """With a hidden truth that is right in part, and two sources."""
    data = tiny.speech(count, 1, labels=False)
    first = [float(row["input_values"][0]) for row in data]
    truth = [list(Content().of(x).ids) + [3] * (i % 2) for i, x in enumerate(first)]
    return data.add_column("truth", truth).add_column("origin", ["web" if i % 3 else "books" for i in range(count)])


def trainer(
    folder: Path, labeler: Any = None, *, data: Any = None, pl: Any = None, more: Any = None, **changes: Any
) -> Any:
    values: dict[str, Any] = {
        "max_steps": 12,
        "per_device_train_batch_size": 3,
        "adam_epsilon": 1e-3,
        "learning_rate": 3e-3,
        "logging_strategy": "steps",
        "logging_steps": 3,
    }
    pseudo = {"pl_start": 2.0, "unlabeled_ratio": 3.0}
    return tiny.trainer(
        tiny.wav2vec2(dropout=0.1),
        tiny.arguments(folder, **(values | changes)),
        tiny.speech(20),
        unlabeled_dataset=unlabelled() if data is None else data,
        pseudo_label_args=tiny.pseudo(**(pseudo | (pl or {}))),
        labeler=labeler or Content(),
        **(more or {}),
    )


def history(made: Any, prefixes: tuple[str, ...] = ("",)) -> list[dict[str, float]]:
    """The log without times, keys with one of the prefixes."""
    volatile = ("runtime", "per_second", "train_loss")
    return [
        {k: v for k, v in entry.items() if k.startswith(prefixes) and not any(word in k for word in volatile)}
        for entry in made.state.log_history
    ]


def drawn_rows(made: Any) -> np.ndarray:
    """Rows of the unlabelled set in the order of the stream."""
    stream = made.sampler.stream
    return stream.index[stream.source == 1]
