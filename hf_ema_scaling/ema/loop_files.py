"""What accelerate writes beside the average: deleted before a save, and verified before anything is loaded."""

from __future__ import annotations

import re
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import (
    MODEL_NAME,
    OPTIMIZER_NAME,
    RNG_STATE_NAME,
    SAFE_MODEL_NAME,
    SAMPLER_NAME,
    SCALER_NAME,
    SCHEDULER_NAME,
)
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from hf_ema_scaling.ema.durable import UNREADABLE_ZIP, check_zip

if TYPE_CHECKING:
    from accelerate import Accelerator

LOADER_NAME = "dl_state_dict"  # accelerate has no constant for it
_PARTS = (SAFE_MODEL_NAME, MODEL_NAME, OPTIMIZER_NAME, SCHEDULER_NAME, SAMPLER_NAME, LOADER_NAME)
_COMMON = re.compile(rf"(?:{'|'.join(_PARTS)})(?:_\d+)?\.(?:safetensors|bin)|custom_checkpoint_\d+\.pkl|{SCALER_NAME}")


def delete_older(folder: Path, process: int, *, writes: bool) -> None:
    """Deletes what an older `save_state` left in a folder, so that a save that is killed leaves no half of each.

    Args:
        folder: Where accelerate is about to save; it may have nothing of this save yet.
        process: This process, which writes random states of its own.
        writes: Whether it also writes what all processes share.
    """
    names = {f"{RNG_STATE_NAME}_{process}.pkl"}
    for path in folder.iterdir():
        if path.name in names or (writes and _COMMON.fullmatch(path.name)):
            path.unlink()


def student_file(folder: Path, index: int) -> Path:
    """The file from which accelerate loads its model of this number; it need not exist."""
    ending = f"_{index}" if index else ""
    path, other = folder / f"{SAFE_MODEL_NAME}{ending}.safetensors", folder / f"{MODEL_NAME}{ending}.bin"
    return other if other.exists() and not path.exists() else path


def faults(folder: Path, accelerator: Accelerator, *, models: int, processes: int | None) -> list[str]:
    """What of a checkpoint is missing or torn, by what the accelerator would load from it; empty for nothing.

    Safetensors files are as long as their headers say, and every record in PyTorch's files has its CRC-32: models,
    optimizers, schedulers, the gradient scaler, random states, the samplers and the places of data loaders, and what
    `register_for_checkpointing` adds. What no part of the accelerator will read is not looked at.

    Args:
        folder: The checkpoint.
        accelerator: Whose optimizers, schedulers and data loaders are to be restored.
        models: How many models are.
        processes: How many saved it; each restores random states where as many load it. Accelerate passes over those
            that it cannot read without a word.
    """
    paths = [student_file(folder, index) for index in range(models)]
    for name, parts in ((OPTIMIZER_NAME, accelerator._optimizers), (SCHEDULER_NAME, accelerator._schedulers)):
        paths += [folder / (f"{name}_{index}.bin" if index else f"{name}.bin") for index in range(len(parts))]
    paths += _loader_files(folder, accelerator)
    paths += [folder / f"custom_checkpoint_{index}.pkl" for index in range(len(accelerator._custom_objects))]
    if accelerator.scaler is not None:
        paths.append(folder / SCALER_NAME)
    if processes == accelerator.num_processes:
        paths.append(folder / f"{RNG_STATE_NAME}_{accelerator.process_index}.pkl")
    found = []
    for path in paths:
        try:
            if path.suffix == ".safetensors":
                with safe_open(path, "pt"):
                    pass
            else:
                check_zip(path)
        except FileNotFoundError:
            found.append(f"{path.name} is missing")
        except (SafetensorError, *UNREADABLE_ZIP) as error:
            found.append(f"{path.name} is not readable ({type(error).__name__}: {error})")
    return found


def _loader_files(folder: Path, accelerator: Accelerator) -> list[Path]:
    """What accelerate would read of data loaders; where the place of one is lost it says nothing and begins anew."""
    paths = []
    for index, loader in enumerate(accelerator._dataloaders):
        ending = f"_{index}.bin" if index else ".bin"
        sampler, place = folder / f"{SAMPLER_NAME}{ending}", folder / f"{LOADER_NAME}{ending}"
        stateful = bool(getattr(loader, "use_stateful_dataloader", False))
        paths += [path for path, needed in ((sampler, False), (place, stateful)) if needed or path.exists()]
    return paths


def checksums(weights: Mapping[str, Any]) -> dict[str, str]:
    """CRC-32 of every plain tensor among the weights of a model, by name."""
    return {name: _checksum(value) for name, value in weights.items() if type(value) in (Tensor, nn.Parameter)}


def changed_tensors(path: Path, expected: Mapping[str, str]) -> list[str]:
    """Names of the tensors in a student's file that are others than those of `checksums`.

    What the file lacks is not looked at: of tied weights it holds one.
    """
    if path.suffix == ".safetensors":
        with safe_open(path, "pt") as file:
            return [name for name in file.keys() if expected.get(name) != _checksum(file.get_tensor(name))]  # noqa: SIM118
    return [name for name, value in checksums(_read(path)).items() if expected.get(name) != value]


def load_student(model: nn.Module, path: Path) -> None:
    """Puts the weights in a student's file into the model; what the file lacks stays."""
    model.load_state_dict(load_file(path) if path.suffix == ".safetensors" else _read(path), strict=False)


def _read(path: Path) -> dict[str, Any]:
    return dict(torch.load(path, map_location="cpu", weights_only=True))


def _checksum(tensor: Tensor) -> str:
    data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return f"{zlib.crc32(data.numpy().data):08x}"
