from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from transformers import EvalPrediction, Wav2Vec2CTCTokenizer

from hf_ema_scaling.metrics import (
    CharacterErrorRate,
    ClassificationMetrics,
    CTCMetrics,
    TextMetrics,
    TokenMetrics,
    WordErrorRate,
    character_error_rate,
    exact_match,
    word_error_rate,
)

REFERENCES = ["open the door", "stop", "one two"]
PREDICTIONS = ["open a door now", "", "one two"]  # a substitution, an insertion, a deletion; 6 words


def test_rates_are_of_the_whole_set() -> None:
    assert word_error_rate(REFERENCES, PREDICTIONS) == 3 / 6
    # "the" -> "a" costs 3, " now" 4, "stop" 4; 13 + 4 + 7 characters
    assert character_error_rate(REFERENCES, PREDICTIONS) == 11 / 24


def test_evaluate_metrics_agree_and_need_no_network(tmp_path: Path) -> None:
    wer, cer = WordErrorRate(cache_dir=str(tmp_path)), CharacterErrorRate(cache_dir=str(tmp_path))
    assert wer.compute(references=REFERENCES, predictions=PREDICTIONS) == {"wer": 0.5}
    cer.add_batch(references=REFERENCES[:2], predictions=PREDICTIONS[:2])
    cer.add_batch(references=REFERENCES[2:], predictions=PREDICTIONS[2:])
    assert cer.compute() == {"cer": 11 / 24}


@pytest.mark.parametrize("rate", [word_error_rate, character_error_rate])
def test_what_is_heard_where_nothing_was_said_is_an_insertion(rate: Callable[[list[str], list[str]], float]) -> None:
    assert rate(["", "a b c"], ["x", "a b c"]) == pytest.approx(1 / (3 if rate is word_error_rate else 5))


@pytest.mark.parametrize("rate", [word_error_rate, character_error_rate])
def test_what_has_no_rate_is_refused(rate: object) -> None:
    assert callable(rate)
    with pytest.raises(ValueError, match="all 2 references are empty"):
        rate(["", " "], ["a", "b"])
    with pytest.raises(ValueError, match="no references"):
        rate([], [])
    with pytest.raises(ValueError, match="2 references, but 1 predictions"):
        rate(["a", "b"], ["a"])


def test_label_ids_are_decoded_without_merging_doubled_letters(tmp_path: Path) -> None:
    vocabulary = {token: i for i, token in enumerate(["<pad>", "|", "<unk>", "e", "h", "l", "o"])}
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
    tokenizer = Wav2Vec2CTCTokenizer(str(tmp_path / "vocab.json"), bos_token=None, eos_token=None)
    hello, helo = [4, 3, 5, 5, 6], [4, 3, 5, 6, -100]
    metrics = CTCMetrics(tokenizer, blank_id=0)
    labels = np.array([[*hello, 1, *hello], [*hello, *[-100] * 6]])
    right = np.array([[*hello, 1, *hello, 0], [*hello, *[-100] * 7]])
    assert metrics.compute(EvalPrediction(predictions=right, label_ids=labels)) == {"wer": 0.0, "cer": 0.0}
    wrong = metrics.compute(EvalPrediction(predictions=np.array([helo, hello]), label_ids=np.array([hello, hello])))
    assert wrong == {"wer": 0.5, "cer": 0.1}
    with pytest.raises(ValueError, match="predictions must be label ids"):
        metrics.compute(EvalPrediction(predictions=np.zeros((2, 5, 7), dtype=np.float32), label_ids=labels))


def test_a_classifier_is_right_where_its_largest_logit_is() -> None:
    logits = np.array([[0.1, 2.0, -1.0], [3.0, 3.0, 0.0], [-2.0, -1.0, -3.0], [0.0, 0.0, 9.0]], dtype=np.float32)
    found = ClassificationMetrics(3).compute(EvalPrediction(predictions=logits, label_ids=np.array([1, 1, 0, 2])))
    assert found == {"accuracy": 0.5, "error_rate": 0.5}
    found = ClassificationMetrics(3).compute(EvalPrediction(predictions=logits, label_ids=np.array([1, 0, 1, 0])))
    assert found == {"accuracy": 0.75, "error_rate": 0.25}


