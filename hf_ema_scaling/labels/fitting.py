"""Limits of filters from labelled data, so that nobody has to know how fast people speak in it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

LEAST_ROWS = 20
"""Quantiles of fewer labels say nothing about what is unusual."""


def fit_filters(
    texts: Sequence[str] | None,
    *,
    seconds: Sequence[float] | None = None,
    tokens: Sequence[int] | None = None,
    source_tokens: Sequence[int] | None = None,
    tail: float = 0.005,
    margin: float = 1.5,
) -> dict[str, dict[str, float]]:
    """Arguments for the filters `rate` and `length_ratio` that keep what is usual in labelled data.

    Limits are the quantiles `tail` and `1 - tail` of characters and words per second, and of label tokens per input
    token, divided and multiplied by `margin`.

    Args:
        texts: gold texts; with `seconds`, for `rate`.
        seconds: durations; rows that last 0 seconds are left out.
        tokens: lengths of gold labels; with `source_tokens`, for `length_ratio`.
        source_tokens: lengths of inputs; empty ones are left out.
        tail: share of gold labels beyond each limit, before the margin.
        margin: at least 1.

    Returns:
        Filters as `build_filters` takes them; without those that nothing is given for.

    Raises:
        ValueError: for fewer than `LEAST_ROWS` usable rows, lists of different lengths, or a margin below 1.
    """
    if margin < 1:
        raise ValueError(f"margin must be at least 1, got {margin}")
    limits: dict[str, dict[str, float]] = {}
    if texts is not None and seconds is not None:
        characters = [len(text.strip()) for text in texts]
        words = [len(text.split()) for text in texts]
        for name, counts in (("characters", characters), ("words", words)):
            low, high = _limits(counts, seconds, tail, margin)
            limits.setdefault("rate", {}).update({f"min_{name}": low, f"max_{name}": high})
    if tokens is not None and source_tokens is not None:
        low, high = _limits(tokens, source_tokens, tail, margin)
        limits["length_ratio"] = {"minimum": low, "maximum": high}
    return limits


def _limits(counts: Sequence[int], sizes: Sequence[float], tail: float, margin: float) -> tuple[float, float]:
    if len(counts) != len(sizes):
        raise ValueError(f"{len(counts)} labels, but {len(sizes)} durations or inputs: give one for each")
    known = np.asarray(sizes, dtype=np.float64) > 0
    rates = np.asarray(counts, dtype=np.float64)[known] / np.asarray(sizes, dtype=np.float64)[known]
    if len(rates) < LEAST_ROWS:
        raise ValueError(
            f"{len(rates)} labelled rows are too few to fit a filter, which takes {LEAST_ROWS}: write its limits"
        )
    low, high = np.quantile(rates, [tail, 1 - tail])
    return float(low / margin), float(high * margin)
