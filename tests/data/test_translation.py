from __future__ import annotations

import logging

import pytest
from datasets import Dataset

from hf_ema_scaling.data.bad_items import BadItemError
from hf_ema_scaling.data.translation import build_subword_tokenizer, prepare_pairs

TEXTS = ["Save the page", "Enregistrer la page", "%(count)s pages", "Déjà vu"]


def test_every_text_can_be_written_and_read_back() -> None:
    tokenizer = build_subword_tokenizer(TEXTS, vocabulary_size=300)
    again = build_subword_tokenizer(reversed(TEXTS), vocabulary_size=300)
    assert tokenizer.get_vocab() == again.get_vocab()
    assert tokenizer.convert_tokens_to_ids(["<s>", "<pad>", "</s>", "<unk>"]) == [0, 1, 2, 3]
    assert (tokenizer.bos_token_id, tokenizer.pad_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    for text in [*TEXTS, "漢字 ça"]:
        ids = tokenizer(text).input_ids
        assert ids[-1] == 2 and 3 not in ids
        assert tokenizer.decode(ids, skip_special_tokens=True).strip() == text
    # Pairs that occur often are one token: "page" stands in three texts.
    assert len(tokenizer("page").input_ids) == 2
    with pytest.raises(ValueError, match="vocabulary_size must be at least 260"):
        build_subword_tokenizer(TEXTS, vocabulary_size=259)


def test_rows_are_ids_lengths_and_targets(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = build_subword_tokenizer(["a"], vocabulary_size=260)
    dataset = Dataset.from_dict({"en": ["ab", "abcdefgh", "a", "b"], "fr": ["c", "d", "x" * 9, "e"]})

    def target(text: str) -> list[int]:
        return [7] * len(text)

    def prepare(column: str | None, prefix: str = "", length: int = 8) -> Dataset:
        return prepare_pairs(
            dataset, tokenizer, target, source_column="en", target_column=column, prefix=prefix, max_length=length
        )

    with caplog.at_level(logging.WARNING):
        prepared = prepare("fr")
    assert "left out 2 of 4 rows, longer than 8 tokens: 1 by their source, 1 by their target" in caplog.text
    # A byte each, the space before the first word, and the end.
    assert prepared["length"][:] == [4, 3] and prepared["labels"][:] == [[7], [7]]
    assert prepared["input_ids"][:] == [tokenizer("ab").input_ids, tokenizer("b").input_ids]
    assert prepared["attention_mask"][:] == [[1] * 4, [1] * 3]
    free = prepare(None, prefix="to: ", length=99)
    assert free["length"][:] == [8, 14, 7, 7] and "labels" not in free.column_names
    with pytest.raises(ValueError, match="all 4 rows are longer than 2 tokens"):
        prepare(None, length=2)


def test_translations_that_are_refused_are_errors_or_skipped(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = build_subword_tokenizer(["a"], vocabulary_size=260)
    dataset = Dataset.from_dict({"en": ["a", "ab", "abc"], "fr": ["x", "<", "y"]})

    def target(text: str) -> list[int]:
        if text == "<":
            raise BadItemError("a mark", "special_tokens")
        return [ord(text)]

    def prepare(choice: str) -> Dataset:
        columns = {"source_column": "en", "target_column": "fr"}
        return prepare_pairs(dataset, tokenizer, target, max_length=9, on_bad_item=choice, **columns)

    with pytest.raises(BadItemError, match="row 2: a mark"):
        prepare("raise")
    with caplog.at_level(logging.WARNING):
        prepared = prepare("skip")
    assert prepared["labels"][:] == [[120], [121]] and prepared["length"][:] == [3, 5]
    assert "fr: skipped 1 of 3 rows (1 special_tokens); first: row 2: a mark" in caplog.text
