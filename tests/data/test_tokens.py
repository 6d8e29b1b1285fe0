"""Words and tags to rows of a token classifier, and their batches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from datasets import ClassLabel, Dataset, Features, List, Value
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from hf_ema_scaling.data.tokens import TokenCollator, prepare_tokens, tag_names
from hf_ema_scaling.labels import TokenLabeler

IDS = {"O": 0, "B-a": 1, "I-a": 2}
WORDS, TAGS = [["new", "york", "is"], ["is", "york"]], [["B-a", "I-a", "O"], ["O", "B-a"]]


def tokenizer(padding_side: str = "right") -> PreTrainedTokenizerFast:
    """`york` has the sub-tokens yo, ##r, ##k; `new` and `is` are whole."""
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "new", "is", "yo", "##r", "##k"]
    backend = Tokenizer(models.WordPiece({token: i for i, token in enumerate(tokens)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        padding_side=padding_side,
        model_input_names=["input_ids", "attention_mask"],
        **names,
    )


def rows(**changes: Any) -> Dataset:
    return Dataset.from_dict({"tokens": WORDS, "ner_tags": TAGS, **changes})


def prepared(dataset: Dataset, **options: Any) -> Dataset:
    columns: dict[str, Any] = {"word_column": "tokens", "tag_column": "ner_tags", "max_length": 16}
    return prepare_tokens(dataset, tokenizer(), IDS, **(columns | options))


def test_labels_are_at_first_sub_tokens_or_at_all() -> None:
    made = prepared(rows())
    assert set(made.column_names) == {"input_ids", "attention_mask", "labels", "length"}
    assert made["input_ids"][:] == [[2, 4, 6, 7, 8, 5, 3], [2, 5, 6, 7, 8, 3]]
    assert made["labels"][:] == [[-100, 1, 2, -100, -100, 0, -100], [-100, 0, 1, -100, -100, -100]]
    assert made["length"][:] == [7, 6]
    everything = prepared(rows(), label_all_tokens=True)
    assert everything["labels"][:] == [[-100, 1, 2, 2, 2, 0, -100], [-100, 0, 1, 2, 2, -100]]
    cut = prepared(rows(), max_length=5)
    assert cut["labels"][:] == [[-100, 1, 2, -100, -100], [-100, 0, 1, -100, -100]]


def test_unlabelled_rows_have_the_numbers_of_words_and_read_no_tags() -> None:
    made = prepared(rows(ner_tags=[["nonsense"], []]), tag_column=None)
    assert set(made.column_names) == {"input_ids", "attention_mask", "word_ids", "length"}
    assert made["word_ids"][:] == [[-1, 0, 1, 1, 1, 2, -1], [-1, 0, 1, 1, 1, -1]]


@pytest.mark.parametrize("all_tokens", [False, True])
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_perfect_teacher_gives_the_labels_of_the_labelled_data(all_tokens: bool, side: str) -> None:
    """Targets made of pseudo-labels lie where those of labelled rows lie, whatever the padding."""
    collate = TokenCollator(tokenizer(side))
    labelled = collate([dict(row) for row in prepared(rows(), label_all_tokens=all_tokens).remove_columns("length")])
    unlabelled = collate([dict(row) for row in prepared(rows(), tag_column=None).remove_columns("length")])
    assert set(unlabelled) == {"input_ids", "attention_mask", "word_ids"}
    assert torch.equal(unlabelled["word_ids"] == -1, labelled["input_ids"] <= 3)
    labeler = TokenLabeler({index: name for name, index in IDS.items()}, label_all_tokens=all_tokens)
    truth = torch.nn.functional.one_hot(labelled["labels"].clamp(min=0), 3).float()
    found = labeler.from_logits(truth * 9, unlabelled["word_ids"])
    assert [label.ids for label in found] == [(1, 2, 0), (0, 1)]
    assert torch.equal(labeler.with_targets(unlabelled, found)["labels"], labelled["labels"])


def test_labelled_batches_have_no_word_ids() -> None:
    row = {"input_ids": [2, 5, 3], "attention_mask": [1, 1, 1], "labels": [-100, 0, -100], "word_ids": [-1, 0, -1]}
    assert set(TokenCollator(tokenizer())([row])) == {"input_ids", "attention_mask", "labels"}


def test_tags_in_order_and_by_name() -> None:
    assert tag_names(rows(), "ner_tags") == ["O", "B-a", "I-a"]
    features = Features({"tokens": List(Value("string")), "ner_tags": List(ClassLabel(names=["I-a", "B-a", "O"]))})
    coded = Dataset.from_dict({"tokens": WORDS, "ner_tags": [[1, 0, 2], [2, 1]]}, features=features)
    assert tag_names(coded, "ner_tags") == ["I-a", "B-a", "O"]
    assert prepared(coded)["labels"][:] == prepared(rows())["labels"][:]


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="row 2: the tag 'B-b' is none of O, B-a, I-a"):
        prepared(rows(ner_tags=[TAGS[0], ["O", "B-b"]]))
    with pytest.raises(TypeError, match="str does not tell which word"):
        prepare_tokens(rows(), "x", IDS, word_column="tokens", tag_column=None, max_length=9)
