"""Trial runs that leave nothing behind: random numbers, modes and tensors are put back as they were."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from hf_ema_scaling.ema.names import local_shard


def rng_devices(device: torch.device) -> list[torch.device]:
    """The devices, beside the CPU, whose random state a forward pass on this device may change."""
    return [device] if device.type == "cuda" else []


def seed(device: torch.device) -> None:
    """Starts the random numbers of the CPU and of this device anew, and of no other."""
    torch.default_generator.manual_seed(0)
    for one in rng_devices(device):
        with torch.cuda.device(one):
            torch.cuda.manual_seed(0)


@contextmanager
def in_mode(module: nn.Module, training: bool) -> Iterator[None]:
    """Inside, all parts are in training or in eval mode; each is in its own again on exit and on any exception."""
    own = [(part, part.training) for part in module.modules()]
    for part, _ in own:
        part.training = training
    try:
        yield
    finally:
        for part, mode in own:
            part.training = mode


@contextmanager
def overwritten(tensors: Sequence[Tensor]) -> Iterator[None]:
    """Inside, the tensors (of DTensors this process's shards) may be written to; their bits return afterwards."""
    with torch.no_grad():
        values = [local_shard(tensor).clone() for tensor in tensors]
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, value in zip(tensors, values, strict=True):
                local_shard(tensor).copy_(value)
