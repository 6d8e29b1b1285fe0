"""Augmentation belongs to items: the same at every batch, and begun at a position, not at a step."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hf_ema_scaling.data.speech import SpecAugment
from hf_ema_scaling.training.augment import SEEDS_PER_RUN, augment


def test_rows_before_the_start_are_left_alone_and_seeds_are_positions() -> None:
    seen: list[list[int]] = []

    def double(features: Tensor, lengths: Tensor, seeds: list[int]) -> Tensor:
        seen.append(seeds)
        assert lengths.tolist() == [2, 3]
        return 2 * features

    features = torch.ones(3, 3, 2)
    mask = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 1, 1]])
    result = augment(double, {"input_features": features, "attention_mask": mask}, [7, 8, 9], 8, seed=3)
    assert seen == [[3 * SEEDS_PER_RUN + 8, 3 * SEEDS_PER_RUN + 9]]
    assert result["input_features"][:, 0, 0].tolist() == [1.0, 2.0, 2.0]
    assert features.eq(1).all()


def test_a_row_is_masked_alike_alone_and_among_others() -> None:
    rows = torch.randn(4, 60, 20)
    mask = torch.ones(4, 60, dtype=torch.long)
    together = augment(SpecAugment(), {"input_features": rows, "attention_mask": mask}, [0, 1, 2, 3], 0, seed=1)
    for row in range(4):
        single = {"input_features": rows[row : row + 1], "attention_mask": mask[row : row + 1]}
        alone = augment(SpecAugment(), single, [row], 0, seed=1)
        assert torch.equal(alone["input_features"][0], together["input_features"][row])
    assert not torch.equal(together["input_features"], rows)


def test_inputs_without_features_are_refused() -> None:
    with pytest.raises(ValueError, match="input_features"):
        augment(SpecAugment(), {"input_values": torch.ones(1, 4)}, [0], 0, seed=0)


def test_another_run_seed_masks_otherwise() -> None:
    rows = torch.ones(8, 100, 40)
    first, second = (augment(SpecAugment(), {"input_features": rows}, list(range(8)), 0, seed) for seed in (0, 1))
    assert not any(torch.equal(a, b) for a, b in zip(first["input_features"], second["input_features"], strict=True))
