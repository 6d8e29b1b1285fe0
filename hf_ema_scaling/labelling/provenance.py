"""Where labels come from: the weights, the average they were, the data, the versions."""

from __future__ import annotations

import hashlib
import importlib.metadata
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hf_ema_scaling.ema.storage import STATE_NAME, AverageStateError, read_record


def weights_fingerprint(model: nn.Module) -> str:
    """SHA-256 over names, dtypes, shapes and bits of all parameters and saved buffers; in hexadecimal."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def average_record(name: str) -> dict[str, Any] | None:
    """What `ema_state.json` in a model's folder says of the average, numbers and strings only; None without one.

    Raises:
        ValueError: It is damaged.
    """
    if not name or not (Path(name) / STATE_NAME).is_file():
        return None
    try:
        record = read_record(Path(name))
    except AverageStateError as error:
        raise ValueError(str(error)) from error
    state = {key: value for key, value in record["state"].items() if isinstance(value, str | int | float | None)}
    return {"num_updates": record["num_updates"], "state": state}


def versions() -> dict[str, str]:
    """Of this library and of those whose numbers a label depends on."""
    names = ("hf-ema-scaling", "transformers", "torch", "torchaudio", "datasets")
    found = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:  # used from its source folder
            found[name] = "unknown"
    return found
