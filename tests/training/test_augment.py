"""Augmentation belongs to items: the same at every batch, and begun at a position, not at a step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest
import torch
from torch import Tensor

from hf_ema_scaling.data.speech import SpecAugment
from hf_ema_scaling.training.augment import SEEDS_PER_RUN, augment


def test_rows_before_the_start_are_left_alone_and_seeds_are_positions() -> None:
    seen: list[list[int]] = []

    def double(inputs: Mapping[str, Tensor], seeds: Sequence[int]) -> dict[str, Tensor]:
        seen.append(list(seeds))
        assert inputs["attention_mask"].tolist() == [[1, 1, 0], [1, 1, 1]]
        return {"input_features": 2 * inputs["input_features"]}

    features = torch.ones(3, 3, 2)
    mask = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 1, 1]])
    result = augment(double, {"input_features": features, "attention_mask": mask}, [7, 8, 9], 8, seed=3)
    assert seen == [[3 * SEEDS_PER_RUN + 8, 3 * SEEDS_PER_RUN + 9]]
    assert result["input_features"][:, 0, 0].tolist() == [1.0, 2.0, 2.0]
    assert features.eq(1).all()
    assert augment(double, result, [0, 1, 2], 3, seed=3) is result and len(seen) == 1


def test_spec_augment_has_the_lengths_and_the_seeds_of_its_rows() -> None:
    features, mask = torch.randn(3, 60, 20), torch.ones(3, 60, dtype=torch.long)
    mask[1, 40:] = 0
    inputs = {"input_features": features, "attention_mask": mask}
    result = augment(SpecAugment(), inputs, [5, 6, 7], 6, seed=2)
    expected = SpecAugment().masked(features[1:], [40, 60], [2 * SEEDS_PER_RUN + 6, 2 * SEEDS_PER_RUN + 7])
    assert torch.equal(result["input_features"], torch.cat([features[:1], expected]))
    assert torch.equal(result["attention_mask"], mask)
    whole = augment(SpecAugment(), {"input_features": features}, [5, 6, 7], 8, seed=2)
    assert torch.equal(whole["input_features"], features)


def test_rows_may_become_longer_or_shorter_beside_others() -> None:
    def stretched(inputs: Mapping[str, Tensor], seeds: Sequence[int]) -> dict[str, Tensor]:
        values = inputs["input_values"].repeat_interleave(2, dim=1)
        return {"input_values": values, "attention_mask": torch.ones_like(values).long()}

    def cut(inputs: Mapping[str, Tensor], seeds: Sequence[int]) -> dict[str, Tensor]:
        return {name: value[:, :1] for name, value in inputs.items()}

    inputs = {"input_values": torch.tensor([[1.0, 2.0], [3.0, 4.0]]), "attention_mask": torch.ones(2, 2).long()}
    longer = augment(stretched, inputs, [0, 1], 1, seed=0)
    assert longer["input_values"].tolist() == [[1, 2, 0, 0], [3, 3, 4, 4]]
    assert longer["attention_mask"].tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]
    shorter = augment(cut, inputs, [1, 0], 1, seed=0)
    assert shorter["input_values"].tolist() == [[1, 0], [3, 4]]
    assert shorter["attention_mask"].tolist() == [[1, 0], [1, 1]]
    assert augment(stretched, inputs, [1, 2], 1, seed=0)["input_values"].shape == (2, 4)


def test_an_augmentation_may_not_change_the_rows_number_or_add_inputs() -> None:
    inputs = {"input_values": torch.ones(2, 4)}
    with pytest.raises(ValueError, match="'input_values' with 1 rows"):
        augment(lambda inputs, seeds: {"input_values": torch.ones(1, 4)}, inputs, [0, 1], 0, seed=0)
    with pytest.raises(ValueError, match="'labels' with 2 rows"):
        augment(lambda inputs, seeds: {"labels": torch.ones(2)}, inputs, [0, 1], 0, seed=0)


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
