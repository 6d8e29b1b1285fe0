"""What blocks of the documents take as given: small models, data and libraries, by the names that the blocks use."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import stock_runs
import tiny
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments

import hf_ema_scaling
from hf_ema_scaling.data.speech import build_character_processor
from hf_ema_scaling.scaling import AdamRule

Names = dict[str, Any]


def utterances(count: int, seed: int = 0, *, labels: bool = True) -> datasets.Dataset:
    """Log-mel features of one length, so that any collator can stack them."""
    rng = np.random.default_rng(seed)
    columns: Names = {"input_features": rng.standard_normal((count, 80, 8)).astype(np.float32).tolist()}
    columns["attention_mask"] = np.ones((count, 80), dtype=np.int64).tolist()
    if labels:
        columns["labels"] = rng.integers(1, tiny.VOCABULARY, (count, 4)).tolist()
    return datasets.Dataset.from_dict(columns).with_format("torch")


def stock_arguments(folder: Path, **changes: Any) -> TrainingArguments:
    """Of the stock Trainer, for two steps on a CPU."""
    values: Names = {"max_steps": 2, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "report_to": "none"}
    values |= {"use_cpu": True, "disable_tqdm": True, "save_strategy": "no", "dataloader_pin_memory": False}
    return TrainingArguments(str(folder), **(values | changes))


def trainers(folder: Path) -> Names:
    """A speech recogniser, its processor and data, and the arguments of a stock Trainer."""
    return {
        "model": tiny.parakeet(),
        "processor": build_character_processor(["abcdef"], num_mel_bins=8),
        "args": stock_arguments(folder),
        "ds": utterances(16),
        "labelled": utterances(16),
        "unlabelled": utterances(16, 1, labels=False),
        "dev": utterances(3, 2),
    }


def classifier(folder: Path) -> Names:
    """A text classifier with its data, and the arguments of a stock Trainer."""
    data = tiny.sentences(64)
    args = stock_arguments(folder)
    return {"model": tiny.bert(), "data": data, "args": args, "dev": tiny.sentences(8, 3), "Trainer": Trainer}


def emacallback(folder: Path) -> Names:
    """For the docstring of `EMACallback`."""
    return classifier(folder) | {"EMACallback": hf_ema_scaling.EMACallback}


def pseudolabelcollator(folder: Path) -> Names:
    """For the docstring of `PseudoLabelCollator`."""
    from hf_ema_scaling.data import CTCCollator

    rows = [dict(row) for row in utterances(8)]
    mixed = [{key: value for key, value in row.items() if n % 2 or key != "labels"} for n, row in enumerate(rows)]
    names = {name: getattr(hf_ema_scaling, name) for name in ("EMACallback", "PseudoLabelCollator", "CTCLabeler")}
    args = stock_arguments(folder, remove_unused_columns=False)
    found = {"model": tiny.parakeet(), "args": args, "pad": CTCCollator(), "mixed": mixed, "labelled": rows[1:2]}
    return names | found | {"Trainer": Trainer}


def register_average(folder: Path) -> Names:
    """For the docstring of `register_average`: a loop of two steps, whose loss is left out there."""
    os.chdir(folder)
    model = tiny.bert()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    names = {name: getattr(hf_ema_scaling, name) for name in hf_ema_scaling.__all__}
    loader = DataLoader(stock_runs.Sentences(16), batch_size=8)
    found = {"accelerator": Accelerator(cpu=True), "model": model, "optimizer": optimizer, "loader": loader}
    counts = {"samples_of_this_step_on_all_processes": 8, "momentum": 0.9, "step": 2}
    return names | found | counts | {"os": os}


def skipwatch(folder: Path) -> Names:
    """For the docstring of `SkipWatch`."""
    model = tiny.bert()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    average = hf_ema_scaling.WeightAverage(model)
    found = {"model": model, "optimizer": optimizer, "average": average, "watch": hf_ema_scaling.SkipWatch()}
    return found | {"momentum": 0.9, "kappa": 1.0}


def register_scaling_rule(folder: Path) -> Names:
    """For the docstring of `register_scaling_rule`."""
    from lamb import Lamb

    args = tiny.arguments(folder)
    names = {name: getattr(hf_ema_scaling, name) for name in ("register_scaling_rule", "EMATrainer")}
    found = {"model": tiny.bert(), "args": args, "data": tiny.sentences(32), "Lamb": Lamb, "AdamRule": AdamRule}
    return names | found | {"dataclasses": dataclasses, "math": math}


def walk(folder: Path) -> Names:
    """A small module with BatchNorm, and `walk(model)`, which moves its weights and statistics at random."""
    torch.manual_seed(0)

    def make() -> torch.nn.Module:
        return torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 2))

    def step(model: torch.nn.Module) -> None:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.1 * torch.randn_like(parameter)
            model(torch.randn(16, 4))

    return {"make_model": make, "random_step": step, "torch": torch}


SETUPS: dict[str, Callable[[Path], Names]] = {
    made.__name__: made
    for made in (
        trainers,
        classifier,
        emacallback,
        pseudolabelcollator,
        register_average,
        skipwatch,
        register_scaling_rule,
        walk,
    )
}
