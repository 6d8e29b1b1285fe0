"""The float64 bits of an average on disk, beside the float32 weights that `from_pretrained` reads."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from hf_ema_scaling.ema.average import WeightAverage

EXACT_NAME = "average_float64.safetensors"


class NotExactError(ValueError):
    """What is wrong with the float64 part of a saved average."""


def rounded(tensors: Mapping[str, Tensor], average: WeightAverage) -> dict[str, Tensor]:
    """The tensors of an average for other software: those of a float64 average in float32, one object where one was.

    Args:
        tensors: By any names.
        average: The average they are of; tensors of a float32 average are returned as they are.
    """
    if average.dtype == torch.float32:
        return dict(tensors)
    made = {id(tensor): tensor.float() if tensor.dtype == torch.float64 else tensor for tensor in tensors.values()}
    return {name: made[id(tensor)] for name, tensor in tensors.items()}


def exact_record(average: WeightAverage) -> dict[str, str]:
    """What `ema_state.json` says of it: `{"exact": file name}`, nothing for a float32 average."""
    return {} if average.dtype == torch.float32 else {"exact": EXACT_NAME}


def save_exact(folder: Path, tensors: Mapping[str, Tensor], average: WeightAverage) -> None:
    """Writes the float64 tensors of a float64 average into `folder`; nothing for a float32 average.

    Args:
        folder: An existing folder.
        tensors: The average's persistent tensors by name, tied ones once.
        average: The average.
    """
    if average.dtype == torch.float64:
        exact = {name: tensor.contiguous() for name, tensor in tensors.items() if tensor.dtype == torch.float64}
        save_file(exact, folder / EXACT_NAME, metadata={"format": "pt"})


def with_exact(
    folder: Path, record: Mapping[str, Any], tensors: Mapping[str, Tensor], average: WeightAverage
) -> dict[str, Tensor]:
    """Puts the float64 tensors of a saved average in the place of their rounded ones.

    A float32 average may be continued in float64: its tensors are then the same values in float64.

    Args:
        folder: The saved folder.
        record: Its `ema_state.json`.
        tensors: The weights of the folder by name.
        average: The average that is to hold them.

    Raises:
        NotExactError: The file is missing or unreadable, does not agree with the weights beside it, or the average
            is kept in float32.
    """
    wanted = average.tensors()
    if "exact" not in record:
        widened = {
            name: tensor.double() if tensor.dtype == torch.float32 and _is_float64(wanted.get(name)) else tensor
            for name, tensor in tensors.items()
        }
        return widened if average.dtype == torch.float64 else dict(tensors)
    if average.dtype == torch.float32:
        raise NotExactError(
            "it was kept in float64 and this one is in float32, which would round it: resume with "
            "ema_dtype='float64' (dtype=torch.float64 where the average is built by hand)"
        )
    exact = read_exact(folder, record)
    for key, tensor in exact.items():
        if key not in tensors or not torch.equal(tensor.float(), tensors[key]):
            raise NotExactError(f"tensor {key!r} in {record['exact']} is not that of the weights beside it")
    return {**tensors, **exact}


def read_exact(folder: Path, record: Mapping[str, Any]) -> dict[str, Tensor]:
    """Reads the float64 tensors of a saved average by name; none for one that was kept in float32.

    Args:
        folder: The saved folder.
        record: Its `ema_state.json`.

    Raises:
        NotExactError: The file is missing or unreadable.
    """
    if "exact" not in record:
        return {}
    name = str(record["exact"])
    try:
        return load_file(folder / Path(name).name)
    except FileNotFoundError as error:
        raise NotExactError(f"{name} is missing") from error
    except (SafetensorError, OSError, ValueError) as error:
        raise NotExactError(f"{name} is not readable ({error})") from error


def _is_float64(tensor: Tensor | None) -> bool:
    return tensor is not None and tensor.dtype == torch.float64
