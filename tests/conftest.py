"""Settings of every test: no network, one thread per process, fixed seeds."""

from __future__ import annotations

import os
from collections.abc import Iterator

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest
import torch

from hf_ema_scaling.scaling import optimizers

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def _rules_put_back() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(optimizers, "_RULES", dict(optimizers._RULES))
        yield


# What is registered ends with its test; what the fixtures of a module register, with the module.
_module_rules = pytest.fixture(autouse=True, scope="module", name="_module_rules")(_rules_put_back)
_test_rules = pytest.fixture(autouse=True, name="_test_rules")(_rules_put_back)
