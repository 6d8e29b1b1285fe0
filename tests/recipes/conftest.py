"""A few seconds of noise with texts, and the smallest recipe over it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import datasets
import pytest
import yaml
from manifests import write_manifest


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The cache of `datasets`, away from the user's."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
        patch.setenv("HF_DATASETS_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="session")
def manifest() -> Callable[..., Path]:
    """`write_manifest`."""
    return write_manifest


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the manifests of a corpus."""
    folder = tmp_path_factory.mktemp("corpus")
    write_manifest(folder / "labelled.jsonl", 8, seed=0)
    write_manifest(folder / "unlabelled.jsonl", 8, seed=1, labelled=False)
    write_manifest(folder / "evaluation.jsonl", 3, seed=2)
    return folder


@pytest.fixture(scope="session")
def config(corpus: Path) -> Path:
    """The YAML file of a recipe that takes two steps."""
    encoder = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "num_mel_bins": 16,
        "subsampling_factor": 4,
        "subsampling_conv_channels": 4,
        "conv_kernel_size": 5,
        "dropout": 0.0,
        "attention_dropout": 0.0,
        "activation_dropout": 0.0,
        "layerdrop": 0.0,
    }
    values = {
        "labelled": str(corpus / "labelled.jsonl"),
        "unlabelled": str(corpus / "unlabelled.jsonl"),
        "evaluation": str(corpus / "evaluation.jsonl"),
        "model_config": {"model_type": "parakeet_ctc", "encoder_config": encoder},
        "alphabet": "abc",
        "freq_width": 4,
        "reference_batch_size": 4,
        "per_device_train_batch_size": 2,
        "max_steps": 2,
        "pl_start": 1,
        "learning_rate": 1e-3,
        "ema_momentum": 0.5,
        "save_strategy": "no",
        "logging_steps": 1,
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    path = corpus / "recipe.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path
