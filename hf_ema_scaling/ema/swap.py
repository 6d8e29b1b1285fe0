"""Which models hold an average in place of their own weights, and how their own come back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from hf_ema_scaling.ema.names import Entry, local_shard, unwrap


class _Swap:
    """Modules and tensors that hold other weights than their own; kept alive, so that their ids stay theirs."""

    def __init__(self, model: nn.Module, entries: list[Entry]) -> None:
        self.parts = {id(part): part for part in (model, *(slot.owner for e in entries for slot in e.slots))}
        # Of modules that share a parameter with another model's.
        self.tensors = {id(entry.tensor): entry.tensor for entry in entries}

    def reaches(self, part: nn.Module) -> bool:
        """Whether a module, without its children, holds any of them."""
        own = (*part._parameters.values(), *part._buffers.values())
        return id(part) in self.parts or any(id(tensor) in self.tensors for tensor in own)


# Whichever average put them there.
_SWAPS: list[_Swap] = []


def refuse_swapped(model: nn.Module, action: str) -> None:
    """Raises `RuntimeError` for a model that holds swapped-in weights, whole or in part."""
    if (name := _swapped_part(model)) is not None:
        where = f" in {name!r}" if name else ""
        raise RuntimeError(
            f"Cannot {action} this model now: it holds swapped-in weights{where}; leave `swapped` first."
        )


def is_swapped(model: nn.Module) -> bool:
    """Whether a model holds swapped-in weights, whole or in part, of whichever average.

    Whether the model itself was swapped, a model that it is a part of, or a part of it.
    """
    return _swapped_part(model) is not None


def _swapped_part(model: nn.Module) -> str | None:
    """The name of the first module with swapped-in weights, "" for the model itself; None where there is none."""
    if not _SWAPS:  # as before every update
        return None
    named = unwrap(model).named_modules()
    return next((name for name, part in named if any(swap.reaches(part) for swap in _SWAPS)), None)


@contextmanager
def swapped_in(
    model: nn.Module, entries: list[Entry], write: Callable[[], None], reshard: Callable[[], None]
) -> Iterator[None]:
    """Inside, the model's `entries` hold what `write` puts into them; its own bits return on exit or exception.

    Args:
        model: Not swapped yet.
        entries: Its tensors that `write` changes in place.
        write: Writes the other weights.
        reshard: Brings sharded tensors back to where they were at the beginning.

    Raises:
        RuntimeError: Something cast the model inside.
    """
    inner = unwrap(model)
    with torch.no_grad():
        own = [local_shard(entry.tensor).clone() for entry in entries]
    swap = _Swap(inner, entries)
    _SWAPS.append(swap)
    try:
        write()
        yield
    finally:
        _SWAPS.remove(swap)
        reshard()
        _put_back(entries, own)


@torch.no_grad()
def _put_back(entries: list[Entry], own: list[Tensor]) -> None:
    cast = []
    for entry, value in zip(entries, own, strict=True):
        for slot in entry.slots:
            # Looked up again: a buffer may have been replaced by another object (e.g. by `.to()`).
            held = local_shard(getattr(slot.owner, slot.leaf))
            held.copy_(value)
            if held.dtype != value.dtype:
                cast.append(f"{slot.name!r} was {value.dtype} and is {held.dtype}")
    if cast:
        raise RuntimeError(
            f"the model was cast while it held the average, so its own weights came back rounded: {cast[0]}. Evaluate "
            "without bf16_full_eval and fp16_full_eval (bf16=True computes in half precision and casts nothing)"
        )
