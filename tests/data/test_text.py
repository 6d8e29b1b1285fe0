from __future__ import annotations

from collections import Counter

import pytest
from datasets import ClassLabel, Dataset, Features, Value

from hf_ema_scaling.data.text import (
    WordNoise,
    build_word_tokenizer,
    class_names,
    drawn_by_class,
    label_name,
    prepare_classification,
)

TEXTS = ["Good film, good.", "A bad film", "good bad ugly"]


def test_words_are_counted_and_ordered() -> None:
    tokenizer = build_word_tokenizer(TEXTS, vocabulary_size=8)
    # good 3, bad 2, film 2, then , . a ugly once each: of equals the first in the alphabet
    assert tokenizer.convert_ids_to_tokens(range(len(tokenizer))) == [
        *("[PAD]", "[UNK]", "[CLS]", "[SEP]", "good", "bad", "film", ",")
    ]
    assert tokenizer("GOOD ugly film").input_ids == [2, 4, 1, 6, 3]
    assert tokenizer("bad e\u0301").input_ids == tokenizer("bad \u00e9").input_ids
    assert build_word_tokenizer(TEXTS[::-1], vocabulary_size=8).get_vocab() == tokenizer.get_vocab()
    assert (tokenizer.pad_token_id, tokenizer.model_input_names) == (0, ["input_ids", "attention_mask"])
    kept = build_word_tokenizer(TEXTS, lower_case=False)
    assert kept("Good").input_ids != kept("good").input_ids != kept("GOOD").input_ids == [2, 1, 3]


def test_no_vocabulary_is_refused() -> None:
    with pytest.raises(ValueError, match="there is no word in the texts"):
        build_word_tokenizer([" "])
    with pytest.raises(ValueError, match="vocabulary_size must be above 4, the special tokens, got 4"):
        build_word_tokenizer(TEXTS, vocabulary_size=4)


def test_labels_have_names() -> None:
    kind = ClassLabel(names=["no", "yes"])
    assert [label_name("a"), label_name(3), label_name(1, kind)] == ["a", "3", "yes"]
    for value in (None, " "):
        with pytest.raises(ValueError, match="null or empty"):
            label_name(value)
    with pytest.raises(ValueError, match="the label is -1, which names none of no, yes"):
        label_name(-1, kind)
    with pytest.raises(ValueError, match=r"the label is 0\.5: a class is a string or an integer"):
        label_name(0.5)


def test_classes_are_in_order() -> None:
    def names(labels: list[object]) -> list[str]:
        return class_names(Dataset.from_dict({"label": labels}), "label")

    assert names([10, 9, -1, 9]) == names(["10", "9", "-1"]) == ["-1", "9", "10"]
    assert names(["b", "a", "10"]) == ["10", "a", "b"]
    features = Features({"label": ClassLabel(names=["z", "y", "x"])})
    assert class_names(Dataset.from_dict({"label": [1, 1]}, features=features), "label") == ["z", "y", "x"]


def test_rows_are_cut_measured_and_not_padded() -> None:
    tokenizer = build_word_tokenizer(TEXTS)
    rows = Dataset.from_dict({"text": TEXTS, "label": ["p", "n", "p"], "other": [1, 2, 3]})
    options = {"text_column": "text", "label_column": "label", "max_length": 5, "length_column": "tokens"}
    made = prepare_classification(rows, tokenizer, {"n": 0, "p": 1}, **options)
    assert made.column_names == ["input_ids", "attention_mask", "labels", "tokens"]
    words = [tokenizer.convert_ids_to_tokens(ids)[1:-1] for ids in made["input_ids"]]
    assert words == [["good", "film", ","], ["a", "bad", "film"], ["good", "bad", "ugly"]]
    assert (made["labels"][:], made["tokens"][:]) == ([1, 0, 1], [5, 5, 5])
    assert made.features["labels"] == Value("int64")
    short = prepare_classification(rows, tokenizer, {"n": 0, "p": 1}, **(options | {"max_length": 9}))
    assert short["tokens"][:] == [7, 5, 5] == [len(ids) for ids in short["input_ids"]]
    unlabelled = prepare_classification(rows, tokenizer, {}, **(options | {"label_column": None}))
    assert unlabelled.column_names == ["input_ids", "attention_mask", "tokens"]
    assert unlabelled["input_ids"][:] == made["input_ids"][:]
    kept = prepare_classification(rows, tokenizer, {}, **(options | {"label_column": None, "keep": ["other"]}))
    assert kept["other"][:] == [1, 2, 3] and kept["input_ids"][:] == made["input_ids"][:]
    with pytest.raises(ValueError, match="row 2: the label 'n' is none of p, q"):
        prepare_classification(rows, tokenizer, {"p": 0, "q": 1}, **options)


def test_noise_replaces_its_share_by_frequent_words() -> None:
    noise = WordNoise(["a a a b"], share=0.25, seed=3)
    text = " ".join(["x"] * 40_000)
    counts = Counter(noise(text, 0).split())
    assert counts["x"] == pytest.approx(30_000, abs=400)
    assert counts["a"] / counts["b"] == pytest.approx(3, abs=0.2)


def test_noise_is_the_same_in_every_run_and_another_in_every_row() -> None:
    text = "one two  three\tfour " * 10
    noisy = [WordNoise([text], share=0.5)(text, row) for row in (0, 1)]
    assert noisy == [WordNoise([text], share=0.5)(text, row) for row in (0, 1)]
    assert noisy[0] != noisy[1] != WordNoise([text], share=0.5, seed=1)(text, 1)
    assert all(len(line.split()) == 40 for line in noisy)
    assert WordNoise([text], share=0.0)(text, 0).split() == text.split()
    assert set(WordNoise(["z"], share=1.0)(text, 0).split()) == {"z"}


def test_as_many_rows_of_each_class_are_drawn() -> None:
    labels = ["b", "a", "a", "c", "b", "a", "c", "b", "a", "c"] * 5
    drawn = drawn_by_class(labels, 4, seed=3)
    assert drawn == sorted(set(drawn)) == drawn_by_class(labels, 4, seed=3)
    assert Counter(labels[row] for row in drawn) == {"a": 4, "b": 4, "c": 4}
    assert drawn != drawn_by_class(labels, 4, seed=4)
    # The draw of one class does not depend on how many rows others have.
    more = [*labels, *["b"] * 9]
    of_a = [row for row in drawn if labels[row] == "a"]
    assert [row for row in drawn_by_class(more, 4, seed=3) if more[row] == "a"] == of_a
    counts = Counter(row for seed in range(400) for row in drawn_by_class([0, 0, 0, 0, 1], 1, seed))
    assert counts[4] == 400 and all(counts[row] == pytest.approx(100, abs=35) for row in range(4))
    with pytest.raises(ValueError, match=r"16 rows of each class .* there are only \{'b': 15, 'c': 15\}"):
        drawn_by_class(labels, 16, seed=0)
