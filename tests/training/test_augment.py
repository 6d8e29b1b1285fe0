"""Augmentation belongs to items: the same at every batch, and begun at a position, not at a step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import arguments, at_fixed_weights, difference, parakeet, speech, wav2vec2
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from hf_ema_scaling.data.speech import SpecAugment
from hf_ema_scaling.data.speech_views import SpeedPerturbation
from hf_ema_scaling.data.text_views import TokenMasking, WordDropout
from hf_ema_scaling.labels import ctc_frame_lengths
from hf_ema_scaling.training.augment import SEEDS_PER_RUN, augment, keep_fitting, refuse_augmentation


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


def test_rows_whose_label_no_longer_fits_go_back() -> None:
    model = parakeet()  # a frame for each 4 feature frames
    clean = {"input_features": torch.randn(4, 80, 8), "attention_mask": torch.ones(4, 80, dtype=torch.long)}
    clean["attention_mask"][3, 8:] = 0
    faster = {**clean, **SpeedPerturbation([2.0])(clean, [0, 1, 2, 3])}
    frames = ctc_frame_lengths(model, faster).tolist()
    assert frames == [10, 10, 10, 1] and ctc_frame_lengths(model, clean).tolist() == [20, 20, 20, 2]
    # 10 tokens fit 10 frames; a repeat among them needs one more; nothing needs one frame.
    labels = torch.full((4, 11), -100)
    labels[0, :10] = torch.arange(10) % 2 + 1
    labels[1, :10] = torch.tensor([1, 1, 2, 3, 2, 3, 2, 3, 2, 3])
    kept = keep_fitting(model, clean, faster, labels)
    assert kept["attention_mask"].sum(-1).tolist() == [40, 80, 40, 4]
    assert torch.equal(kept["input_features"][1], clean["input_features"][1])
    for row in (0, 2, 3):
        assert torch.equal(kept["input_features"][row, :40], faster["input_features"][row])
        assert not kept["input_features"][row, 40:].any()
    assert keep_fitting(model, clean, clean, labels) is clean
    short = labels[:, :1].clone().fill_(1)
    assert keep_fitting(model, clean, faster, short) is faster


def test_a_step_of_faster_speech_never_has_an_infinite_loss(tmp_path: Path) -> None:
    data = speech(8, seed=3, lengths=(6, 8))
    # As many tokens as there are frames: nothing fits at double speed.
    long = [list(np.arange(6) % 2 + 1)] * 8
    data = data.remove_columns("labels").add_column("labels", long)
    gradients = []
    for number, augmentation in enumerate((None, SpeedPerturbation([2.0]), SpeedPerturbation([0.5]))):
        made = at_fixed_weights(
            wav2vec2(), arguments(tmp_path / str(number), max_steps=1), data, augmentation=augmentation
        )
        gradients.append(made.recorder.gradients[0])
    assert all(torch.isfinite(gradient).all() for gradient in gradients[1].values())
    assert difference(gradients[0], gradients[1]) == 0.0
    assert difference(gradients[0], gradients[2]) > 0.1


def test_views_that_move_tokens_are_refused_for_causal_language_models() -> None:
    model = GPT2LMHeadModel(GPT2Config(vocab_size=8, n_embd=4, n_layer=1, n_head=1, n_positions=8))
    with pytest.raises(
        ValueError, match="WordDropout drops or moves tokens, and the labels of GPT2LMHeadModel are by"
    ):
        refuse_augmentation(WordDropout(0.5, pad_id=0), model)
    refuse_augmentation(TokenMasking(0.5, mask_id=1, special_ids=[0]), model)
