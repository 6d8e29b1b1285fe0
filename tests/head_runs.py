"""Runs of heads other than CTC: encoder-decoders, causal language models, classifiers of sequences and of words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import numpy as np
import tiny
import tiny_generation
import torch
from torch import Tensor
from transformers import BertConfig, BertForTokenClassification

from hf_ema_scaling.data import CTCCollator
from hf_ema_scaling.data.collator import pad_labels
from hf_ema_scaling.training.seq2seq_arguments import EMASeq2SeqTrainingArguments

PADDING = {"whisper": 2, "t5": 0}
END = {"whisper": 2, "t5": 1}


def model_of(family: str, seed: int = 0, *, dropout: float = 0.0) -> Any:
    model = {"whisper": tiny_generation.whisper, "t5": tiny_generation.t5}[family](seed)
    for part in model.modules():
        if isinstance(part, torch.nn.Dropout):
            part.p = dropout
        elif hasattr(part, "dropout") and isinstance(part.dropout, float):
            part.dropout = dropout
    return model


def rows_of(family: str, count: int, seed: int = 0, *, labels: bool = True) -> datasets.Dataset:
    rng = np.random.default_rng(seed)
    columns: dict[str, Any] = {}
    if family == "gpt2":
        prompts = [rng.integers(10, 24, int(rng.integers(3, 9))).tolist() for _ in range(count)]
        columns["input_ids"] = prompts
        if labels:
            columns["labels"] = [[-100] * 2 + row[2:] for row in prompts]
        return datasets.Dataset.from_dict(columns)
    if family == "whisper":
        columns["input_features"] = rng.standard_normal((count, 4, 16)).astype(np.float32).tolist()
    else:
        columns["input_ids"] = [rng.integers(10, 24, int(rng.integers(3, 9))).tolist() for _ in range(count)]
    if labels:
        before, end = ([5, 6, 9], [2]) if family == "whisper" else ([], [1])
        columns["labels"] = [before + rng.integers(10, 24, 4).tolist() + end for _ in range(count)]
    return datasets.Dataset.from_dict(columns)


def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    if "input_features" in rows[0]:
        return CTCCollator(attention_mask=False)(rows)
    ids = [torch.tensor(row["input_ids"]) for row in rows]
    batch = {
        "input_ids": torch.nn.utils.rnn.pad_sequence(ids, batch_first=True),
        "attention_mask": torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
    }
    if "labels" in rows[0]:
        batch["labels"] = pad_labels([row["labels"] for row in rows])
    return batch


def arguments(folder: Path, **changes: Any) -> EMASeq2SeqTrainingArguments:
    values: dict[str, Any] = {
        "max_steps": 4,
        "reference_batch_size": 4,
        "ema_momentum": 0.9,
        "learning_rate": 3e-2,
        "lr_scheduler_type": "constant",
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 3,
        "max_grad_norm": 0.0,
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    return EMASeq2SeqTrainingArguments(str(folder), **(values | changes))


NAMES = {0: "O", 1: "B-a", 2: "I-a"}


def classifier(problem: str = "single_label_classification", outputs: int = 3) -> Any:
    model = tiny.bert()
    torch.manual_seed(1)
    model.config.problem_type, model.config.num_labels = problem, outputs
    model.classifier = torch.nn.Linear(8, outputs)
    model.num_labels = outputs
    return model


def tagger() -> BertForTokenClassification:
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "max_position_embeddings": 8}
    return BertForTokenClassification(
        BertConfig(vocab_size=20, initializer_range=0.3, id2label=NAMES, **sizes, **dropout)
    )


def tagged(count: int, seed: int, lengths: tuple[int, int] = (4, 8)) -> datasets.Dataset:
    """Tokens, some of which go on with a word, and a label for each word."""
    rng = np.random.default_rng(seed)
    rows: dict[str, list[list[int]]] = {"input_ids": [], "word_ids": [], "labels": []}
    for _ in range(count):
        size = int(rng.integers(*lengths))
        begins = np.concatenate([[True], rng.random(size - 1) < 0.6])
        rows["input_ids"].append(rng.integers(0, 20, size).tolist())
        rows["word_ids"].append((begins.cumsum() - 1).tolist())
        rows["labels"].append(
            [int(label) if first else -100 for label, first in zip(rng.integers(0, 3, size), begins, strict=True)]
        )
    return datasets.Dataset.from_dict(rows).with_format("torch")


def pad_tags(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    fills = {"input_ids": 0, "word_ids": -1, "labels": -100, "attention_mask": 0}
    rows = [{**row, "attention_mask": torch.ones_like(row["input_ids"])} for row in rows]
    return {
        name: torch.nn.utils.rnn.pad_sequence([row[name] for row in rows], batch_first=True, padding_value=fills[name])
        for name in rows[0]
    }


def texts(folder: Path, model: Any, train: Any = None, **changes: Any) -> dict[str, Any]:
    arguments = {"max_steps": 3, "learning_rate": 0.0, "reference_batch_size": 6}
    pseudo = {
        name: changes.pop(name) for name in ("unlabeled_weight", "cache_steps", "min_confidence") if name in changes
    }
    more = {name: changes.pop(name) for name in ("labeler", "augmentation") if name in changes}
    made: dict[str, Any] = {
        "model": model,
        "args": tiny.arguments(folder, **{**arguments, **changes}),
        "train": train or tiny.sentences(9),
        "unlabeled_dataset": tiny.sentences(12, 1, lengths=(3, 7)),
        "pseudo_label_args": tiny.pseudo(**pseudo),
        "data_collator": tiny.pad_sentences,
    }
    return made | more
