"""Errors against the hidden truth, by what labels say, in numbers worked out by hand."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import head_runs
import pytest
import tiny
import torch

from hf_ema_scaling.labels import LabelKind, MultiLabelLabeler, PseudoLabel, TokenLabeler
from hf_ema_scaling.training.calibration import calibration
from hf_ema_scaling.training.hidden import HiddenReferences, hidden_metrics


def told(kind: LabelKind | None, truth: list[Any], labels: list[PseudoLabel], **more: Any) -> dict[str, float]:
    counts: Counter[str] = Counter()
    references = HiddenReferences(datasets.Dataset.from_dict({"truth": truth}), None, kind=kind, **more)
    references.count(labels, range(len(labels)), lambda name, number: counts.update({name: number}))
    return hidden_metrics(counts)


def test_a_regression_has_a_mean_absolute_error() -> None:
    labels = [
        PseudoLabel((), 1.0, values=(1.5,)),
        PseudoLabel((), 1.0, values=(-2.0,)),
        PseudoLabel((), 1.0, "disagree", values=(9.0,)),
    ]
    assert told(LabelKind.NUMBERS, [1.0, 1.0, 4.0], labels) == {
        "hidden/mae": pytest.approx((0.5 + 3) / 2),
        "hidden/mae_all": pytest.approx((0.5 + 3 + 5) / 3),
    }


def test_several_classes_are_judged_class_by_class() -> None:
    labels = [
        PseudoLabel((1, 2), 0.9, values=(0.0, 1.0, 1.0, 0.0)),
        PseudoLabel((), 0.9, values=(0.0, 0.0, 0.0, 0.0)),
    ]
    found = told(LabelKind.CLASSES, [[1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 0.0, 1.0]], labels, outputs=4)
    assert found["hidden/error"] == pytest.approx(3 / 8)
    with pytest.raises(ValueError, match="has 3 numbers in its first row, and the model 4 outputs"):
        told(LabelKind.CLASSES, [[1.0, 1.0, 0.0]], labels, outputs=4)


def test_only_words_with_a_label_count() -> None:
    labels = [
        PseudoLabel((1, -100, 2, 0), 0.9),
        PseudoLabel((1, 1), 0.3, "confidence"),
        PseudoLabel((), 0.0, "empty"),
    ]
    truth = [[1, 2, -100, 1, 0], [1, 2], [2]]
    assert told(LabelKind.WORDS, truth, labels) == {
        "hidden/error": pytest.approx(1 / 3),
        "hidden/error_all": pytest.approx((1 + 1) / 5),
    }
    with pytest.raises(ValueError, match=r"hidden_reference_column='truth', row 0: .* 4 and 3 words"):
        told(LabelKind.WORDS, [[1, 2, 0]], labels[:1])


def test_rows_whose_truth_nobody_knows_are_left_out() -> None:
    labels = [PseudoLabel((1,), 0.9), PseudoLabel((1,), 0.9)]
    assert told(LabelKind.CLASS, [2, None], labels)["hidden/error"] == 1.0


@pytest.mark.parametrize(
    ("problem", "outputs", "gold", "truth", "name"),
    [
        ("regression", 1, 0.5, 100.0, "mae"),
        ("multi_label_classification", 3, [0.0, 1.0, 1.0], [1.0, 1.0, 1.0], "error"),
    ],
)
def test_a_run_logs_the_metric_of_its_head(
    tmp_path: Path, problem: str, outputs: int, gold: Any, truth: Any, name: str
) -> None:
    train = tiny.sentences(9).remove_columns("labels").add_column("labels", [gold] * 9).with_format("torch")
    made = head_runs.texts(tmp_path, head_runs.classifier(problem, outputs), train, logging_strategy="steps")
    hidden = made["unlabeled_dataset"].remove_columns("labels").add_column("truth", [truth] * 12)
    made["unlabeled_dataset"] = hidden.with_format("torch")
    made["pseudo_label_args"] = tiny.pseudo(hidden_reference_column="truth")
    made["args"].logging_steps = 1
    trainer = tiny.trainer(**made, callbacks=[unwatched := tiny.Unwatched()])
    unwatched.trainer = trainer
    trainer.train()
    logged = [log[f"hidden/{name}"] for log in trainer.state.log_history if f"hidden/{name}" in log]
    assert len(logged) == 3
    # A random model says numbers near zero; and it cannot be wrong in more than three classes of three.
    assert all(98 < one < 102 for one in logged) if name == "mae" else all(0 < one <= 1 for one in logged)


def test_calibration_counts_what_counts(tmp_path: Path) -> None:
    """Several classes are compared class by class, and words that are not sure enough not at all."""
    several = MultiLabelLabeler(4)
    gold = torch.tensor([[1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 0.0]])
    batch = {"logits": torch.tensor([[-3.0, 3.0, 3.0, -3.0], [-3.0, -3.0, 3.0, -3.0]]), "labels": gold}

    def classes(inputs: Any, rows: Any) -> list[PseudoLabel]:
        return several.from_logits(inputs["logits"])

    found = calibration([(range(2), batch)], classes, several, lambda total: total, LabelKind.CLASSES)
    assert found["calibration/error"] == pytest.approx(2 / 8)
    tagger = TokenLabeler({0: "a", 1: "b", 2: "c"}, min_word_confidence=0.6)
    logits = torch.tensor([[[5.0, 0, 0], [0, 5.0, 0], [0, 0.1, 0], [0, 0, 5.0]]])
    batch = {"logits": logits, "word_ids": torch.tensor([[0, 1, 2, 3]]), "labels": torch.tensor([[0, 2, 1, 2]])}

    def words(inputs: Any, rows: Any) -> list[PseudoLabel]:
        return tagger.from_logits(inputs["logits"], inputs["word_ids"])

    found = calibration([(range(2), batch)], words, tagger, lambda total: total, LabelKind.WORDS)
    assert found["calibration/error"] == pytest.approx(1 / 3)
    made = head_runs.texts(tmp_path, head_runs.classifier("regression", 1))
    with pytest.raises(ValueError, match="calibration_rows=2 compares confidence with accuracy, and a regression has"):
        tiny.trainer(**(made | {"pseudo_label_args": tiny.pseudo(calibration_rows=2)}))
