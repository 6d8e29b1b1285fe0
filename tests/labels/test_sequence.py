"""Labels of sequences against softmax and sigmoid computed apart, on tiny models of every kind of head."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    PreTrainedModel,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from hf_ema_scaling.labels import (
    ClassLabeler,
    FilterChain,
    Labeler,
    MakesTargets,
    MultiLabelLabeler,
    PseudoLabel,
    RegressionLabeler,
    Row,
    labeler_for,
)

SIZES: dict[str, Any] = {"vocab_size": 20, "num_labels": 3, "initializer_range": 0.5}


def bert(**changes: Any) -> PreTrainedModel:
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    return BertForSequenceClassification(BertConfig(**{**SIZES, **sizes, **changes}))


def roberta(**changes: Any) -> PreTrainedModel:
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    return RobertaForSequenceClassification(RobertaConfig(**{**SIZES, **sizes, "pad_token_id": 1, **changes}))


def distilbert(**changes: Any) -> PreTrainedModel:
    sizes = {"dim": 8, "n_layers": 1, "n_heads": 2, "hidden_dim": 8}
    return DistilBertForSequenceClassification(DistilBertConfig(**{**SIZES, **sizes, **changes}))


HEADS = pytest.mark.parametrize("head", [bert, roberta, distilbert])
TEXTS = [[3, 7, 9, 11, 4], [5, 6], [8, 2, 13]]


def padded(width: int, pad: int) -> dict[str, torch.Tensor]:
    return {
        "input_ids": torch.tensor([[*text, *[pad] * (width - len(text))] for text in TEXTS]),
        "attention_mask": torch.tensor([[1] * len(text) + [0] * (width - len(text)) for text in TEXTS]),
        "labels": torch.tensor([0, 0, 0]),
    }


def made(head: Callable[..., PreTrainedModel], **changes: Any) -> tuple[PreTrainedModel, np.ndarray]:
    """A model and its logits row by row, without padding."""
    torch.manual_seed(0)
    model = head(**changes).eval()
    with torch.no_grad():
        rows = [model(input_ids=torch.tensor([text])).logits[0].double().numpy() for text in TEXTS]
    return model, np.stack(rows)


def target_of(labeler: Labeler, labels: Any) -> torch.Tensor:
    assert isinstance(labeler, MakesTargets)
    result = labeler.with_targets({"input_ids": torch.zeros(len(labels), 2)}, labels)
    assert set(result) == {"input_ids", "labels"}
    return result["labels"]


@HEADS
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_one_class_is_the_largest_logit_and_its_probability(head: Any, temperature: float) -> None:
    model, logits = made(head, problem_type="single_label_classification")
    powers = np.exp(logits / temperature)
    p = powers / powers.sum(1, keepdims=True)
    hard = labeler_for(model, temperature=temperature)
    soft = labeler_for(model, soft=True, temperature=temperature)
    for width in (5, 9):
        batch = padded(width, model.config.pad_token_id)
        labels = hard.label(model, batch)
        assert [label.ids for label in labels] == [(int(row.argmax()),) for row in logits]
        np.testing.assert_allclose([label.confidence for label in labels], p.max(1), atol=1e-6)
        entropy = -(p * np.log(p)).sum(1) / np.log(3)
        np.testing.assert_allclose([label.scores["entropy"] for label in labels], entropy, atol=1e-6)
        ordered = np.sort(p, axis=1)
        np.testing.assert_allclose([x.scores["margin"] for x in labels], ordered[:, 2] - ordered[:, 1], atol=1e-6)
        assert all(label.values == () and label.kept for label in labels)
        assert target_of(hard, labels).tolist() == logits.argmax(1).tolist()
        assert target_of(hard, labels).dtype == torch.int64
        softened = soft.label(model, batch)
        assert [label.ids for label in softened] == [label.ids for label in labels]
        targets = target_of(soft, softened)
        assert targets.dtype == torch.float32
        np.testing.assert_allclose(targets, p, atol=1e-6)


@HEADS
def test_several_classes_are_those_above_their_thresholds(head: Any) -> None:
    model, logits = made(head, problem_type="multi_label_classification")
    p = 1 / (1 + np.exp(-logits))
    thresholds = [0.2, 0.5, 0.8]
    hard, soft = labeler_for(model, thresholds=thresholds), labeler_for(model, soft=True)
    labels = hard.label(model, padded(8, model.config.pad_token_id))
    chosen = p >= np.array(thresholds)
    assert 0 < chosen.sum() < chosen.size
    assert [label.ids for label in labels] == [tuple(np.flatnonzero(row)) for row in chosen]
    assert [label.values for label in labels] == [tuple(row) for row in chosen.astype(float).tolist()]
    assert target_of(hard, labels).tolist() == chosen.astype(float).tolist()
    np.testing.assert_allclose([x.confidence for x in labels], np.maximum(p, 1 - p).mean(1), atol=1e-6)
    bits = -(p * np.log2(p) + (1 - p) * np.log2(1 - p)).mean(1)
    np.testing.assert_allclose([label.scores["entropy"] for label in labels], bits, atol=1e-6)
    np.testing.assert_allclose([label.scores["margin"] for label in labels], np.abs(2 * p - 1).mean(1), atol=1e-6)
    targets = target_of(soft, soft.label(model, padded(5, model.config.pad_token_id)))
    np.testing.assert_allclose(targets, p, atol=1e-6)
    assert targets.dtype == torch.float32


@HEADS
@pytest.mark.parametrize("outputs", [1, 3])
def test_a_regression_gives_its_numbers(head: Any, outputs: int) -> None:
    model, logits = made(head, num_labels=outputs, problem_type="regression" if outputs > 1 else None)
    labeler = labeler_for(model)
    labels = labeler.label(model, padded(9, model.config.pad_token_id))
    np.testing.assert_allclose([label.values for label in labels], logits, atol=1e-6)
    assert all((label.ids, label.confidence, dict(label.scores)) == ((), 1.0, {}) for label in labels)
    assert target_of(labeler, labels).shape == (3, outputs)
    np.testing.assert_allclose(target_of(labeler, labels), logits, atol=1e-6)


def test_extremes_of_entropy_and_margin() -> None:
    sure, torn = ClassLabeler(3).from_logits(torch.tensor([[99.0, -math.inf, -math.inf], [1.0, 1.0, 1.0]]))
    assert (sure.confidence, dict(sure.scores)) == (1.0, {"entropy": 0.0, "margin": 1.0})
    assert torn.ids == (0,) and torn.confidence == pytest.approx(1 / 3)
    assert dict(torn.scores) == pytest.approx({"entropy": 1.0, "margin": 0.0})
    (halves,) = MultiLabelLabeler(2).from_logits(torch.zeros(1, 2))
    assert (halves.ids, halves.confidence, dict(halves.scores)) == ((0, 1), 0.5, {"entropy": 1.0, "margin": 0.0})
    (none,) = MultiLabelLabeler(2).from_logits(torch.full((1, 2), -50.0))
    assert none.ids == () and none.kept and none.confidence == pytest.approx(1.0)


def test_half_precision_is_labelled_in_float32() -> None:
    logits = torch.tensor([[0.1, 0.2, 3.0]], dtype=torch.bfloat16)
    (label,) = ClassLabeler(3, soft=True).from_logits(logits)
    assert sum(label.values) == pytest.approx(1.0, abs=1e-12)


@pytest.mark.parametrize(
    ("labeler", "dummy"),
    [
        (ClassLabeler(2), 0),
        (ClassLabeler(2, soft=True), [0.5, 0.5]),
        (MultiLabelLabeler(2), [0.0, 0.0]),
        (MultiLabelLabeler(2, soft=True), [0.0, 0.0]),
        (RegressionLabeler(2), [0.0, 0.0]),
    ],
)
def test_dropped_rows_have_targets_that_the_loss_can_take(labeler: Any, dummy: Any) -> None:

    kept, dropped = labeler.from_logits(torch.tensor([[2.0, 1.0], [3.0, -1.0]]))
    nothing = PseudoLabel((), 0.0, "padding")
    targets = target_of(labeler, [kept, dataclasses.replace(dropped, reason="confidence"), nothing])
    assert targets[1:].tolist() == [dummy, dummy]
    alone = target_of(labeler, [nothing, nothing])
    assert alone.tolist() == [dummy, dummy] and alone.dtype == targets.dtype


@pytest.mark.parametrize("labeler", [ClassLabeler(2), MultiLabelLabeler(2), RegressionLabeler(2)])
def test_a_teacher_that_has_diverged_is_refused(labeler: Any) -> None:
    logits = torch.tensor([[0.0, 1.0], [math.nan, 1.0], [0.0, math.nan]])
    with pytest.raises(ValueError, match=r"not finite in rows \[1, 2\]"):
        labeler.from_logits(logits)
    with pytest.raises(ValueError, match=r"must be \(rows, 2\), got \(3, 2, 1\)"):
        labeler.from_logits(logits[:, :, None])


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="temperature must be above 0, got 0"):
        ClassLabeler(2, temperature=0)
    with pytest.raises(ValueError, match="at least 2 classes"):
        ClassLabeler(1)
    for thresholds in (1.0, [0.5], [0.5, 0.0]):
        with pytest.raises(ValueError, match="thresholds must be one number"):
            MultiLabelLabeler(2, thresholds=thresholds)
    torch.manual_seed(0)
    with pytest.raises(RuntimeError, match="train mode"):
        ClassLabeler(3).label(bert().train(), padded(5, 0))


def test_no_class_at_all_is_a_label_and_not_an_empty_one() -> None:
    (label,) = MultiLabelLabeler(3).from_logits(torch.tensor([[-9.0, -9.0, -9.0]]))
    assert label.ids == () and label.values == (0.0, 0.0, 0.0)
    (kept,) = FilterChain([]).judge([label], lambda number: Row(label))
    assert kept.kept and MultiLabelLabeler(3).with_targets({}, [kept])["labels"].tolist() == [[0.0] * 3]
