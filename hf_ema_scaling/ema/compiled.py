"""The update of a float32 average by bfloat16 weights on a CPU as one compiled loop (optional, needs `numba`).

PyTorch has no operation that reads bfloat16 and moves float32: it casts into a scratch first, which on a CPU does not
get faster with threads, and takes a microsecond or more for every tensor. Here the addresses of all tensors are laid
out once, every thread runs over its share of them, and bfloat16 is widened in a register. The arithmetic is that of
`torch.lerp`, with the same fused multiply-add: what comes out has the same bits. Where dtypes agree PyTorch's own
loop is as fast, its threads being awake already.
"""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

MIN_ELEMENTS = 1 << 20
"""Elements from which a compiled update is worth the second that compiling it takes."""

Kernel = Callable[[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64], float], None]

_address = Tensor.data_ptr


@functools.cache
def available() -> bool:
    """Whether `numba` can be imported; it is, the first time that this is asked."""
    try:
        importlib.import_module("numba")
    except ImportError:
        return False
    return True


def suits(shadow: Sequence[Tensor], source: Sequence[Tensor]) -> bool:
    """Whether `Loop` can update these: enough plain dense float32 tensors on a CPU, bfloat16 sources laid out alike.

    Args:
        shadow: Tensors to update.
        source: As many others.
    """
    return (
        sum(map(Tensor.numel, shadow)) >= MIN_ELEMENTS
        and all(_plain(tensor, torch.float32) for tensor in shadow)
        and all(_plain(tensor, torch.bfloat16) for tensor in source)
        and all(s.shape == p.shape and s.stride() == p.stride() for s, p in zip(shadow, source, strict=True))
        and available()
    )


def _plain(tensor: Tensor, dtype: torch.dtype) -> bool:
    return (
        type(tensor) in (Tensor, nn.Parameter)
        and tensor.device.type == "cpu"
        and tensor.layout == torch.strided
        and tensor.dtype == dtype
        and not tensor.is_inference()
        and _is_dense(tensor)
    )


def _is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill their piece of memory, in any order of dimensions."""
    order = sorted(range(tensor.dim()), key=tensor.stride, reverse=True)
    return tensor.permute(order).is_contiguous() and (tensor.numel() == 0 or tensor.data_ptr() != 0)


class Loop:
    """Pairs of tensors laid out for the compiled update.

    Args:
        shadow: Tensors to update that `suits` accepts, with
        source: theirs. Both must be kept alive by the caller, and not be resized, while this is in use.
    """

    def __init__(self, shadow: Sequence[Tensor], source: Sequence[Tensor]) -> None:
        self._shadow = list(shadow)
        self._source = list(source)
        self._addresses = self._look()
        self._kernel = kernel()
        self._threads = 0
        self._shares: list[tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]] = []

    def holds(self) -> bool:
        """Whether all tensors still lie where they were laid out: `.data =` gives one other storage."""
        return self._look() == self._addresses

    def lerp_(self, weight: float) -> None:
        """`s <- s + weight * (p - s)` for every pair, in place, on as many threads as PyTorch has."""
        if self._threads != torch.get_num_threads():
            self._threads = torch.get_num_threads()
            self._shares = self._lay_out(self._threads)
        mine, *others = self._shares
        running = [_pool(len(others)).submit(self._kernel, *share, weight) for share in others]
        self._kernel(*mine, weight)
        for future in running:
            future.result()
        # PyTorch does not see what is written here, and those who ask whether a tensor was written to ask it.
        torch.autograd.graph.increment_version(self._shadow)

    def _look(self) -> tuple[list[int], list[int]]:
        return list(map(_address, self._shadow)), list(map(_address, self._source))

    def _lay_out(self, threads: int) -> list[tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]]:
        """Cuts the elements into equal shares, one for each thread: addresses of both sides, and lengths."""
        sizes = np.array([tensor.numel() for tensor in self._shadow], dtype=np.int64)
        ends = np.cumsum(sizes)
        starts = ends - sizes
        shares = []
        for first, last in pairwise(_cuts(int(ends[-1]), threads)):
            inside = np.flatnonzero((ends > first) & (starts < last))
            begin = np.maximum(starts[inside], first)
            length = np.minimum(ends[inside], last) - begin
            offset = begin - starts[inside]
            shadow, source = (
                np.array(addresses, dtype=np.int64)[inside] + offset * tensors[0].element_size()
                for addresses, tensors in zip(self._addresses, (self._shadow, self._source), strict=True)
            )
            shares.append((shadow, source, length))
        return shares


def _cuts(total: int, threads: int) -> list[int]:
    # At multiples of a cache line of float32, where tensors are long.
    return [total * thread // threads // 16 * 16 for thread in range(threads)] + [total]


@functools.cache
def _pool(workers: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(workers, thread_name_prefix="ema")


# Threads do not survive a fork: a loader's worker must not wait for those of its parent.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)


@functools.cache
def kernel() -> Kernel:
    """Compiles the update, once in a process."""
    # Its own types speak of what its compiler sees, not of what Python does.
    numba, core, extending = (
        cast(Any, importlib.import_module(name)) for name in ("numba", "numba.core", "numba.extending")
    )
    types = core.types

    # `carray` takes an address as a pointer only.
    @extending.intrinsic
    def pointer(typing_context: Any, address: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            return builder.inttoptr(arguments[0], core.cgutils.voidptr_t)

        return types.voidptr(types.int64), generate

    compiled = functools.partial(numba.njit, nogil=True, fastmath={"contract"}, error_model="numpy")

    @compiled
    def widened(bits: Any) -> Any:
        # bfloat16 is the upper half of float32.
        return np.uint32(np.uint32(bits) << np.uint32(16)).view(np.float32)

    def update(shadows: Any, sources: Any, lengths: Any, weight: Any) -> None:
        # `torch.lerp` starts from the end that is nearer, so that a weight near one loses no digits.
        near = abs(weight) < np.float32(0.5)
        rest = weight - np.float32(1.0)
        for index in range(len(lengths)):
            shadow = numba.carray(pointer(shadows[index]), (lengths[index],), np.float32)
            source = numba.carray(pointer(sources[index]), (lengths[index],), np.uint16)
            if near:
                for i in range(lengths[index]):
                    shadow[i] = shadow[i] + weight * (widened(source[i]) - shadow[i])
            else:
                for i in range(lengths[index]):
                    value = widened(source[i])
                    shadow[i] = value + rest * (value - shadow[i])

    rows = types.int64[::1]
    return cast(Kernel, compiled(types.void(rows, rows, rows, types.float32))(update))
