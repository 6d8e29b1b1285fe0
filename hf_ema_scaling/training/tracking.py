"""Logs as trackers take them: one number per key."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch

_PLAIN = (bool, int, float, str)


def scalar_logs(logs: dict[str, Any]) -> dict[str, Any]:
    """Logs without values that TensorBoard drops, that other trackers take for media, or that JSON does not know.

    Trainer's callbacks put `train/` before keys (`train/ema/momentum`, `train/pseudo/kept`) and make `eval/` of
    `eval_` (`eval/wer`, `eval/ema_wer`).

    Args:
        logs: by name. Arrays and tensors of one element become numbers; other arrays, tensors, lists, tuples and
            mappings a key per element, `<key>/<index or name>`; None, and objects of other kinds, are left out.
            Numbers, not finite ones among them, and texts stay.

    Returns:
        `logs` itself where there is nothing to change.
    """
    # Exact types: NumPy's float64 is a float, but prints itself with its type.
    if all(type(value) in _PLAIN for value in logs.values()):
        return logs
    return {name: value for key, entry in logs.items() for name, value in _scalars(key, entry)}


def _scalars(key: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, (torch.Tensor, np.ndarray, np.generic)):
        value = value.item() if _size(value) == 1 else value.tolist()
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _scalars(f"{key}/{name}", inner)
    elif isinstance(value, (list, tuple)):
        for number, inner in enumerate(value):
            yield from _scalars(f"{key}/{number}", inner)
    elif isinstance(value, _PLAIN):
        yield key, value


def _size(value: Any) -> int:
    return value.numel() if isinstance(value, torch.Tensor) else value.size
