"""Runs over several processes against the same run on one: that they agree, and how far apart they were at most."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import tiny
from torch import Tensor

TOLERANCE = 3e-5
"""Relative, in the norm over all parameters: float32 sums in another order, and a few steps of their consequences."""

LARGEST: dict[str, float] = {}
"""The largest differences of the test that runs, which `distributed/conftest.py` prints at the end."""


def agree(kind: str, one: Mapping[str, Tensor], two: Mapping[str, Tensor]) -> None:
    """Asserts that two sets of tensors by name are equal within the tolerance, and notes how far apart they are."""
    distance = tiny.difference(one, two)
    LARGEST[kind] = max(LARGEST.get(kind, 0.0), distance)
    assert distance < TOLERANCE, kind


def close(
    found: Mapping[str, Any],
    alone: Any,
    kinds: tuple[str, ...] = ("gradients", "weights", "averages"),
    counts: Callable[[str], bool] = lambda name: True,
) -> None:
    """Asserts that gradients, weights and averages agree after every step, of the tensors whose name counts.

    Args:
        found: what a process of several saw.
        alone: the trainer of the run on one process.
        kinds: what is compared.
        counts: says by name what is looked at.
    """
    for kind in kinds:
        expected = getattr(alone.recorder, kind)
        assert len(found[kind]) == len(expected) > 0
        for one, two in zip(expected, found[kind], strict=True):
            assert one.keys() == two.keys()
            names = [name for name in one if counts(name)]
            agree(kind, {name: one[name] for name in names}, {name: two[name] for name in names})
