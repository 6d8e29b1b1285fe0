"""A tiny CTC model with its processor, a classifier with its tokenizer, and rows for both."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import datasets
import pytest
import torch
from datasets import Dataset
from label_inputs import speech_model, speech_rows
from transformers import (
    BertConfig,
    BertForSequenceClassification,
)

from hf_ema_scaling.data.text import build_word_tokenizer
from hf_ema_scaling.ema import WeightAverage, save_average
from hf_ema_scaling.labelling import Head, head_of


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The cache of `datasets`, away from the user's."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
        yield folder


@pytest.fixture(scope="session")
def speech_head() -> Head:
    return head_of(*speech_model())


@pytest.fixture(scope="session")
def average_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An average on disk, as a run saves it."""
    folder = tmp_path_factory.mktemp("run") / "ema"
    model, processor = speech_model()
    save_average(
        folder,
        model,
        WeightAverage(model),
        state={"clock": 12.5, "momentum": 0.999, "borders": [1, 2]},
        processing_class=processor,
    )
    return folder


@pytest.fixture(scope="session")
def speech_data() -> Dataset:
    return Dataset.from_list(speech_rows())


@pytest.fixture(scope="session")
def text_head() -> Head:
    torch.manual_seed(0)
    tokenizer = build_word_tokenizer(["a good film", "a bad film", "very very long words"])
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        max_position_embeddings=16,
        initializer_range=1.0,
        id2label={0: "neg", 1: "pos", 2: "none"},
        label2id={"neg": 0, "pos": 1, "none": 2},
    )
    return head_of(BertForSequenceClassification(config).eval(), tokenizer)
