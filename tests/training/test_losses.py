"""Losses per example against torch and transformers."""

from __future__ import annotations

import math

import pytest
import tiny
import torch
from torch import nn
from torch.nn import functional as F
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertForTokenClassification,
    PretrainedConfig,
    Wav2Vec2ForCTC,
)

from hf_ema_scaling.data import CTCCollator
from hf_ema_scaling.training.losses import (
    cap_losses,
    classification_losses,
    ctc_losses,
    is_ctc,
    loss_for,
    token_losses,
)

MANY = torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 0.0], [1.0, 1.0, 1.0]])


def small_bert(**changes: object) -> BertConfig:
    return BertConfig(
        vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, **changes
    )


def test_ctc_is_torchs_loss_of_each_row_over_its_target_length() -> None:
    logits = torch.randn(4, 12, 6) * 3
    frames = torch.tensor([12, 9, 7, 5])
    labels = torch.tensor([[1, 1, 2, 3], [5, 4, -100, -100], [2, -100, -100, -100], [1, 2, 3, -100]])
    losses = ctc_losses(logits, frames, labels, blank=0)
    for row, (length, tokens) in enumerate([(12, 4), (9, 2), (7, 1), (5, 3)]):
        expected = F.ctc_loss(
            logits[row, :length, None].double().log_softmax(-1),
            labels[row, None, :tokens],
            torch.tensor([length]),
            torch.tensor([tokens]),
            reduction="sum",
        )
        assert float(losses[row]) == pytest.approx(float(expected) / tokens, rel=1e-6)


def test_ctc_by_hand() -> None:
    """Two frames, one token: the paths are (a, a), (a, -), (-, a)."""
    p = torch.tensor([[[0.5, 0.3, 0.2], [0.6, 0.1, 0.3]]]).log()
    assert float(ctc_losses(p, torch.tensor([2]), torch.tensor([[1]]), blank=0)) == pytest.approx(
        -math.log(0.3 * 0.1 + 0.3 * 0.6 + 0.5 * 0.1), rel=1e-6
    )
    assert float(ctc_losses(p, torch.tensor([2]), torch.tensor([[2, 1]]), blank=0)) == pytest.approx(
        -math.log(0.2 * 0.1) / 2, rel=1e-6
    )
    assert float(ctc_losses(p, torch.tensor([2]), torch.tensor([[1]]), blank=2)) == pytest.approx(
        -math.log(0.3 * 0.1 + 0.3 * 0.3 + 0.2 * 0.1), rel=1e-6
    )
    assert float(ctc_losses(p, torch.tensor([1]), torch.tensor([[1]]), blank=0)) == pytest.approx(
        -math.log(0.3), rel=1e-6
    )


def test_ctc_of_a_target_without_room_is_infinite_and_without_tokens_refused() -> None:
    logits = torch.randn(2, 3, 4)
    losses = ctc_losses(logits, torch.tensor([3, 3]), torch.tensor([[1, 1, -100], [1, 1, 2]]), blank=0)
    assert math.isfinite(losses[0]) and math.isinf(losses[1])
    with pytest.raises(ValueError, match="row 1 has an empty target"):
        ctc_losses(logits, torch.tensor([3, 3]), torch.tensor([[1, -100], [-100, -100]]), blank=0)


def test_ctc_in_half_precision_is_computed_in_float32() -> None:
    logits = torch.randn(1, 8, 5).bfloat16()
    labels, frames = torch.tensor([[1, 2]]), torch.tensor([8])
    half = ctc_losses(logits, frames, labels, 0)
    assert half.dtype == torch.float32 and torch.equal(half, ctc_losses(logits.float(), frames, labels, 0))


@pytest.mark.parametrize("model", [tiny.wav2vec2, tiny.parakeet])
def test_a_ctc_row_is_transformers_mean_loss_of_that_row_alone(model: object) -> None:
    made = model().eval()  # type: ignore[operator]
    data = tiny.speech(5, 2, features=8 if made.config.model_type.startswith("parakeet") else 0)
    made.config.ctc_loss_reduction = "mean"
    batch = CTCCollator()([{key: row[key] for key in row if key != "duration"} for row in data])
    labels = batch.pop("labels")
    assert is_ctc(made)
    with torch.no_grad():
        losses = loss_for(made)(made, batch, made(**batch).logits, labels)
        for row in range(5):
            alone = CTCCollator()([{key: data[row][key] for key in data[row] if key != "duration"}])
            assert float(losses[row]) == pytest.approx(float(made(**alone).loss), rel=2e-5)


