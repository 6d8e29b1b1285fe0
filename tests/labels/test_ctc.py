from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from ctc_models import MODELS, padded, utterances
from torch import Tensor

from hf_ema_scaling.labels import CTCLabeler, blank_id, ctc_frame_lengths, greedy_ctc, min_ctc_frames, non_target_ids


@pytest.mark.parametrize("architecture", MODELS)
def test_frame_lengths_are_those_of_each_utterance_alone(architecture: str) -> None:
    build, name = MODELS[architecture]
    model = build()
    rows = utterances(name, (61, 40, 53, 37))
    with torch.no_grad():
        alone = [model(**{name: row[None]}).logits.shape[1] for row in rows]
        batch = padded(name, rows)
        batched = model(**batch).logits.shape[1]
    lengths = ctc_frame_lengths(model, batch)
    assert lengths.dtype == torch.int64
    assert lengths.tolist() == alone
    assert max(alone) == batched
    assert [int(ctc_frame_lengths(model, {name: row[None]})) for row in rows] == alone


def test_wrappers_are_looked_through() -> None:
    model = MODELS["parakeet"][0]()
    batch = padded("input_features", utterances("input_features", (61, 40)))
    expected = ctc_frame_lengths(model, batch).tolist()
    for wrapped in (
        SimpleNamespace(module=model),
        SimpleNamespace(_orig_mod=model),
        SimpleNamespace(_orig_mod=SimpleNamespace(module=model)),
    ):
        assert ctc_frame_lengths(wrapped, batch).tolist() == expected


def test_unknown_models_and_batches_are_refused() -> None:
    batch = {"input_values": torch.zeros(1, 10)}
    with pytest.raises(TypeError, match="Linear does not tell how many CTC frames"):
        ctc_frame_lengths(torch.nn.Linear(1, 1), batch)
    with pytest.raises(ValueError, match=r"needs 'input_values' or 'input_features', got \['labels'\]"):
        ctc_frame_lengths(MODELS["parakeet"][0](), {"labels": torch.zeros(1, 1)})


def test_blank_is_the_pad_token_and_must_be_set() -> None:
    assert blank_id(transformers.Wav2Vec2Config(pad_token_id=7)) == 7
    with pytest.raises(ValueError, match="pad_token_id is None"):
        blank_id(transformers.Wav2Vec2Config(pad_token_id=None))
    with pytest.raises(ValueError, match="the blank of OmniASRCTCConfig is id 0, its padding id 1: only CTC heads"):
        blank_id(transformers.OmniASRCTCConfig())


def slow_ctc(row: Tensor, length: int, blank: int) -> list[int]:
    path: list[int] = []
    for frame in row.tolist()[:length]:
        path.append(max(range(len(frame)), key=frame.__getitem__))
    merged = [token for t, token in enumerate(path) if t == 0 or token != path[t - 1]]
    return [token for token in merged if token != blank]


def one_hot(path: list[int], vocabulary: int = 6) -> Tensor:
    return torch.nn.functional.one_hot(torch.tensor([path]), vocabulary).float() * 9


@pytest.mark.parametrize("blank", [0, 3])
def test_greedy_equals_a_loop_over_frames(blank: int) -> None:
    generator = torch.Generator().manual_seed(blank)
    logits = torch.randn(40, 50, 4, generator=generator)  # a small vocabulary, so that repeats and blanks are common
    lengths = torch.randint(0, 51, (40,), generator=generator)
    expected = [slow_ctc(row, int(length), blank) for row, length in zip(logits, lengths, strict=True)]
    assert greedy_ctc(logits, lengths, blank) == expected
    alone = [greedy_ctc(logits[i : i + 1], lengths[i : i + 1], blank)[0] for i in range(40)]
    assert alone == expected
    assert [list(label.ids) for label in CTCLabeler(blank).from_logits(logits, lengths)] == expected


def test_repeats_are_merged_before_blanks_are_dropped() -> None:
    assert greedy_ctc(one_hot([1, 2, 3, 0, 3, 4]), torch.tensor([6]), 0) == [[1, 2, 3, 3, 4]]
    assert greedy_ctc(one_hot([1, 1, 2, 2, 0, 2]), torch.tensor([6]), 0) == [[1, 2, 2]]
    assert greedy_ctc(one_hot([1, 2, 3, 4, 4, 4]), torch.tensor([2]), 0) == [[1, 2]]


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="claims 7 frames, but the logits have 6"):
        greedy_ctc(one_hot([1] * 6), torch.tensor([7]), 0)
    with pytest.raises(ValueError, match="one length per row"):
        greedy_ctc(one_hot([1] * 6), torch.tensor([6, 6]), 0)


