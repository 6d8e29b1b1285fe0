"""Labels by word: against the argmax of tiny models at first sub-tokens, with the repair of spans done by hand."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    BertConfig,
    BertForTokenClassification,
    DistilBertConfig,
    DistilBertForTokenClassification,
    PreTrainedModel,
    RobertaConfig,
    RobertaForTokenClassification,
)

from hf_ema_scaling.labels import PseudoLabel, TokenLabeler, labeler_for

NAMES = {0: "O", 1: "B-a", 2: "I-a", 3: "B-b", 4: "I-b"}
SIZES: dict[str, Any] = {"vocab_size": 30, "initializer_range": 0.5, "id2label": NAMES}
BERT_SIZES = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
# [special, word 0 of 2 sub-tokens, word 1, word 2 of 3, special] and shorter rows.
TOKENS = [[2, 7, 8, 9, 11, 12, 13, 3], [2, 5, 6, 3], [2, 14, 21, 3, 17]]
WORDS = [[-1, 0, 0, 1, 2, 2, 2, -1], [-1, 0, 1, -1], [-1, 0, 0, -1, 0]]
FIRST = [[1, 3, 4], [1, 2], [1, 4]]


def bert() -> PreTrainedModel:
    return BertForTokenClassification(BertConfig(**SIZES, **BERT_SIZES))


def roberta() -> PreTrainedModel:
    return RobertaForTokenClassification(RobertaConfig(**SIZES, **BERT_SIZES, pad_token_id=1))


def distilbert() -> PreTrainedModel:
    return DistilBertForTokenClassification(DistilBertConfig(**SIZES, dim=8, n_layers=1, n_heads=2, hidden_dim=8))


def padded(width: int, pad: int, left: bool = False) -> dict[str, torch.Tensor]:
    def fill(rows: list[list[int]], value: int) -> torch.Tensor:
        blank = [[value] * (width - len(row)) for row in rows]
        return torch.tensor([b + row if left else row + b for row, b in zip(rows, blank, strict=True)])

    mask = fill([[1] * len(row) for row in TOKENS], 0)
    return {"input_ids": fill(TOKENS, pad), "attention_mask": mask, "word_ids": fill(WORDS, -1)}


def by_hand(ids: list[int]) -> list[int]:
    """I after neither B nor I of its type becomes B, in numbers: 2 needs 1 or 2 before it, 4 needs 3 or 4."""
    fixed: list[int] = []
    for index in ids:
        before = fixed[-1] if fixed else 0
        fixed.append(index - 1 if index in (2, 4) and before not in (index - 1, index) else index)
    return fixed


@pytest.mark.parametrize("head", [bert, roberta, distilbert])
def test_words_have_the_label_of_their_first_sub_token_whatever_the_padding(head: Any) -> None:
    changed = kinds = 0
    for seed in range(6):
        torch.manual_seed(seed)
        model = head().eval()
        labeler = labeler_for(model)
        with torch.no_grad():
            logits = [model(input_ids=torch.tensor([row])).logits[0].double().numpy() for row in TOKENS]
        for width in (8, 11):
            batch = padded(width, model.config.pad_token_id)
            labels = labeler.label(model, {**batch, "labels": torch.zeros(3, width)})
            for label, row, first in zip(labels, logits, FIRST, strict=True):
                powers = np.exp(row[first])
                sure = (powers / powers.sum(1, keepdims=True)).max(1)
                raw = row[first].argmax(1).tolist()
                assert list(label.ids) == by_hand(raw) and label.kept
                changed, kinds = changed + (by_hand(raw) != raw), kinds + len(set(raw))
                assert label.confidence == pytest.approx(sure.mean(), abs=1e-6)
                assert label.scores["min_confidence"] == pytest.approx(sure.min(), abs=1e-6)
                assert label.scores["masked"] == 0
    assert changed and kinds > 36


def tagged(*rows: list[tuple[int, float]], words: list[list[int]], **options: Any) -> list[PseudoLabel]:
    """Labels from logits that give each token a class with a probability."""
    width = len(words[0])
    logits = torch.zeros(len(rows), width, 5)
    for place, row in enumerate(rows):
        for token, (index, p) in enumerate(row):
            logits[place, token] = math.log((1 - p) / 4)
            logits[place, token, index] = math.log(p)
    return TokenLabeler(NAMES, **options).from_logits(logits, torch.tensor(words))


def test_spans_are_repaired_over_words_not_over_sub_tokens() -> None:
    # Word 0 is B-a, its second sub-token says O; word 1 goes on with I-a; word 2 is I-b and begins anew.
    (label,) = tagged([(1, 0.9), (0, 0.9), (2, 0.5), (4, 0.7)], words=[[0, 0, 1, 2]])
    assert label.ids == (1, 2, 3)
    assert label.confidence == pytest.approx((0.9 + 0.5 + 0.7) / 3)
    assert label.scores["min_confidence"] == pytest.approx(0.5)


def test_other_schemes_are_left_as_they_are() -> None:
    labeler = TokenLabeler({0: "X", 1: "I-a", 2: "B-b"})
    (label,) = labeler.from_logits(torch.eye(3)[None, [1, 1, 0]], torch.tensor([[0, 1, 2]]))
    assert label.ids == (1, 1, 0)


@pytest.mark.parametrize("left", [False, True])
def test_targets_of_first_sub_tokens_or_of_all(left: bool) -> None:
    batch = padded(9, 0, left)
    labels = [PseudoLabel((1, 2, 3), 1.0), PseudoLabel((0, 4), 1.0), PseudoLabel((1, 1), 0.0, "confidence")]
    shift = [9 - len(row) if left else 0 for row in TOKENS]
    first = TokenLabeler(NAMES).with_targets(batch, labels)["labels"]
    expected = torch.full((3, 9), -100)
    for row, place, value in ((0, 1, 1), (0, 3, 2), (0, 4, 3), (1, 1, 0), (1, 2, 4)):
        expected[row, place + shift[row]] = value
    assert torch.equal(first, expected)
    # The rest of a B-x is I-x.
    for row, place, value in ((0, 2, 2), (0, 5, 4), (0, 6, 4)):
        expected[row, place + shift[row]] = value
    everything = TokenLabeler(NAMES, label_all_tokens=True).with_targets(batch, labels)
    assert torch.equal(everything["labels"], expected) and everything["labels"].dtype == torch.int64
    assert torch.equal(everything["input_ids"], batch["input_ids"])


def test_words_that_are_not_sure_enough_have_no_target() -> None:
    words = [[-1, 0, 0, 1], [-1, 0, 0, 1], [-1, -1, -1, -1]]
    some, none, empty = tagged(
        [(0, 0.9), (1, 0.6), (0, 0.9), (2, 0.8)],
        [(0, 0.9), (1, 0.6), (0, 0.9), (2, 0.5)],
        [(0, 0.9)] * 4,
        words=words,
        min_word_confidence=0.7,
    )
    assert (some.ids, some.reason, some.scores["masked"]) == ((-100, 2), None, 0.5)
    assert none.reason == "confidence" and none.confidence == pytest.approx(0.55)
    assert (empty.reason, empty.confidence, empty.ids) == ("empty", 0.0, ())
    labeler = TokenLabeler(NAMES, label_all_tokens=True)
    inputs = {"input_ids": torch.zeros(3, 4), "word_ids": torch.tensor(words)}
    assert labeler.with_targets(inputs, [some, none, empty])["labels"].tolist() == [
        [-100, -100, -100, 2],
        [-100] * 4,
        [-100] * 4,
    ]


def test_what_does_not_fit_is_refused() -> None:
    logits, words = torch.zeros(2, 3, 5), torch.tensor([[-1, 0, -1], [-1, 0, 1]])
    labeler = TokenLabeler(NAMES)
    broken = logits.clone()
    broken[:, 0] = math.nan  # special tokens are never looked at
    assert len(labeler.from_logits(broken, words)) == 2
    broken[1, 2, 3] = math.nan
    with pytest.raises(ValueError, match=r"not finite in rows \[1\]"):
        labeler.from_logits(broken, words)
    with pytest.raises(ValueError, match=r"logits \(rows, tokens, 5\) and word_ids"):
        labeler.from_logits(logits, words[:, :2])
    with pytest.raises(ValueError, match="labels by word need 'word_ids' in the batch, which has"):
        labeler.with_targets({"input_ids": words}, [])
    with pytest.raises(ValueError, match="row 1 has 2 words, but a label of 1 words"):
        labeler.with_targets({"word_ids": words}, [PseudoLabel((0,), 1.0), PseudoLabel((0,), 1.0)])
    with pytest.raises(ValueError, match="id2label must name at least 2 classes"):
        TokenLabeler({1: "a", 2: "b"})
    with pytest.raises(ValueError, match="min_word_confidence must lie in"):
        TokenLabeler(NAMES, min_word_confidence=1.1)
    torch.manual_seed(0)
    with pytest.raises(RuntimeError, match="train mode"):
        labeler.label(bert().train(), padded(8, 0))
