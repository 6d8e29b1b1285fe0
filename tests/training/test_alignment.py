"""Alignment in a run: what the student learns, what is saved, and what is refused."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import collapse_runs
import datasets
import numpy as np
import pytest
import tiny
import torch
from torch import Tensor

from hf_ema_scaling.labels import ClassLabeler, PseudoLabel
from hf_ema_scaling.training import PseudoLabelArguments


class Leaning(ClassLabeler):
    """A teacher that knows the class of a row by its first token, not for sure, and leans to class 0."""

    def label(self, teacher: Callable[..., Any], batch: Mapping[str, Tensor]) -> list[PseudoLabel]:
        known = torch.nn.functional.one_hot(batch["input_ids"][:, 0] % 3, 3).float()
        # Tokens of the second half say nothing.
        known[batch["input_ids"][:, 0] > 8] *= 0.2
        return self.from_logits(known * 2 + torch.tensor([1.0, 0.0, 0.0]))


def trainer(folder: Path, soft: bool = False, pl: Any = None, **changes: Any) -> Any:
    pl = {"align_labels": "all", **(pl or {})}
    return collapse_runs.trainer(folder, planted=False, labeler=Leaning(3, soft=soft), pl=pl, **changes)


def shares(made: Any) -> np.ndarray[Any, Any]:
    """Of classes among all pseudo-labels that the student was trained on."""
    targets = made.label_statistics.window.targets
    return targets / targets.sum()


@pytest.mark.parametrize(("soft", "near"), [(False, 0.2), (True, 0.07)])
def test_the_student_learns_classes_as_frequent_as_those_of_labelled_rows(
    tmp_path: Path, soft: bool, near: float
) -> None:
    found = {}
    for align in (None, "all"):
        made = trainer(tmp_path / str(align), soft, {"align_labels": align, "on_collapse": "off"})
        made.train()
        found[align] = shares(made)
    labelled = np.bincount(made.train_dataset["labels"], minlength=3) / len(made.train_dataset)
    assert found[None][0] > 0.5
    assert np.abs(found["all"] - labelled).max() < near < np.abs(found[None] - labelled).max()


def test_a_resumed_run_goes_on_bit_for_bit(tmp_path: Path) -> None:
    whole = trainer(tmp_path / "whole", True)
    whole.train()
    again = trainer(tmp_path / "again", True)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-25"))
    assert tiny.same_bits(tiny.parameters(again.model), tiny.parameters(whole.model))
    (kept,) = whole.judge.chain.state_dict().values()
    assert kept == next(iter(again.judge.chain.state_dict().values())) and kept["steps"] == pytest.approx(30.0)
    plain = trainer(tmp_path / "plain", True, {"align_labels": None})
    plain.train()
    assert not tiny.same_bits(tiny.parameters(plain.model), tiny.parameters(whole.model))


def test_shifts_at_the_end_are_the_same_at_every_kappa_and_split(tmp_path: Path) -> None:
    """The labels of `Leaning` do not depend on weights, so nothing but the data is left."""
    shifts = []
    for kappa, rows in ((1.0, 16), (4.0, 16), (4.0, 3)):
        made = trainer(tmp_path / f"{kappa}-{rows}", kappa=kappa, per_device_train_batch_size=rows)
        made.train()
        shifts.append(made.judge.alignment.alignment.shifts())
    assert shifts[1] == pytest.approx(shifts[0], rel=1e-6) and (shifts[1] == shifts[2]).all()
    assert shifts[0][0, 0] < -0.2 < 0 < shifts[0][0, 1]


def test_sources_are_aligned_one_by_one(tmp_path: Path) -> None:
    """Rows of source a say class 1, and rows of b say 2, a little louder than the teacher leans to 0."""
    tokens = [[token, 2, 3, 4, 5, 6] for token in (1, 2) * 200]
    rows = {"input_ids": tokens, "origin": [f"source {token}" for token in (1, 2) * 200]}
    unlabelled = datasets.Dataset.from_dict(rows).with_format("torch")
    named = {"source_column": "origin", "on_collapse": "off"}
    found = {}
    for align in ("all", "source"):
        made = trainer(tmp_path / align, True, {**named, "align_labels": align}, unlabelled=unlabelled)
        made.train()
        found[align] = made.judge.alignment.alignment.shifts()
    assert found["all"].shape == (1, 3) and found["source"].shape == (2, 3)
    # Where all rows say class 1 it is made rarer, and the other two alike.
    assert found["source"][0, 1] < -0.4 < 0.1 < min(found["source"][0, [0, 2]])
    assert found["source"][1, 2] < -0.4 < 0.1 < min(found["source"][1, [0, 1]])
    # Together they say 1 as often as 2, of which labelled rows have 27 and 17.
    assert found["all"][0, 2] < -0.2 < 0.1 < found["all"][0, 1]


def test_what_cannot_work_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="align_labels must be one of all, source, got 'some'"):
        PseudoLabelArguments(align_labels="some")
    with pytest.raises(ValueError, match="name their column by source_column"):
        PseudoLabelArguments(align_labels="source")
    with pytest.raises(ValueError, match=r"of a ClassLabeler, and the labeler is a Classes"):
        collapse_runs.trainer(tmp_path, planted=False, pl={"align_labels": "all"})