@pytest.mark.parametrize(
    ("logits", "labels", "message"),
    [
        (np.zeros((2, 3)), np.array([0, 3]), r"label_ids must lie in \[0, 3\), got 3"),
        (np.zeros((2, 3)), np.array([0, -100]), "got -100"),
        (np.zeros((2, 2)), np.array([0, 1]), r"logits \(rows, 3\) .* got shapes \(2, 2\) and \(2,\)"),
        (np.zeros((0, 3)), np.array([], dtype=int), "at least one row"),
        (np.array([[0, 0, 1], [0, np.nan, 0]]), np.array([0, 1]), r"1 of 2 rows are NaN \(rows \[1\]\)"),
    ],
)
def test_what_has_no_accuracy_is_refused(logits: np.ndarray, labels: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ClassificationMetrics(3).compute(EvalPrediction(predictions=logits, label_ids=labels))


TAGS = ["O", "B-a", "I-a", "B-b", "I-b"]


def tagged(references: list[str], predictions: list[str]) -> EvalPrediction:
    """Rows of tags as logits and labels; `-` in a reference is a token without a label."""
    width = max(len(row.split()) for row in references)
    labels = np.full((len(references), width), -100)
    logits = np.zeros((len(references), width, len(TAGS)))
    for row, (wanted, found) in enumerate(zip(references, predictions, strict=True)):
        for place, (true, said) in enumerate(zip(wanted.split(), found.split(), strict=True)):
            labels[row, place] = -100 if true == "-" else TAGS.index(true)
            logits[row, place, TAGS.index(said)] = 1.0
    return EvalPrediction(predictions=logits, label_ids=labels)


def test_spans_are_right_as_a_whole_or_not_at_all() -> None:
    references = ["- B-a I-a O B-b -", "B-a O", "O O"]
    # The first span is cut short, the second right; one is of the wrong type; one is made up.
    predictions = ["B-b B-a O O B-b I-b", "B-b O", "I-a O"]
    found = TokenMetrics(TAGS).compute(tagged(references, predictions))
    # Right 1, predicted 2 + 1 + 1, actual 2 + 1; words: 3 of 4, 1 of 2, 1 of 2.
    assert found == pytest.approx({"precision": 1 / 4, "recall": 1 / 3, "f1": 2 / 7, "accuracy": 5 / 8})


@pytest.mark.parametrize(
    ("reference", "prediction", "f1"),
    [
        ("B-a I-a B-a", "B-a I-a B-a", 1.0),
        ("B-a I-a B-a", "B-a I-a I-a", 0.0),  # one long span instead of two
        ("B-a I-a O", "I-a I-a O", 1.0),  # an inside without a begin begins
        ("B-a I-a O", "B-a I-b O", 0.0),
        ("B-a - I-a", "B-a O I-a", 1.0),  # what has no label does not cut
        ("O O", "O O", 0.0),
        ("B-b O", "O O", 0.0),
    ],
)
def test_f1_of_one_row(reference: str, prediction: str, f1: float) -> None:
    assert TokenMetrics(TAGS).compute(tagged([reference], [prediction]))["f1"] == f1


def test_classes_that_are_no_bio_tags_have_an_accuracy_only() -> None:
    evaluated = tagged(["O B-a - I-a"], ["O O O I-a"])
    assert TokenMetrics(["x", "y", "z", "u", "v"]).compute(evaluated) == {"accuracy": pytest.approx(2 / 3)}


def test_what_has_no_f1_is_refused() -> None:
    metrics, good = TokenMetrics(TAGS), tagged(["O B-a"], ["O B-a"])
    logits, labels = np.asarray(good.predictions), np.asarray(good.label_ids)
    for broken, tags, message in (
        (logits[:, :, :4], labels, r"predictions must be logits \(rows, tokens, 5\)"),
        (logits, labels[:, :1], "got shapes"),
        (logits, np.full((1, 2), -100), "no token has a label"),
        (logits, np.array([[0, 5]]), r"label_ids must lie in \[0, 5\) or be -100, got 5"),
        (logits * np.nan, labels, "the logits of 2 words are NaN"),
    ):
        with pytest.raises(ValueError, match=message):
            metrics.compute(EvalPrediction(predictions=broken, label_ids=tags))


class Words:
    """A tokenizer: id 2 is the end, the others are words."""

    names = ("Open", "door.", "", "the", "open", "door")

    def decode(self, ids: list[int], *, skip_special_tokens: bool) -> str:
        assert skip_special_tokens
        return "  ".join(self.names[i] for i in ids if i != 2)


def test_metrics_of_generated_texts_normalise_both_sides() -> None:
    rates = {"wer": word_error_rate, "exact_match": exact_match}
    found = EvalPrediction(
        predictions=np.array([[4, 3, 5, 2, -100], [4, 3, 3, 5, 2]]),
        label_ids=np.array([[0, 3, 1, 2], [4, 5, 2, -100]]),
    )
    metrics = TextMetrics(Words(), rates, lambda text: text.lower().replace(".", ""))
    assert metrics.compute(found) == {"wer": 2 / 5, "exact_match": 1 / 2}
    assert TextMetrics(Words(), rates).compute(found) == {"wer": 4 / 5, "exact_match": 0.0}
    logits = EvalPrediction(predictions=np.zeros((2, 3, 4)), label_ids=np.zeros((2, 3), dtype=int))
    with pytest.raises(ValueError, match=r"predictions must be generated ids .* set predict_with_generate"):
        metrics.compute(logits)
