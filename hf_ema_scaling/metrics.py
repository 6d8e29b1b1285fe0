"""Error rates of texts as `evaluate` metrics that need no download, the accuracy of a classifier, and F1 of spans."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import datasets
import evaluate
import jiwer
import numpy as np
from transformers import EvalPrediction

from hf_ema_scaling.spans import is_bio, spans


def _checked(references: Sequence[str], predictions: Sequence[str]) -> tuple[list[str], list[str]]:
    if len(references) != len(predictions):
        raise ValueError(f"{len(references)} references, but {len(predictions)} predictions: give one for each")
    if not len(references):
        raise ValueError("no references: an error rate needs at least one")
    if not any(text.strip() for text in references):
        raise ValueError(
            f"all {len(references)} references are empty: an error rate divides by their length, so give an "
            "evaluation set with texts"
        )
    return list(references), list(predictions)


def word_error_rate(references: Sequence[str], predictions: Sequence[str]) -> float:
    """Word substitutions, deletions and insertions of all rows over the words of all references.

    Raises:
        ValueError: when there are no references, all of them are empty, or the numbers of rows differ.
    """
    return float(jiwer.wer(*_checked(references, predictions)))


def character_error_rate(references: Sequence[str], predictions: Sequence[str]) -> float:
    """As `word_error_rate`, counted in characters, spaces included."""
    return float(jiwer.cer(*_checked(references, predictions)))


class _TextErrorRate(evaluate.Metric):
    """Strings in, one rate out; the description lives here instead of on a hub."""

    description: str

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=self.description,
            citation="",
            inputs_description="references and predictions: one string each per row",
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.Value("string")}
            ),
        )


class WordErrorRate(_TextErrorRate):
    """`word_error_rate` as an `evaluate.Metric`: `compute(references=, predictions=)` gives `{"wer": float}`."""

    description = "Word error rate: word edits over reference words, of the whole set."

    def _compute(self, predictions: list[str], references: list[str]) -> dict[str, float]:
        return {"wer": word_error_rate(references, predictions)}


class CharacterErrorRate(_TextErrorRate):
    """`character_error_rate` as an `evaluate.Metric`: `compute(...)` gives `{"cer": float}`."""

    description = "Character error rate: character edits over reference characters, of the whole set."

    def _compute(self, predictions: list[str], references: list[str]) -> dict[str, float]:
        return {"cer": character_error_rate(references, predictions)}


class CTCMetrics:
    """WER and CER of collapsed label ids, for `Trainer(compute_metrics=CTCMetrics(tokenizer, blank_id).compute)`.

    Predictions and references are decoded alike, without merging repeats: these are label ids, in which a doubled
    letter is two tokens.

    Args:
        tokenizer: decodes the ids.
        blank_id: id of the CTC blank, removed from both sides.
    """

    def __init__(self, tokenizer: Any, blank_id: int) -> None:
        self.tokenizer = tokenizer
        self.blank_id = blank_id

    def compute(self, eval_prediction: EvalPrediction) -> dict[str, float]:
        """`{"wer": ..., "cer": ...}` of `predictions` and `label_ids`, int arrays (rows, length) padded with -100.

        Raises:
            ValueError: when the predictions are not label ids (frame logits, say), or a reference is empty.
        """
        references = self._decode(eval_prediction.label_ids, "label_ids")
        predictions = self._decode(eval_prediction.predictions, "predictions")
        return {
            "wer": word_error_rate(references, predictions),
            "cer": character_error_rate(references, predictions),
        }

    def _decode(self, rows: Any, name: str) -> list[str]:
        ids = np.asarray(rows)
        if ids.ndim != 2 or not np.issubdtype(ids.dtype, np.integer):
            raise ValueError(
                f"{name} must be label ids (rows, length), already collapsed and padded with -100, got {ids.dtype} of "
                f"shape {ids.shape}"
            )
        kept = (ids != -100) & (ids != self.blank_id)
        return [
            self.tokenizer.decode(row[keep].tolist(), group_tokens=False) for row, keep in zip(ids, kept, strict=True)
        ]


def exact_match(references: Sequence[str], predictions: Sequence[str]) -> float:
    """Share of the rows whose prediction is the reference, in [0, 1]; errors as of `word_error_rate`."""
    wanted, found = _checked(references, predictions)
    return sum(one == other for one, other in zip(wanted, found, strict=True)) / len(wanted)


class TextMetrics:
    """Metrics of texts that a model generated, for `Trainer(compute_metrics=TextMetrics(...).compute)`.

    Both sides are decoded without special tokens, normalised, and their white space made single spaces.

    Args:
        tokenizer: decodes the ids.
        rates: functions of references and predictions, such as `word_error_rate`, by the names of their metrics.
        normalise: what is done to the texts of both sides, such as making them lower case.
    """

    def __init__(
        self,
        tokenizer: Any,
        rates: Mapping[str, Callable[[Sequence[str], Sequence[str]], float]],
        normalise: Callable[[str], str] = str,
    ) -> None:
        self.tokenizer = tokenizer
        self.rates = dict(rates)
        self.normalise = normalise

    def compute(self, eval_prediction: EvalPrediction) -> dict[str, float]:
        """The metrics of `predictions` and `label_ids`, int arrays (rows, tokens); -100 is padding.

        Raises:
            ValueError: when the predictions are no ids (logits, say), or all references are empty.
        """
        references = self._texts(eval_prediction.label_ids, "label_ids")
        predictions = self._texts(eval_prediction.predictions, "predictions")
        return {name: rate(references, predictions) for name, rate in self.rates.items()}

    def _texts(self, rows: Any, name: str) -> list[str]:
        ids = np.asarray(rows)
        if ids.ndim != 2 or not np.issubdtype(ids.dtype, np.integer):
            raise ValueError(
                f"{name} must be generated ids (rows, tokens), got {ids.dtype} of shape {ids.shape}: set "
                "predict_with_generate"
            )
        texts = [self.tokenizer.decode(row[row >= 0].tolist(), skip_special_tokens=True) for row in ids]
        return [" ".join(self.normalise(text).split()) for text in texts]


class ClassificationMetrics:
    """Accuracy and error rate of a classifier, for `Trainer(compute_metrics=ClassificationMetrics(classes).compute)`.

    Args:
        classes: number of classes.
    """

    def __init__(self, classes: int) -> None:
        self.classes = classes

    def compute(self, eval_prediction: EvalPrediction) -> dict[str, float]:
        """`{"accuracy": ..., "error_rate": ...}`, shares of the rows; they add up to 1.

        A row is right where the largest logit, the first of equals, is that of its label.

        Args:
            eval_prediction: `predictions`, float logits (rows, classes), and `label_ids`, int (rows,).

        Raises:
            ValueError: for other shapes, no rows, logits that are NaN, or a label that is no class.
        """
        logits, labels = np.asarray(eval_prediction.predictions), np.asarray(eval_prediction.label_ids)
        if labels.ndim != 1 or logits.shape != (len(labels), self.classes) or not len(labels):
            raise ValueError(
                f"predictions must be logits (rows, {self.classes}) and label_ids (rows,), at least one row, got "
                f"shapes {logits.shape} and {labels.shape}"
            )
        unknown = labels[(labels < 0) | (labels >= self.classes)]
        if len(unknown):
            raise ValueError(f"label_ids must lie in [0, {self.classes}), got {unknown[0]}")
        nans = np.isnan(logits).any(-1)
        if nans.any():
            raise ValueError(
                f"the logits of {nans.sum()} of {len(labels)} rows are NaN (rows {np.flatnonzero(nans)[:10]})"
            )
        right = int((logits.argmax(-1) == labels).sum())
        return {"accuracy": right / len(labels), "error_rate": 1 - right / len(labels)}


class TokenMetrics:
    """Precision, recall and F1 of spans, for `Trainer(compute_metrics=TokenMetrics(names).compute)`.

    A span is right where type, first and last word are those of the reference; counts are those of the whole set
    (micro-averages), as in CoNLL-2003 and `seqeval`. Tags that do not follow the BIO scheme are read as
    `hf_ema_scaling.spans.repaired` makes them. Words are the tokens that have a label.

    Args:
        names: of the classes, in the order of their ids.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = list(names)
        self.bio = is_bio(self.names)

    def compute(self, eval_prediction: EvalPrediction) -> dict[str, float]:
        """`accuracy` of the words, and where the classes are BIO tags `precision`, `recall` and `f1` of spans.

        Without spans on a side its rate is 0.

        Args:
            eval_prediction: `predictions`, float logits (rows, tokens, classes), and `label_ids`, int (rows, tokens),
                -100 where a token has no label.

        Raises:
            ValueError: for other shapes, no labels, logits of a word that are NaN, or a label that is no class.
        """
        logits, labels = np.asarray(eval_prediction.predictions), np.asarray(eval_prediction.label_ids)
        if labels.ndim != 2 or logits.shape != (*labels.shape, len(self.names)):
            raise ValueError(
                f"predictions must be logits (rows, tokens, {len(self.names)}) and label_ids (rows, tokens), got "
                f"shapes {logits.shape} and {labels.shape}"
            )
        words = labels != -100
        if not words.any():
            raise ValueError("no token has a label: give an evaluation set with tags")
        unknown = labels[words & ((labels < 0) | (labels >= len(self.names)))]
        if len(unknown):
            raise ValueError(f"label_ids must lie in [0, {len(self.names)}) or be -100, got {unknown[0]}")
        nans = np.isnan(logits).any(-1) & words
        if nans.any():
            raise ValueError(f"the logits of {nans.sum()} words are NaN (rows {np.flatnonzero(nans.any(-1))[:10]})")
        best = logits.argmax(-1)
        metrics = {"accuracy": float((best == labels)[words].mean())}
        if not self.bio:
            return metrics
        right = predicted = actual = 0
        for row, kept in enumerate(words):
            found, wanted = (set(spans([self.names[i] for i in ids[row][kept]])) for ids in (best, labels))
            right, predicted, actual = right + len(found & wanted), predicted + len(found), actual + len(wanted)
        return {
            **metrics,
            "precision": right / max(predicted, 1),
            "recall": right / max(actual, 1),
            "f1": 2 * right / max(predicted + actual, 1),
        }
