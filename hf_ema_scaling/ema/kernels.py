"""In-place arithmetic over flat lists of tensors: the only place where the average's values are computed."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from hf_ema_scaling.ema import compiled
from hf_ema_scaling.ema.names import local_shard
from hf_ema_scaling.ema.sharding import over_shards

SCRATCH_ELEMENTS = {"cpu": 1 << 20}
"""Elements cast at once where dtypes differ. 4 MB of float32 stay in a CPU's cache: a smaller scratch costs calls, a
larger one a second trip to memory. Other devices pay by launch, so there it is larger (not run on a GPU)."""
_OTHER_SCRATCH_ELEMENTS = 1 << 24
_ALIGNMENT = 16
"""Elements: where a tensor begins in a scratch, so that vector instructions stay aligned."""


class Scratch:
    """One flat buffer for each (device, dtype), allocated once and used by every cast of every update."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    @staticmethod
    def elements(device: torch.device) -> int:
        """Size of a buffer on this device."""
        return SCRATCH_ELEMENTS.get(device.type, _OTHER_SCRATCH_ELEMENTS)

    def buffer(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        """The buffer, `(elements,)`; its content is anybody's."""
        if (device, dtype) not in self._buffers:
            self._buffers[device, dtype] = torch.empty(self.elements(device), device=device, dtype=dtype)
        return self._buffers[device, dtype]


class _Round(NamedTuple):
    """Pieces of shadow and source that fit into the scratch together, and the views of it that they pass through."""

    shadow: list[Tensor]
    source: list[Tensor]
    cast: list[Tensor]


class Pairs:
    """Shadow tensors paired with their sources, laid out once for updates that allocate nothing and wait for nothing.

    Where dtypes agree, an update is one multi-tensor call, which on a CPU is a loop without Python in it and runs at
    the speed of memory. Where they differ (float32 shadow, bfloat16 source) sources are cast through one scratch:
    small tensors share it, large ones pass piece by piece, so that the cast is still in the cache when it is used and
    no temporary grows with the model. With `numba` a CPU needs neither calls nor casts (`ema.compiled`); not a bit of
    the result depends on that.

    Args:
        shadow: Tensors of one device and dtype to update, which keep their storage; their dtype is that of the
            arithmetic and of the result.
        source: As many tensors of the same shapes on the same device, of one dtype; kept, so that what they hold at
            the time of an update counts. With `.data =` they would be others: `Binding.holds_for` looks for it.
        scratch: Shared with other pairs of the same average.

    Raises:
        ValueError: The lists differ in length.
    """

    def __init__(self, shadow: Sequence[Tensor], source: Sequence[Tensor], scratch: Scratch | None = None) -> None:
        if len(shadow) != len(source):
            raise ValueError(f"Got {len(shadow)} shadow tensors for {len(source)} source tensors.")
        self.shadow, self.source = list(shadow), list(source)
        self._scratch = scratch or Scratch()
        self._mixed = any(s.dtype != p.dtype for s, p in zip(shadow, source, strict=True))
        self._rounds: list[_Round] | None = None
        self._copied: list[tuple[int, int, int]] | None = None
        self._loop: compiled.Loop | None = None
        self._looked = False

    def __getstate__(self) -> dict[str, Any]:
        # Pieces and addresses are this process's.
        return vars(self) | {"_rounds": None, "_loop": None, "_looked": False}

    def lerp_(self, weight: float, *, away: bool = False) -> None:
        """Moves every shadow tensor towards its source in place: `s <- s + weight * (p - s)`.

        This is the EMA update `s <- rho * s + (1 - rho) * p` of "How to Scale Your EMA" (arXiv 2307.13813, eq. 1)
        written with `weight = 1 - rho`, which does not lose the digits of a momentum close to one.

        Args:
            weight: Between 0 (the shadow keeps its bits) and 1 (the shadow becomes exactly the source).
            away: Allows finite weights below 0, which move the shadow away from the source.

        Raises:
            ValueError: `weight` is outside [0, 1] or not a number.
        """
        if not (0.0 <= weight <= 1.0 or (away and -math.inf < weight < 0.0)):
            raise ValueError(f"The weight of an update must be between 0 and 1, got {weight!r}.")
        # Both ends are exact by definition; the formula would turn -0.0 into 0.0 and overflow into NaN.
        if weight == 0.0 or not self.shadow:
            return
        if weight == 1.0:
            self.copy_()
        elif (loop := self._compiled()) is not None:
            loop.lerp_(weight)
        elif not self._mixed:
            torch._foreach_lerp_(self.shadow, self.source, weight)
        else:
            for shadow, source, cast in self._laid_out():
                torch._foreach_copy_(cast, source)
                torch._foreach_lerp_(shadow, cast, weight)

    def copy_(self) -> None:
        """Copies every source into its shadow in place: bit for bit for equal dtypes, otherwise with one cast."""
        if self.shadow:
            torch._foreach_copy_(self.shadow, self.source)

    def copy_changed_(self) -> None:
        """As `copy_`, but nothing if neither side was written to since this last copied.

        PyTorch counts writes; those through `.data` of a source, which it does not count, are seen only if they put
        other storage in its place.
        """
        if self._copied is None or self._copied != self._versions():
            self.copy_()
            self._copied = self._versions()

    def _versions(self) -> list[tuple[int, int, int]]:
        return [(s._version, p._version, p.data_ptr()) for s, p in zip(self.shadow, self.source, strict=True)]

    def _compiled(self) -> compiled.Loop | None:
        if not self._looked or (self._loop is not None and not self._loop.holds()):
            self._looked, self._loop = True, None
            if compiled.suits(self.shadow, self.source):
                self._loop = compiled.Loop(self.shadow, self.source)
        return self._loop

    def _laid_out(self) -> list[_Round]:
        if self._rounds is None:
            self._rounds = self._lay_out()
        return self._rounds

    def _lay_out(self) -> list[_Round]:
        buffer = self._scratch.buffer(self.shadow[0].device, self.shadow[0].dtype)
        limit, used = buffer.numel(), buffer.numel()
        rounds: list[_Round] = []
        for whole_shadow, whole_source in zip(self.shadow, self.source, strict=True):
            for shadow, source in _pieces(whole_shadow, whole_source, limit):
                if used + shadow.numel() > limit:
                    rounds.append(_Round([], [], []))
                    used = 0
                rounds[-1].shadow.append(shadow)
                rounds[-1].source.append(source)
                rounds[-1].cast.append(_in_layout_of(shadow, buffer[used : used + shadow.numel()]))
                used += -(-shadow.numel() // _ALIGNMENT) * _ALIGNMENT
        return rounds


def _pieces(shadow: Tensor, source: Tensor, limit: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Cuts a pair into views of at most `limit` elements, one-dimensional where both lie in memory alike."""
    if shadow.numel() <= limit:
        yield shadow, source
        return
    order = _memory_order(shadow)
    ordered = shadow.permute(order), source.permute(order)
    if all(tensor.is_contiguous() for tensor in ordered):
        yield from zip(*(tensor.view(-1).split(limit) for tensor in ordered), strict=True)
        return
    longest = max(range(shadow.dim()), key=lambda dim: shadow.shape[dim])
    for part, part_of_source in zip(shadow.chunk(2, longest), source.chunk(2, longest), strict=True):
        yield from _pieces(part, part_of_source, limit)


def _memory_order(tensor: Tensor) -> list[int]:
    return sorted(range(tensor.dim()), key=lambda dim: tensor.stride(dim), reverse=True)


def _in_layout_of(tensor: Tensor, flat: Tensor) -> Tensor:
    """`flat` in the shape of `tensor`, with its dimensions in the same order in memory."""
    order = _memory_order(tensor)
    back = sorted(range(tensor.dim()), key=lambda dim: order[dim])
    return flat.view([tensor.shape[dim] for dim in order]).permute(back)


def relative_distance(shadow: Sequence[Tensor], source: Sequence[Tensor]) -> float:
    """Returns `||source - shadow|| / ||source||` over all tensors together, with one host synchronisation.

    Norms of single tensors, or of this process's shards, are taken in the shadow's dtype and combined in float64.

    Args:
        shadow: Floating-point tensors, at least one; DTensors count with all their shards (one reduction for all).
        source: Tensors of the same shapes, of any floating dtype.

    Returns:
        The ratio; for a source of zeros 0.0 if the shadow is zero too, else infinity.
    """
    norms: list[Tensor] = []
    for s, p in zip(map(local_shard, shadow), map(local_shard, source), strict=True):
        cast = p.to(s.device, s.dtype)
        for norm in (torch.linalg.vector_norm(cast - s), torch.linalg.vector_norm(cast)):
            norms.append(norm.to(shadow[0].device))
    values = torch.stack(norms)
    if any(isinstance(s, DTensor) for s in shadow):
        values = over_shards(values.double().square(), [s for s in shadow for _ in range(2)]).sqrt()
    values = values.cpu().double()
    difference, total = float(values[0::2].norm()), float(values[1::2].norm())
    if total == 0.0:
        return 0.0 if difference == 0.0 else float("inf")
    return difference / total


def bit_sums(tensors: Sequence[Tensor]) -> tuple[int, ...]:
    """Returns the sum of the bit patterns of each float32 or float64 tensor, with one host synchronisation."""
    sums: list[Tensor] = []
    for tensor in tensors:
        bits = torch.int64 if tensor.dtype == torch.float64 else torch.int32
        sums.append(tensor.contiguous().view(bits).sum(dtype=torch.int64).to(tensors[0].device))
    return tuple(torch.stack(sums).tolist())
