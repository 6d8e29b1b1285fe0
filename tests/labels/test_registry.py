"""Which labeler goes with which head."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import tiny
import torch
from transformers import BertConfig, BertForMaskedLM, BertForSequenceClassification, BertForTokenClassification

from hf_ema_scaling.labels import (
    ClassLabeler,
    CTCLabeler,
    MultiLabelLabeler,
    RegressionLabeler,
    TokenLabeler,
    labeler_for,
)

SIZES = {"vocab_size": 20, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}


def config(**changes: object) -> BertConfig:
    return BertConfig(**{**SIZES, **changes})


@pytest.mark.parametrize(
    ("problem", "outputs", "kind"),
    [
        ("single_label_classification", 3, ClassLabeler),
        ("multi_label_classification", 3, MultiLabelLabeler),
        ("regression", 3, RegressionLabeler),
        (None, 1, RegressionLabeler),
    ],
)
def test_a_sequence_head_is_known_by_its_problem_type(problem: str | None, outputs: int, kind: type) -> None:
    labeler = labeler_for(BertForSequenceClassification(config(problem_type=problem, num_labels=outputs)))
    assert type(labeler) is kind and labeler.outputs == outputs  # type: ignore[attr-defined]


def test_several_outputs_of_unknown_meaning_are_refused() -> None:
    with pytest.raises(ValueError, match=r"BertConfig.problem_type is None, so what 3 outputs mean"):
        labeler_for(BertForSequenceClassification(config(num_labels=3)))


def test_a_token_head_has_the_names_of_its_classes() -> None:
    names = {0: "O", 1: "B-a", 2: "I-a"}
    model = BertForTokenClassification(config(id2label=names, label2id={name: key for key, name in names.items()}))
    labeler = labeler_for(model, label_all_tokens=True)
    assert isinstance(labeler, TokenLabeler) and labeler.label_all_tokens and labeler.bio
    assert labeler.names == ["O", "B-a", "I-a"]
    assert not labeler_for(BertForTokenClassification(config(num_labels=3))).bio  # type: ignore[attr-defined]


def test_a_ctc_head_takes_the_special_ids_of_the_tokenizer() -> None:
    ids = {"pad_token_id": 0, "bos_token_id": 5, "eos_token_id": 6, "unk_token_id": None}
    tokenizer = SimpleNamespace(**ids)
    for processing in (tokenizer, SimpleNamespace(tokenizer=tokenizer)):
        labeler = labeler_for(tiny.wav2vec2(), processing)
        assert isinstance(labeler, CTCLabeler) and (labeler.blank_id, labeler.special_ids) == (0, {5, 6})
    assert labeler_for(tiny.wav2vec2(), None).special_ids == set()  # type: ignore[attr-defined]


def test_other_heads_and_options_are_refused() -> None:
    with pytest.raises(NotImplementedError, match="no labeler is known for BertForMaskedLM: pass labeler="):
        labeler_for(BertForMaskedLM(config()))
    with pytest.raises(NotImplementedError, match="no labeler is known for Linear"):
        labeler_for(torch.nn.Linear(2, 2))
    with pytest.raises(TypeError, match="softness"):
        labeler_for(BertForSequenceClassification(config(num_labels=1)), softness=1)
