"""The update of a float32 average on a CPU as one compiled loop over all tensors (optional, needs `numba`).

PyTorch starts its threads anew for every tensor, which takes microseconds, and has no operation that reads bfloat16
and moves float32: it casts into a scratch first. Here the addresses of all tensors are laid out once, PyTorch's own
threads take pieces of them, and bfloat16 is widened in a register. The arithmetic is that of `torch.lerp`, with the
same fused multiply-add: what comes out has the same bits.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import os
from collections.abc import Callable, Sequence
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from hf_ema_scaling.ema.compiled_kernel import NEXT, WEIGHT, kernel

MIN_ELEMENTS = 1 << 20
"""Elements from which a compiled update is worth the second that compiling it takes."""
PIECE_ELEMENTS = 1 << 18
"""Elements that a thread takes at once: short beside an update, so that threads end together whatever else runs."""

_DTYPES = (torch.float32, torch.bfloat16)
_PROCESS = os.getpid()

_address = Tensor.data_ptr


@functools.cache
def available() -> bool:
    """Whether `numba` can be imported, which is tried the first time that this is asked, and PyTorch runs OpenMP.

    Not where `NUMBA_DISABLE_JIT` is set: what numba runs in the interpreter then cannot write to addresses.
    """
    try:
        numba = importlib.import_module("numba")
    except ImportError:
        return False
    return not numba.config.DISABLE_JIT and _openmp() is not None


def suits(shadow: Sequence[Tensor], source: Sequence[Tensor]) -> bool:
    """Whether `Loop` is to update these: many plain dense float32 elements on a CPU, and sources laid out alike.

    Args:
        shadow: Tensors to update.
        source: As many others, all float32 or all bfloat16.
    """
    return (
        sum(map(Tensor.numel, shadow)) >= MIN_ELEMENTS
        and all(_plain(tensor, torch.float32) for tensor in shadow)
        and source[0].dtype in _DTYPES
        and all(_plain(tensor, source[0].dtype) for tensor in source)
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

    It writes to addresses, and keeps the storage that they were taken from alive. PyTorch may give a storage other
    memory all the same and free the old: `holds` tells for the shadow, which has to be asked before every update. That
    the sources lie where they did is for the caller to know (`Binding.holds_for`).

    Args:
        shadow: Tensors to update that `suits` accepts, with
        source: theirs.
    """

    def __init__(self, shadow: Sequence[Tensor], source: Sequence[Tensor]) -> None:
        self._shadow = list(shadow)
        self._storages = [tensor.untyped_storage() for tensor in (*shadow, *source)]
        self._places = list(map(_address, self._shadow))
        self._table = _lay_out(shadow, source)
        self._weight = self._table[WEIGHT : WEIGHT + 1].view(np.float32)
        self._kernel = kernel(source[0].dtype)
        self._run = cast(Callable[..., None], _openmp())

    def holds(self) -> bool:
        """Whether the shadow lies where it did: sent to another process a tensor moves to shared memory, in place."""
        return list(map(_address, self._shadow)) == self._places

    def lerp_(self, weight: float) -> None:
        """`s <- s + weight * (p - s)` for every pair, in place, on as many threads as PyTorch has.

        In a process that was forked it is one: OpenMP would wait for ever for threads that the parent had.
        """
        threads = torch.get_num_threads() if os.getpid() == _PROCESS else 1
        self._table[NEXT] = 0
        self._weight[0] = weight
        self._run(self._kernel.address, self._table.ctypes.data, threads, 0)
        # PyTorch does not see what is written here, and those who ask whether a tensor was written to ask it.
        torch.autograd.graph.increment_version(self._shadow)


def _lay_out(shadow: Sequence[Tensor], source: Sequence[Tensor]) -> NDArray[np.int64]:
    """Cuts all elements, taken as one line, into pieces, and these into rows that lie in one tensor each.

    Returns:
        The table that `compiled_kernel.HEADER` tells of.
    """
    sizes = np.array([tensor.numel() for tensor in shadow], dtype=np.int64)
    total = int(sizes.sum())
    starts = np.cumsum(sizes) - sizes
    pieces = np.arange(0, total, PIECE_ELEMENTS, dtype=np.int64)
    cuts = np.unique(np.concatenate([starts[sizes > 0], pieces]))
    owner = np.searchsorted(starts, cuts, side="right") - 1
    offset = cuts - starts[owner]
    addresses = (
        np.array(list(map(_address, tensors)), dtype=np.int64)[owner] + offset * tensors[0].element_size()
        for tensors in (shadow, source)
    )
    rows = np.stack([*addresses, np.diff(cuts, append=total)], axis=1)
    header = [0, len(pieces), len(rows), 0]
    return np.concatenate([header, np.searchsorted(cuts, pieces), [len(rows)], rows.ravel()])


@functools.cache
def _openmp() -> Callable[..., None] | None:
    """Runs a function on the threads that PyTorch's own loops run on, or None where they are not OpenMP's.

    Threads of another pool would share the processors with these, which spin a while after each loop of PyTorch.
    """
    try:
        # The entry point that compilers call, by GNU's name, which others have too.
        run = ctypes.CDLL(None).GOMP_parallel
    except (AttributeError, OSError, TypeError):
        return None
    run.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    run.restype = None
    return cast(Callable[..., None], run)
