"""Views by name: what a recipe writes is the view itself, and what is not known is refused with what is."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import tiny_whisper
import torch
from transformers import Wav2Vec2FeatureExtractor

from hf_ema_scaling.data.named_views import FixedView, build_views, read_second_view, read_views
from hf_ema_scaling.data.speech import SpecAugment, build_character_processor
from hf_ema_scaling.data.speech_views import AdditiveNoise, SpeedPerturbation
from hf_ema_scaling.data.text_views import TokenMasking, WordDropout
from hf_ema_scaling.data.views import Chain

MEL = build_character_processor("ab", num_mel_bins=8)
TOKENIZER = SimpleNamespace(
    mask_token_id=4, pad_token_id=0, all_special_ids=[0, 2, 3], model_input_names=["input_ids"]
)
TEXT = {"input_ids": torch.arange(5, 35).repeat(3, 1), "attention_mask": torch.ones(3, 30, dtype=torch.long)}


def features(name: str = "input_features") -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape = (3, 60, 8) if name == "input_features" else (3, 600)
    mask = (torch.arange(shape[1])[None] < torch.tensor([shape[1], 50, 40])[:, None]).long()
    return {
        name: torch.randn(shape, generator=generator) * (mask[..., None] if len(shape) == 3 else mask),
        "attention_mask": mask,
    }


@pytest.mark.parametrize(
    ("written", "processing", "view", "inputs"),
    [
        ({"token_masking": {"share": 0.3}}, TOKENIZER, TokenMasking(0.3, 4, [0, 2, 3]), TEXT),
        ({"word_dropout": {"share": 0.3}}, TOKENIZER, WordDropout(0.3, 0, [0, 2, 3]), TEXT),
        ({"speed": {"speeds": [0.8, 1.25]}}, MEL, SpeedPerturbation([0.8, 1.25]), features()),
        ({"noise": {"probability": 1.0, "snr": [3, 9]}}, MEL, AdditiveNoise(1.0, (3.0, 9.0)), features()),
        ({"spec_augment": {"freq_width": 4}}, MEL, SpecAugment(freq_width=4), features()),
        (
            '{"noise": null, "speed": {}}',
            Wav2Vec2FeatureExtractor(),
            Chain(AdditiveNoise(), SpeedPerturbation()),
            features("input_values"),
        ),
        (
            {"spec_augment": {"freq_width": 2, "time_masks": 1}},
            tiny_whisper.extractor(),
            SpecAugment(freq_width=2, num_time_masks=1, bins_first=True),
            {"input_features": torch.rand(3, 4, 200, generator=torch.Generator().manual_seed(1)) + 1},
        ),
    ],
)
def test_a_view_by_name_is_the_view(written: Any, processing: Any, view: Any, inputs: Any) -> None:
    seeds = [5, 6, 7]
    found, expected = build_views(written, processing)(inputs, seeds), view(inputs, seeds)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)
    assert any(not torch.equal(found[name], inputs[name]) for name in found)
    # As a second view it is the same for a row in any batch.
    fixed = FixedView(build_views(written, processing))
    whole, last = fixed(inputs), fixed({name: value[2:] for name, value in inputs.items()})
    for name, value in last.items():
        assert torch.equal(whole[name][2:, : value.shape[1]], value)


@pytest.mark.parametrize(
    ("written", "processing", "message"),
    [
        ("{", MEL, "views='{' is no JSON"),
        ({}, MEL, "views must be a mapping of names of views"),
        (
            {"token_maskin": {}},
            TOKENIZER,
            "no view is called 'token_maskin'; did you mean token_masking[?]; there are token_masking, word_dropout, "
            "speed, noise, spec_augment",
        ),
        ({"noise": {"chance": 1}}, MEL, "the view noise has no argument 'chance'; it takes probability, snr"),
        ({"noise": 3}, MEL, "the arguments of the view noise must be a mapping, got 3"),
        ({"word_dropout": {}}, TOKENIZER, "the view word_dropout needs share"),
        ({"word_dropout": {"share": 1.5}}, TOKENIZER, r"share must lie in \[0, 1\), got 1.5"),
        ({"token_masking": {"share": "much"}}, TOKENIZER, "the arguments .* of the view token_masking do not fit"),
        ({"noise": {"snr": [1]}}, MEL, "snr must be a lowest and a highest number of dB"),
        ({"noise": {}}, TOKENIZER, "the view noise is one of speech, and this model reads texts: choose among token_"),
        ({"token_masking": {"share": 0.1}}, MEL, "is one of texts, and this model hears speech: choose among speed"),
        ({"spec_augment": {}}, Wav2Vec2FeatureExtractor(), "this model reads samples"),
        ({"speed": {}}, tiny_whisper.extractor(), "hears a window of fixed length"),
    ],
)
def test_what_cannot_be_is_refused(written: Any, processing: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_views(written, processing)


def test_a_second_view_needs_to_know_lengths() -> None:
    view = FixedView(SpeedPerturbation([0.9]))
    with pytest.raises(ValueError, match="without attention_mask"):
        view({"input_values": torch.rand(2, 100)})
    assert view({"input_values": torch.rand(1, 100)})["input_values"].shape == (1, 112)
    with pytest.raises(ValueError, match="needs one of input_values, input_features, input_ids"):
        view({"pixel_values": torch.rand(1, 3)})
    assert read_views({"noise": None}) == {"noise": {}}


def test_the_scale_of_a_second_view() -> None:
    """Numbers agree up to a stated difference; other labels know no scale."""
    assert read_second_view('{"noise": null, "scale": 2}') == ({"noise": {}}, 2)
    assert read_second_view({"noise": {}}) == ({"noise": {}}, None)
    for scale in (0, "wide", True):
        with pytest.raises(ValueError, match=f"scale must be a number above 0, got {scale!r}"):
            read_second_view({"noise": {}, "scale": scale})
    with pytest.raises(ValueError, match="must be a mapping of names"):
        read_second_view({"scale": 1})
