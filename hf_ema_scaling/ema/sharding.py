"""Weights in shards, one per process (FSDP2's DTensors): bring them home, gather them, agree about them.

Everything that happens per update is local. What a whole model is asked for (its distance, a saved copy, a teacher) is
collective: every process must ask at the same moment, or those that did will wait for the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor, distribute_tensor


def reshard(model: nn.Module) -> None:
    """Puts the shards back in the place of gathered parameters, in every part of the model that FSDP2 manages.

    After a forward pass without backward (evaluation) parts of a model hold gathered copies as plain tensors: to read
    there is to miss DTensors by name, to write there is to write into a copy, and to write into the shards meanwhile
    has no effect on the next forward pass. Nothing for a model that is not sharded; no communication.
    """
    for part in model.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


def is_sharded(model: nn.Module) -> bool:
    """Whether FSDP2 manages the model or a part of it."""
    return any(isinstance(part, FSDPModule) for part in model.modules())


def computed_in(model: nn.Module) -> set[torch.dtype]:
    """The dtypes to which FSDP2 casts parameters before it computes with them (`MixedPrecisionPolicy`); else empty."""
    policies = (
        getattr(part._get_fsdp_state(), "_mp_policy", None) for part in model.modules() if isinstance(part, FSDPModule)
    )
    return {policy.param_dtype for policy in policies if policy is not None and policy.param_dtype is not None}


def class_of(model: nn.Module) -> type[nn.Module]:
    """The model's own class, where FSDP2 has put a class of its own in the place of it."""
    kinds: Any = type(model).__mro__
    kind: type[nn.Module] = next(kind for kind in kinds if not issubclass(kind, FSDPModule))
    return kind


def is_flat_sharded(model: nn.Module) -> bool:
    """Whether FSDP1 wraps the model or a part of it."""
    return any(isinstance(part, FullyShardedDataParallel) for part in model.modules())


def refuse_flat(model: nn.Module) -> None:
    """Raises `NotImplementedError` for a model that FSDP1 wraps."""
    if is_flat_sharded(model):
        raise NotImplementedError(
            "Cannot average a model wrapped by FSDP1, whose parameters are pieces of flat buffers: shard it with "
            "FSDP2 (fsdp_version: 2), whose parameters are DTensors with names and shapes of their own."
        )


def check_placement(key: str, wanted: Tensor, found: Tensor) -> None:
    """Raises `ValueError` unless both tensors are whole, or sharded alike."""
    held, given = (_placement(tensor) for tensor in (wanted, found))
    if held != given:
        raise ValueError(
            f"{key!r} is {given} in the model, the average has it {held}. Build the average after the model has been "
            "sharded, and use it with that model; `share_with` gathers it for others."
        )


def _placement(tensor: Tensor) -> str:
    return f"sharded as {tensor.placements}" if isinstance(tensor, DTensor) else "whole"


def gathered(tensor: Tensor) -> Tensor:
    """The whole of a DTensor, on every process that holds a part of it (collective); any other tensor as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def copy_whole_(target: Tensor, whole: Tensor) -> None:
    """Copies a whole tensor, which every process has, into a DTensor or any other tensor; no communication.

    Args:
        target: tensor to overwrite; of a DTensor this process's shard.
        whole: tensor of the same (global) shape, on any device.
    """
    if isinstance(target, DTensor) and not isinstance(whole, DTensor):
        mine = whole.to(target.to_local().device)
        whole = distribute_tensor(mine, target.device_mesh, target.placements, src_data_rank=None)
    target.copy_(whole)


@torch.no_grad()
def over_shards(values: Tensor, tensors: Sequence[Tensor], op: Any = dist.ReduceOp.SUM) -> Tensor:
    """Reduces one value per tensor over the processes that hold the tensor's shards; collective for DTensors.

    Args:
        values: `(n,)`, what this process found of its shard of each tensor; on the tensors' device.
        tensors: the n tensors; values of those that are no DTensors stay.
        op: how values of shards are combined.

    Returns:
        `(n,)`, the same on all processes that share the tensors.
    """
    places: dict[tuple[Any, tuple[int, ...]], list[int]] = {}
    for place, tensor in enumerate(tensors):
        if isinstance(tensor, DTensor):
            dims = tuple(d for d, placement in enumerate(tensor.placements) if not placement.is_replicate())
            places.setdefault((tensor.device_mesh, dims), []).append(place)
    result = values.clone()
    for (mesh, dims), chosen in places.items():
        part = result[chosen]
        for dim in dims:
            dist.all_reduce(part, op=op, group=mesh.get_group(dim))
        result[chosen] = part
    return result
