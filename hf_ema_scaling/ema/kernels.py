"""In-place arithmetic over flat lists of tensors: the only place where the average's values are computed."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from hf_ema_scaling.ema.names import local_shard
from hf_ema_scaling.ema.sharding import over_shards

_SCRATCH_ELEMENTS = 1 << 24
"""Upper bound on the elements cast at once when dtypes differ, so the temporary never grows with the model."""


def lerp_(shadow: Sequence[Tensor], source: Sequence[Tensor], weight: float, *, away: bool = False) -> None:
    """Moves every shadow tensor towards its source in place: `s <- s + weight * (p - s)`.

    This is the EMA update `s <- rho * s + (1 - rho) * p` of "How to Scale Your EMA" (arXiv 2307.13813, eq. 1) written
    with `weight = 1 - rho`, which does not lose the digits of a momentum close to one.

    Args:
        shadow: Tensors to update; their dtype is the dtype of the arithmetic and of the result.
        source: Tensors of the same shapes and devices. Where the dtype differs they are cast to the shadow's dtype,
            in bounded chunks, so a half-precision source never rounds the shadow.
        weight: Between 0 (the shadow keeps its bits) and 1 (the shadow becomes exactly the source).
        away: Allows finite weights below 0, which move the shadow away from the source.

    Raises:
        ValueError: The lists differ in length, or `weight` is outside [0, 1] or not a number.
    """
    _check_lengths(shadow, source)
    if not (0.0 <= weight <= 1.0 or (away and -math.inf < weight < 0.0)):
        raise ValueError(f"The weight of an update must be between 0 and 1, got {weight!r}.")
    # Both ends are exact by definition; the formula would turn -0.0 into 0.0 and overflow into NaN.
    if weight == 0.0 or not shadow:
        return
    if weight == 1.0:
        copy_(shadow, source)
        return
    same = [i for i, (s, p) in enumerate(zip(shadow, source, strict=True)) if s.dtype == p.dtype]
    if same:
        torch._foreach_lerp_([shadow[i] for i in same], [source[i] for i in same], weight)
    if len(same) == len(shadow):
        return
    mixed = [(s, p) for s, p in zip(shadow, source, strict=True) if s.dtype != p.dtype]
    for chunk in _chunks(mixed):
        torch._foreach_lerp_([s for s, _ in chunk], [p.to(s.dtype) for s, p in chunk], weight)


def copy_(shadow: Sequence[Tensor], source: Sequence[Tensor]) -> None:
    """Copies every source into its shadow in place: bit for bit for equal dtypes, otherwise with one cast.

    Args:
        shadow: Tensors to overwrite.
        source: Tensors of the same shapes, of any dtype.

    Raises:
        ValueError: The lists differ in length.
    """
    _check_lengths(shadow, source)
    if shadow:
        torch._foreach_copy_(list(shadow), list(source))


def relative_distance(shadow: Sequence[Tensor], source: Sequence[Tensor]) -> float:
    """Returns `||source - shadow|| / ||source||` over all tensors together, with one host synchronisation.

    Norms of single tensors, or of this process's shards, are taken in the shadow's dtype and combined in float64.

    Args:
        shadow: Floating-point tensors, at least one; DTensors count with all their shards (one reduction for all).
        source: Tensors of the same shapes, of any floating dtype.

    Returns:
        The ratio; for a source of zeros 0.0 if the shadow is zero too, else infinity.
    """
    _check_lengths(shadow, source)
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


def _check_lengths(shadow: Sequence[Tensor], source: Sequence[Tensor]) -> None:
    if len(shadow) != len(source):
        raise ValueError(f"Got {len(shadow)} shadow tensors for {len(source)} source tensors.")


def _chunks(pairs: Sequence[tuple[Tensor, Tensor]]) -> Iterator[list[tuple[Tensor, Tensor]]]:
    chunk: list[tuple[Tensor, Tensor]] = []
    elements = 0
    for pair in pairs:
        chunk.append(pair)
        elements += pair[0].numel()
        if elements >= _SCRATCH_ELEMENTS:
            yield chunk
            chunk, elements = [], 0
    if chunk:
        yield chunk
