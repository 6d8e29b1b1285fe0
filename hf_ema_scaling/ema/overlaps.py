"""Tensors of a model that are not the same object but share memory, as views of one flat tensor do."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from operator import itemgetter

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from hf_ema_scaling.ema.names import Entry


def repeats(tensor: Tensor) -> bool:
    """Whether several elements of a tensor are one place in memory, as after `expand`: it cannot be written to."""
    return _plain(tensor) and any(s == 0 and n > 1 for n, s in zip(tensor.shape, tensor.stride(), strict=True))


def overlapping(entries: Iterable[Entry]) -> Iterator[tuple[Entry, Entry]]:
    """Pairs of tensors with an element in common; views of one storage that lie beside each other have none.

    Args:
        entries: Distinct tensors of a model. Those in shards or other wrappers, on `meta`, or of another layout are
            passed over.
    """
    by_storage: dict[tuple[torch.device, int], list[Entry]] = {}
    for entry in entries:
        if _plain(entry.tensor) and entry.tensor.numel():
            place = entry.tensor.device, entry.tensor.untyped_storage().data_ptr()
            by_storage.setdefault(place, []).append(entry)
    for sharing in by_storage.values():
        # Thousands of views may lie side by side in one flat tensor: each is compared with those that begin within it.
        spans = sorted(((*_span(entry.tensor), entry) for entry in sharing), key=itemgetter(0, 1))
        for index, (_, end, one) in enumerate(spans):
            following = index + 1
            while following < len(spans) and spans[following][0] < end:
                other = spans[following][2]
                following += 1
                if _meet(one.tensor, other.tensor):
                    yield one, other


def _plain(tensor: Tensor) -> bool:
    # A wrapper around other tensors (DTensor, a quantized weight) has no memory of its own.
    return tensor.layout == torch.strided and not tensor.is_meta and not is_traceable_wrapper_subclass(tensor)


def _meet(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors whose spans meet have an element in common."""
    if a.itemsize != b.itemsize:  # one memory in two dtypes: where they lie is all that is asked
        return True
    if a.data_ptr() == b.data_ptr() or (a.is_contiguous() and b.is_contiguous()):
        return True
    # Columns of one matrix, say, lie between each other.
    first = min(a.data_ptr(), b.data_ptr())
    return bool(torch.isin(_places(a, first), _places(b, first)).any())


def _span(tensor: Tensor) -> tuple[int, int]:
    """First and last byte + 1 of a tensor's elements; strides are never negative."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.itemsize


def _places(tensor: Tensor, first: int) -> Tensor:
    """Where each element lies, in elements from the address `first`."""
    places = torch.full((1,), (tensor.data_ptr() - first) // tensor.itemsize)
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        places = (places[:, None] + torch.arange(size) * stride).flatten()
    return places
