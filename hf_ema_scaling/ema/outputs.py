"""The floating-point tensors in what a model returns, and how far two such outputs are apart."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor


def floats(output: Any) -> Iterator[Tensor]:
    """Copies of the floating-point tensors of an output, in order; caches and other objects are passed over."""
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield output.detach().clone()
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from floats(value)
    elif isinstance(output, Sequence) and not isinstance(output, str):
        for value in output:
            yield from floats(value)


def same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors hold the same values; NaN equals NaN, so an output of nothing else does not count as new."""
    return a.shape == b.shape and bool(((a == b) | (a.isnan() & b.isnan())).all())


def apart(expected: Tensor, found: Tensor) -> float:
    """`||found - expected|| / ||expected||` in float64; infinite for other shapes, or a size of 0 that is left.

    Entries that are equal count as equal also where they are infinite or NaN.
    """
    if expected.shape != found.shape:
        return math.inf
    a, b = expected.double(), found.double()
    equal = (a == b) | (a.isnan() & b.isnan())
    if bool(equal.all()):
        return 0.0
    gap = float((b - a).masked_fill(equal, 0.0).norm())
    size = float(a.masked_fill(equal & ~a.isfinite(), 0.0).norm())
    return gap / size if size else math.inf


def difference(expected: Any, found: Any) -> float:
    """The largest `apart` over the floating-point tensors that two outputs of one model share.

    Args:
        expected: What one copy of the model returned.
        found: What another did. Entries by name that only one of them has do not count: whether hidden states or a
            cache are returned is a matter of configuration.

    Returns:
        The distance; infinite where they share no tensor, or are of different kinds.
    """
    found_any = False
    largest = 0.0
    for a, b in _pairs(expected, found):
        found_any = True
        distance = math.inf if a is None or b is None else apart(a, b)
        if not distance <= largest:  # also for NaN
            largest = distance
        if math.isnan(largest):
            break
    return largest if found_any else math.inf


def _pairs(a: Any, b: Any) -> Iterator[tuple[Tensor | None, Tensor | None]]:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        if a.is_floating_point() or b.is_floating_point():
            yield a.detach(), b.detach()
    elif isinstance(a, Mapping) and isinstance(b, Mapping):
        for name in a:
            if name in b:
                yield from _pairs(a[name], b[name])
    elif _is_sequence(a) and _is_sequence(b):
        # A cache at the end of a tuple is there or not.
        for one, other in zip(a, b, strict=False):
            yield from _pairs(one, other)
    elif isinstance(a, Tensor) or isinstance(b, Tensor):
        yield None, None


def _is_sequence(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)
