"""Augmentations in turn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest
import torch
from torch import Tensor

from hf_ema_scaling.data.speech import SpecAugment
from hf_ema_scaling.data.views import Chain, changes_length


def noise(inputs: Mapping[str, Tensor], seeds: Sequence[int]) -> dict[str, Tensor]:
    values = inputs["input_features"]
    draws = [torch.randn(values.shape[1:], generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return {"input_features": values + torch.stack(draws)}


def test_a_chain_applies_all_in_order_and_the_first_as_if_alone() -> None:
    inputs = {"input_features": torch.ones(2, 30, 16), "attention_mask": torch.ones(2, 30).long()}
    alone = SpecAugment()(inputs, [3, 4])["input_features"]
    assert torch.equal(Chain(SpecAugment())(inputs, [3, 4])["input_features"], alone)
    both = Chain(SpecAugment(), noise)(inputs, [3, 4])
    assert torch.equal(both["attention_mask"], inputs["attention_mask"])
    added = both["input_features"] - alone
    assert float(added.std()) == pytest.approx(1.0, abs=0.1)
    # Noise on top of masks: nothing of the masked zeros is left.
    assert not (both["input_features"] == 0).any() and (alone == 0).any()


def test_links_of_a_chain_draw_numbers_of_their_own() -> None:
    inputs = {"input_features": torch.zeros(2, 200)}
    twice = Chain(noise, noise)(inputs, [1, 2])["input_features"]
    once = noise(inputs, [1, 2])["input_features"]
    correlation = torch.corrcoef(torch.stack([once[0], twice[0] - once[0]]))[0, 1]
    assert abs(float(correlation)) < 0.2


def test_a_chain_changes_length_where_one_of_it_does() -> None:
    def dropping(inputs: Mapping[str, Tensor], seeds: Sequence[int]) -> Mapping[str, Tensor]:
        return inputs

    dropping.changes_length = True  # type: ignore[attr-defined]
    assert not changes_length(noise) and not changes_length(Chain(noise, SpecAugment()))
    assert changes_length(dropping) and changes_length(Chain(noise, dropping))
    with pytest.raises(ValueError, match="needs an augmentation"):
        Chain()