@pytest.mark.parametrize(("ids", "frames"), [([], 0), ([5], 1), ([1, 2, 3, 3, 4], 6), ([2, 2, 2], 5)])
def test_min_ctc_frames(ids: list[int], frames: int) -> None:
    assert min_ctc_frames(ids) == frames


def test_special_ids_are_removed_after_merging() -> None:
    (label,) = CTCLabeler(0, special_ids=[5]).from_logits(one_hot([1, 5, 1, 5, 5, 2]), torch.tensor([6]))
    assert label.ids == (1, 1, 2)
    (label,) = CTCLabeler(0, special_ids=[5]).from_logits(one_hot([5, 5, 0, 5]), torch.tensor([4]))
    assert (label.ids, label.reason, label.kept) == ((), "empty", False)


def test_the_word_delimiter_is_a_target(tmp_path: Path) -> None:
    (tmp_path / "vocab.json").write_text(json.dumps({"<pad>": 0, "|": 1, "<unk>": 2, "a": 3, "</s>": 4}))
    tokenizer = transformers.Wav2Vec2CTCTokenizer(str(tmp_path / "vocab.json"), bos_token=None)
    assert 1 in tokenizer.all_special_ids  # the trap
    assert non_target_ids(tokenizer) == {0, 2, 4}


def test_a_label_longer_than_the_students_frames_is_dropped() -> None:
    labeler, logits, frames = CTCLabeler(0), one_hot([2, 0, 2, 3]), torch.tensor([4])
    assert labeler.from_logits(logits, frames)[0].reason is None
    assert labeler.from_logits(logits, frames, target_frames=torch.tensor([4]))[0].reason is None
    assert labeler.from_logits(logits, frames, target_frames=torch.tensor([3]))[0].reason == "too_long"


def test_confidence_is_the_geometric_mean_of_the_best_probabilities_of_valid_frames() -> None:
    probabilities = torch.tensor([[[0.5, 0.25, 0.25], [0.1, 0.8, 0.1], [0.98, 0.01, 0.01]]])
    first, none = CTCLabeler(0).from_logits(probabilities.log().repeat(2, 1, 1), torch.tensor([2, 0]))
    assert first.confidence == pytest.approx(math.sqrt(0.5 * 0.8), rel=1e-6)
    assert (none.confidence, none.reason) == (0.0, "empty")


def test_nan_matters_in_valid_frames_only() -> None:
    logits = one_hot([1, 2, 3]).repeat(2, 1, 1)
    logits[1, 2, 4] = math.nan
    assert CTCLabeler(0).from_logits(logits, torch.tensor([3, 2]))[1].ids == (1, 2)
    with pytest.raises(ValueError, match=r"NaN in rows \[1\]"):
        CTCLabeler(0).from_logits(logits, torch.tensor([3, 3]))


def test_a_teacher_in_train_mode_is_refused() -> None:
    model = MODELS["parakeet"][0]().train()
    with pytest.raises(RuntimeError, match="train mode"):
        CTCLabeler(0).label(model, {"input_features": torch.zeros(1, 40, 16)})


def test_the_teacher_never_sees_labels() -> None:
    seen: list[set[str]] = []

    class Spy(torch.nn.Module):
        def _get_subsampling_output_length(self, lengths: Tensor) -> Tensor:
            return lengths

        def forward(self, **inputs: Tensor) -> Any:
            seen.append(set(inputs))
            return SimpleNamespace(logits=one_hot([1, 2, 3]))

    batch = {"input_features": torch.zeros(1, 3, 2), "labels": torch.ones(1, 1), "hidden_reference": torch.ones(1)}
    assert CTCLabeler(0).label(Spy().eval(), batch)[0].ids == (1, 2, 3)
    assert seen == [{"input_features"}]


def test_scores_are_the_share_of_blanks_and_the_log_of_the_confidence() -> None:
    logits = torch.zeros(3, 4, 3)
    logits[0, [0, 1, 2, 3], [0, 1, 0, 0]] = 2.0
    logits[1, [0, 1], [1, 2]] = 2.0
    first, second, third = CTCLabeler(0).from_logits(logits, torch.tensor([4, 2, 0]))
    assert (first.scores["blank"], second.scores["blank"], third.scores["blank"]) == (0.75, 0.0, 0.0)
    assert first.scores["log_probability"] == pytest.approx(2 - math.log(math.e**2 + 2), rel=1e-6)
    assert first.confidence == pytest.approx(math.exp(first.scores["log_probability"]))
    assert third.scores["log_probability"] == -math.inf and third.confidence == 0