@pytest.mark.parametrize(
    ("kind", "labels", "classes", "stated"),
    [
        ("single_label_classification", torch.tensor([2, 0, 1]), 3, True),
        ("single_label_classification", torch.tensor([2, 0, 1]), 3, False),
        ("multi_label_classification", MANY, 3, True),
        ("multi_label_classification", MANY, 3, False),
        ("regression", torch.tensor([0.3, -1.0, 2.0]), 1, True),
        ("regression", torch.tensor([0.3, -1.0, 2.0]), 1, False),
        ("regression", torch.tensor([[0.3, 1.0], [-1.0, 0.2], [2.0, 0.0]]), 2, True),
    ],
)
def test_a_classification_row_is_transformers_loss_of_that_row_alone(
    kind: str, labels: torch.Tensor, classes: int, stated: bool
) -> None:
    model = BertForSequenceClassification(small_bert(num_labels=classes, problem_type=kind if stated else None)).eval()
    reference = BertForSequenceClassification(small_bert(num_labels=classes, problem_type=kind)).eval()
    reference.load_state_dict(model.state_dict())
    ids = torch.randint(0, 20, (3, 6))
    with torch.no_grad():
        losses = loss_for(model)(model, {"input_ids": ids}, model(input_ids=ids).logits, labels)
        assert losses.shape == (3,)
        for row in range(3):
            expected = reference(input_ids=ids[row, None], labels=labels[row, None]).loss
            assert float(losses[row]) == pytest.approx(float(expected), rel=1e-5)


def test_a_token_row_is_transformers_loss_of_that_row_alone() -> None:
    model = BertForTokenClassification(small_bert(num_labels=4)).eval()
    ids = torch.randint(0, 20, (3, 6))
    labels = torch.randint(0, 4, (3, 6))
    labels[0, 2:] = -100
    labels[1, ::2] = -100
    with torch.no_grad():
        losses = loss_for(model)(model, {"input_ids": ids}, model(input_ids=ids).logits, labels)
        for row in range(3):
            assert float(losses[row]) == pytest.approx(
                float(model(input_ids=ids[row, None], labels=labels[row, None]).loss), rel=1e-5
            )


def test_rows_without_labelled_tokens_cost_nothing() -> None:
    logits = torch.randn(2, 3, 4, requires_grad=True)
    losses = token_losses(logits, torch.tensor([[-100, -100, -100], [1, -100, 2]]))
    assert losses[0].item() == 0.0
    losses.sum().backward()
    assert logits.grad is not None and not bool(logits.grad[0].any()) and bool(logits.grad[1].any())


def test_the_mean_of_the_rows_is_the_loss_of_the_batch() -> None:
    logits, labels = torch.randn(7, 3), torch.randint(0, 3, (7,))
    rows = classification_losses(logits, labels, "single_label_classification")
    torch.testing.assert_close(rows.mean(), F.cross_entropy(logits, labels))


def test_probabilities_as_labels_are_the_mean_over_classes_of_their_losses() -> None:
    logits = torch.randn(4, 3).bfloat16()
    targets = torch.tensor([[0.2, 0.5, 0.3], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0], [1 / 3, 1 / 3, 1 / 3]])
    rows = classification_losses(logits, targets, "single_label_classification")
    by_hand = -(targets.double() * logits.double().log_softmax(-1)).sum(-1)
    torch.testing.assert_close(rows.double(), by_hand, atol=1e-6, rtol=1e-6)
    hard = classification_losses(logits[1:3], torch.tensor([0, 2]), "single_label_classification")
    torch.testing.assert_close(rows[1:3], hard)
    with pytest.raises(ValueError, match=r"probabilities by class, \(4, 3\), got \(4,\): for one class"):
        classification_losses(logits, torch.zeros(4), "single_label_classification")


def test_the_cap_bounds_value_and_gradient() -> None:
    x = torch.tensor([0.5, 3.0, 300.0], requires_grad=True)
    capped = cap_losses(x * 2, 6.0)
    torch.testing.assert_close(capped.detach(), torch.tensor([1.0, 6.0, 6.0]))
    capped.sum().backward()
    # d(2x)/dx = 2, times 6 / 600 where the cap holds.
    torch.testing.assert_close(x.grad, torch.tensor([2.0, 2.0, 0.02]))
    losses = torch.randn(3)
    assert cap_losses(losses, None) is losses


def test_the_cap_of_an_infinite_loss_is_the_cap_and_of_nan_nan() -> None:
    capped = cap_losses(torch.tensor([math.inf, math.nan, 2.0]), 50.0).tolist()
    assert capped[0] == 50.0 and math.isnan(capped[1]) and capped[2] == 2.0


def test_a_head_without_a_known_loss_is_named() -> None:
    class Unknown(nn.Module):
        config = PretrainedConfig()

    with pytest.raises(NotImplementedError, match="no per-example loss is known for Unknown: pass example_loss="):
        loss_for(Unknown())
    model = Wav2Vec2ForCTC(tiny.wav2vec2().config)
    model.config.pad_token_id = None
    with pytest.raises(ValueError, match="pad_token_id is None"):
        loss_for(model)
