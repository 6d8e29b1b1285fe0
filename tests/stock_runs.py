"""Runs of the stock `Trainer` with an `EMACallback`, small enough for a test."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor, nn
from torch.utils.data import Dataset, IterableDataset
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from hf_ema_scaling.training.callback import EMACallback

RHO = 0.9


class Sentences(Dataset[dict[str, Any]]):
    def __init__(self, count: int = 64) -> None:
        generator = torch.Generator().manual_seed(1)
        self.ids = torch.randint(0, 20, (count, 5), generator=generator)
        self.labels = torch.randint(0, 2, (count,), generator=generator)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, i: int) -> dict[str, Any]:
        return {"input_ids": self.ids[i], "labels": self.labels[i]}


class Streamed(IterableDataset[dict[str, Any]]):
    def __iter__(self) -> Iterator[dict[str, Any]]:
        data = Sentences()
        return iter([data[i] for i in range(len(data))])


class Regression(nn.Module):
    """Takes no extra arguments, so Trainer divides its loss by the accumulation steps itself."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.line = nn.Linear(5, 1)

    def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return {"loss": ((self.line(input_ids.float() / 20)[:, 0] - labels) ** 2).mean()}


class Recorder(TrainerCallback):
    """What other code sees: the student's weights after each step, and the average's."""

    def __init__(self, average: EMACallback) -> None:
        self.callback = average
        self.student: list[dict[str, Tensor]] = []
        self.average: list[dict[str, Tensor]] = []

    def on_optimizer_step(self, *_: Any, model: nn.Module, **__: Any) -> None:
        self.student.append({name: p.detach().clone() for name, p in model.named_parameters()})
        self.average.append({name: t.clone() for name, t in self.callback.average.tensors().items()})


def bert() -> BertForSequenceClassification:
    torch.manual_seed(0)
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=20,
            hidden_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=8,
            max_position_embeddings=8,
        )
    )


def arguments(folder: Path, **changes: Any) -> TrainingArguments:
    values: dict[str, Any] = {
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
        "logging_strategy": "no",
        "report_to": "none",
    }
    return TrainingArguments(str(folder), **(values | changes))


def callback(**changes: Any) -> EMACallback:
    return EMACallback(**({"momentum": RHO, "reference_batch_size": 4} | changes))


def fresh_accelerator() -> None:
    # TrainingArguments of other tests leave accelerate's process-wide state half reset.
    AcceleratorState._reset_state(reset_partial_state=True)
    Accelerator(cpu=True)


def trainer(average: EMACallback, folder: Path, *more: TrainerCallback, model: Any = None, **changes: Any) -> Trainer:
    student = bert() if model is None else model
    return Trainer(student, arguments(folder, **changes), train_dataset=Sentences(), callbacks=[average, *more])


def clones(average: EMACallback) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in average.average.tensors().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def tokenizer() -> PreTrainedTokenizerFast:
    """Forty words, w0 to w39, and three special tokens before them."""
    words = ["<pad>", "<eos>", "<unk>", *(f"w{i}" for i in range(40))]
    model = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    model.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=model, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", model_max_length=32
    )
