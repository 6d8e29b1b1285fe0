"""Which models hold an average in place of their own weights, and how their own come back."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from hf_ema_scaling.ema.names import Entry, local_shard, unwrap

# Whichever average put it there.
_SWAPPED: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def refuse_swapped(model: nn.Module, action: str) -> None:
    """Raises `RuntimeError` for a model that holds swapped-in weights."""
    if is_swapped(model):
        raise RuntimeError(f"Cannot {action} this model now: it holds swapped-in weights; leave `swapped` first.")


def is_swapped(model: nn.Module) -> bool:
    """Whether a model holds swapped-in weights, of whichever average."""
    return unwrap(model) in _SWAPPED


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
    _SWAPPED.add(inner)
    try:
        write()
        yield
    finally:
        _SWAPPED.discard(inner)
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
