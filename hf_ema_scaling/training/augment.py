"""Augmentation of the student's input, the same for an item at every batch size."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Augmentation = Callable[[Tensor, Tensor, list[int]], Tensor]
"""`(features (rows, frames, bins), lengths (rows,), seed of each row) -> features`, see `SpecAugment`."""

# Seeds of one run do not meet those of another as long as a run draws fewer items than this.
SEEDS_PER_RUN = 2**40


def augment(
    augmentation: Augmentation, inputs: dict[str, Any], positions: list[int], begun: int, seed: int
) -> dict[str, Any]:
    """The inputs with `input_features` augmented, in the rows that lie at or past stream position `begun`.

    Args:
        augmentation: what changes the features.
        inputs: padded inputs of a micro-batch; left as they are.
        positions: place of each row in the reference stream, which seeds its augmentation.
        begun: first position to be augmented.
        seed: of the run.

    Raises:
        ValueError: when the inputs have no `input_features`.
    """
    features = inputs.get("input_features")
    if features is None:
        raise ValueError("augmentation changes 'input_features', which this model's inputs do not have")
    late = [row for row, position in enumerate(positions) if position >= begun]
    if not late:
        return inputs
    mask = inputs.get("attention_mask")
    lengths = torch.full((len(features),), features.shape[1]) if mask is None else mask.sum(-1)
    changed = features.clone()
    changed[late] = augmentation(
        features[late], lengths[late], [seed * SEEDS_PER_RUN + positions[row] for row in late]
    )
    return {**inputs, "input_features": changed}
