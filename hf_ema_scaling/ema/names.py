"""The tensors of a module by name: wrappers removed, tied weights once, with every place they are registered at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.nn.utils.spectral_norm import SpectralNorm

_WRAPPERS = frozenset({"module", "_orig_mod", "_fsdp_wrapped_module"})


def canonical_name(name: str) -> str:
    """Returns a parameter or buffer name without the segments that DDP, FSDP and `torch.compile` insert.

    Args:
        name: A dotted name such as `module._orig_mod.encoder.weight`.

    Returns:
        The name the unwrapped model uses, here `encoder.weight`.
    """
    return ".".join(segment for segment in name.split(".") if segment not in _WRAPPERS)


def unwrap(model: nn.Module) -> nn.Module:
    """Returns the model inside DDP, DataParallel, FSDP or `torch.compile` wrappers, however deeply they nest."""
    while len(model._modules) == 1:
        ((name, child),) = model._modules.items()
        if name not in _WRAPPERS or child is None:
            break
        model = child
    return model


def local_shard(tensor: Tensor) -> Tensor:
    """Returns this process's part of a DTensor, detached and over the same storage; any other tensor as it is."""
    return tensor.to_local().detach() if isinstance(tensor, DTensor) else tensor


class Slot(NamedTuple):
    """One place in a module tree where a tensor is registered."""

    name: str
    owner: nn.Module
    leaf: str
    tensor: Tensor
    is_param: bool
    persistent: bool


@dataclass(slots=True)
class Entry:
    """One distinct tensor of a model with all its places; `key` is the name of its shadow."""

    key: str
    slots: list[Slot]

    @property
    def tensor(self) -> Tensor:
        """The tensor itself."""
        return self.slots[0].tensor

    @property
    def is_param(self) -> bool:
        """Whether it is a parameter anywhere."""
        return any(slot.is_param for slot in self.slots)

    @property
    def persistent(self) -> bool:
        """Whether the model's state_dict has it."""
        return any(slot.persistent for slot in self.slots)


def entries_of(model: nn.Module) -> list[Entry]:
    """Lists the distinct tensors of a model in registration order, each with every place it is registered at."""
    by_tensor: dict[int, Entry] = {}
    owner_of: dict[str, int] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        hidden = module._non_persistent_buffers_set
        for leaf, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is None:
                continue
            name = canonical_name(f"{prefix}.{leaf}" if prefix else leaf)
            if owner_of.setdefault(name, id(tensor)) != id(tensor):
                raise ValueError(f"Two tensors of the model share the name {name!r} once wrappers are removed.")
            slot = Slot(name, module, leaf, tensor, leaf in module._parameters, leaf not in hidden)
            by_tensor.setdefault(id(tensor), Entry(name, [])).slots.append(slot)
    return list(by_tensor.values())


def unit_vectors(model: nn.Module) -> set[int]:
    """Ids of the buffers in which spectral norm keeps its singular vectors: a mean of unit vectors is none."""
    found: set[int] = set()
    for module in model.modules():
        if isinstance(module, _SpectralNorm):
            found.update(id(module.get_buffer(name)) for name in ("_u", "_v") if name in module._buffers)
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, SpectralNorm):
                found.update(id(module.get_buffer(f"{hook.name}_{end}")) for end in ("u", "v"))
    return found


def check_names(wanted: set[str], found: set[str], where: str, advice: str = "") -> None:
    """Raises `ValueError` with the first few names that are missing in `where` or unexpected there, and advice."""
    missing, unexpected = sorted(wanted - found), sorted(found - wanted)
    if missing or unexpected:
        raise ValueError(
            f"Names do not match the average. Missing in {where}: {_few(missing)}; unexpected: {_few(unexpected)}."
            f"{advice}"
        )


def _few(names: list[str], limit: int = 5) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return f"{', '.join(names[:limit])}{more}" if names else "none"
