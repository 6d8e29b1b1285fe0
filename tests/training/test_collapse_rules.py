"""Collapse of skewed classes, of several classes and of numbers: the rules on counts of labels, without a run."""

from __future__ import annotations

import json
from pathlib import Path

import head_runs
import numpy as np
import pytest
import tiny
import torch

from hf_ema_scaling.labels import MultiLabelLabeler, PseudoLabel
from hf_ema_scaling.training.classes_by_step import MOST_STEPS, ClassesByStep, minority_of_parts
from hf_ema_scaling.training.collapse import CollapseError, CollapseGuard, signs_of_collapse
from hf_ema_scaling.training.label_counts import MASS, LabelCounts

SKEWS = (0.5, 0.8, 0.95)


def counts_of(labels: torch.Tensor, *, numbers: bool = False) -> LabelCounts:
    counts = LabelCounts(numbers)
    counts.add_targets(labels, None)
    values = labels.tolist()
    counts.add_used(PseudoLabel((), 1.0, values=(one,)) if numbers else PseudoLabel((one,), 0.9) for one in values)
    return counts


def two_classes(share: float, rows: int = 1000) -> torch.Tensor:
    """As many zeros as the share says, and ones."""
    return (torch.arange(rows) >= round(share * rows)).long()


def window(found: torch.Tensor, gold: torch.Tensor, *, numbers: bool = False) -> dict[str, float]:
    counts = counts_of(found, numbers=numbers)
    metrics = counts.metrics(counts_of(gold, numbers=numbers))
    return {**metrics, "rows": float(len(found)), "targets": float(counts.targets.sum()) / MASS}


@pytest.mark.parametrize("skew", SKEWS)
def test_a_constant_majority_class_is_collapse_however_skewed_the_data_are(skew: float) -> None:
    gold = two_classes(skew, 4000)
    signs = signs_of_collapse(window(two_classes(1.0), gold), None)
    assert f"0.00% of labels are not their most frequent class or token, {1 - skew:.2%} in the labelled data" in signs
    # Also where a few others are left, and where it is the other class.
    assert signs_of_collapse(window(two_classes(1 - 0.05 * (1 - skew)), gold), None) != []
    assert len(signs_of_collapse(window(two_classes(0.0), gold), None)) == 2
    # What was so from the start of a healthy run is no change.
    healthy = {"rows": 1000.0, "pseudo/minority": 0.0, "pseudo/kl": 10.0}
    assert signs_of_collapse(window(two_classes(1.0), gold), healthy) == []


@pytest.mark.parametrize("skew", SKEWS)
def test_other_shares_of_the_same_classes_are_no_collapse(skew: float) -> None:
    gold = two_classes(skew, 4000)
    for share in {skew - 0.2, skew - 0.1, skew, skew + 0.5 * (1 - skew), skew + 0.8 * (1 - skew)}:
        assert signs_of_collapse(window(two_classes(share), gold), None) == [], share


def test_the_old_limit_of_skewed_data_would_have_been_passed_by_labels_with_more_variety() -> None:
    metrics = window(two_classes(0.85), two_classes(0.95, 4000))
    assert metrics["pseudo/kl"] > 0.8 * metrics["pseudo/kl_limit"] and metrics["pseudo/kl"] < 0.08
    assert metrics["pseudo/minority"] == pytest.approx(0.15)
    assert metrics["pseudo/minority_labelled"] == pytest.approx(0.05)


def test_few_labels_of_skewed_data_prove_nothing_and_are_joined() -> None:
    """Of 100 rows 5 are expected to be others, and none is no wonder; of 400 there is no chance left."""
    gold, guard = two_classes(0.95, 4000), CollapseGuard(0.0)
    for number in range(1, 4):
        assert guard.look(window(two_classes(1.0, 100), gold), 10.0 * number) == []
    again = CollapseGuard(0.0)
    again.load_state_dict(json.loads(json.dumps(guard.state_dict())))
    (sign,) = again.look(window(two_classes(1.0, 100), gold), 40.0)
    assert sign.startswith("0.00% of labels are not their most frequent") and again.shares["pseudo/minority"] == [
        0.0,
        0.0,
    ]
    # Windows with others among them are joined as well.
    healthy = CollapseGuard(0.0)
    for number in range(1, 9):
        assert healthy.look(window(two_classes(0.99, 100), gold), 10.0 * number) == []
    assert healthy.healthy_until == 80.0 and healthy.healthy is not None
    assert healthy.healthy["pseudo/minority"] == pytest.approx(0.01)


def several(rows: int, classes: int, share: float, seed: int = 0) -> torch.Tensor:
    """Yes to each class with a probability."""
    return torch.tensor(np.random.default_rng(seed).random((rows, classes)) < share).float()


def several_window(found: torch.Tensor, gold: torch.Tensor) -> dict[str, float]:
    counts, known = LabelCounts(), LabelCounts()
    # In two micro-batches, and through JSON.
    for half in (found[: len(found) // 3], found[len(found) // 3 :]):
        part = LabelCounts()
        part.add_targets(half, None)
        part.add_used(PseudoLabel(tuple(row.nonzero()[0].tolist()), 0.9) for row in (half >= 0.5).numpy())
        counts.merge(LabelCounts.of([json.loads(json.dumps(part.state_dict()))]))
    known.add_targets(gold, None)
    sizes = {name: float(len(found)) for name in ("rows", "yes_rows", "no_rows")}
    return {**counts.metrics(known), **sizes, "targets": float(counts.targets.sum()) / MASS}


@pytest.mark.parametrize("classes", [1, 6])
def test_a_no_to_every_class_is_collapse_and_so_is_a_yes(classes: int) -> None:
    gold = several(2000, classes, 0.3)
    share = float(gold.any(-1).float().mean())
    metrics = several_window(torch.zeros(300, classes), gold)
    assert metrics["pseudo/yes"] == 0.0 and metrics["pseudo/no"] == 1.0
    assert metrics["pseudo/yes_labelled"] == pytest.approx(share)
    (sign,) = signs_of_collapse(metrics, None)
    assert sign == f"0.00% of labels have any class, {share:.2%} in the labelled data"
    # Also with the few yeses that are left, and where students learn probabilities that say no.
    few = torch.zeros(300, classes)
    few[:3, 0] = 1.0
    assert any("have any class" in sign for sign in signs_of_collapse(several_window(few, gold), None))
    soft = several_window(torch.full((300, classes), 0.01), gold)
    assert soft["pseudo/yes"] == pytest.approx(0.01, abs=1e-4)
    assert any(sign.startswith("1.00% of labels have any") for sign in signs_of_collapse(soft, None))
    every = signs_of_collapse(several_window(torch.ones(300, classes), gold), None)
    assert any(sign.startswith("0.00% of labels lack any class") for sign in every)
    # What was so in the first window, and did not become worse, is what these data are like.
    healthy = {"rows": 300.0, "pseudo/yes": 0.01}
    assert signs_of_collapse(several_window(torch.full((300, classes), 0.01), gold), healthy) == []


def test_rare_classes_raise_no_alarm_until_there_are_enough_rows() -> None:
    """One row in fifty has a class: of 100 rows none is no wonder, of 1000 it is."""
    gold, guard = several(20_000, 4, 0.005), CollapseGuard(0.0)
    silent = torch.zeros(100, 4)
    for number in range(1, 11):
        assert guard.look(several_window(silent, gold), 10.0 * number) == []
        again = CollapseGuard(0.0)
        again.load_state_dict(json.loads(json.dumps(guard.state_dict())))
        guard = again
    for number in range(11, 14):
        if signs := guard.look(several_window(silent, gold), 10.0 * number):
            break
    assert len(signs) == 1 and signs[0].startswith("0.00% of labels have any class, 1.9")
    assert number == 11


@pytest.mark.parametrize(("classes", "share"), [(4, 0.005), (40, 0.0005), (40, 0.02), (3, 0.9)])
def test_labels_as_rare_or_frequent_as_the_labelled_ones_raise_no_alarm(classes: int, share: float) -> None:
    gold, guard = several(5000, classes, share), CollapseGuard(0.0)
    for number in range(200):
        assert guard.look(several_window(several(100, classes, share, 1 + number), gold), 10.0 * number) == [], number
    assert guard.healthy is not None and "pseudo/yes" in guard.healthy


def test_a_handful_of_distinct_labels_may_be_one_by_chance() -> None:
    def having(distinct: float) -> dict[str, float]:
        return {"rows": 100.0, "pseudo/kept": 1.0, "pseudo/distinct": distinct}

    assert signs_of_collapse(having(0.01), having(0.05)) == []
    assert signs_of_collapse(having(0.01), having(0.19)) == []
    (sign,) = signs_of_collapse(having(0.01), having(0.2))
    assert sign == "1.0% of labels are distinct, 20.0% before"


@pytest.mark.parametrize(("threshold", "said"), [(0.9999, "have any class"), (0.0001, "lack any class"), (0.5, None)])
def test_a_run_whose_teacher_says_no_or_yes_to_everything_is_stopped(
    tmp_path: Path, threshold: float, said: str | None
) -> None:
    rows = tiny.sentences(60).remove_columns("labels").add_column("labels", several(60, 3, 0.4).tolist())
    model = head_runs.classifier("multi_label_classification", 3)
    labeler = MultiLabelLabeler(3, thresholds=threshold)
    made = head_runs.texts(
        tmp_path, model, rows.with_format("torch"), labeler=labeler, max_steps=30, learning_rate=1e-3
    )
    made["pseudo_label_args"] = tiny.pseudo(on_collapse="stop", collapse_window=10.0)
    trainer = tiny.trainer(**made)
    if said is None:
        trainer.train()
        assert trainer.collapse.guard.alarms == []
        return
    with pytest.raises(CollapseError, match=rf"0.00% of labels {said}, \d+.\d+% in the labelled data"):
        trainer.train()


def test_numbers_between_zero_and_one_alone_are_answers() -> None:
    gold = several(100, 3, 0.5)
    strange = LabelCounts()
    strange.add_targets(torch.tensor([[0.2, 1.5, 0.1]]), None)
    strange.add_targets(gold, None)
    strange.add_used([PseudoLabel((1,), 0.9)])
    known = LabelCounts()
    known.add_targets(gold, None)
    assert "pseudo/yes" not in strange.metrics(known)
    classes = counts_of(two_classes(0.5))
    assert "pseudo/yes" not in classes.metrics(counts_of(two_classes(0.5)))


def by_step(classes: list[list[int]]) -> ClassesByStep:
    counts = ClassesByStep()
    for number, members in enumerate(classes):
        counts.add(number, [PseudoLabel((one,), 0.9) for one in members])
    return counts


def test_minority_of_steps_by_hand() -> None:
    # Steps of 8, 8 and 2 + 2 labels; 2 more are no part of their own.
    classes = [[0] * 8, [0] * 5 + [1] * 3, [2] * 2, [1, 2], [0, 1]]
    counts = by_step(classes)
    assert counts.minority() == (pytest.approx(4 / 20), 20.0)
    # In any split over processes, through a checkpoint; dropped labels do not count.
    halves = [ClassesByStep(), ClassesByStep()]
    for number, members in enumerate(classes):
        for place, one in enumerate(members):
            halves[place % 2].add(number, [PseudoLabel((one,), 0.9), PseudoLabel((3,), 0.1, "confidence")])
    states = json.loads(json.dumps([half.state_dict() for half in halves]))
    assert ClassesByStep.of(states).minority() == counts.minority()
    assert ClassesByStep().minority() == (1.0, 0.0)


def test_soft_labels_count_by_their_probabilities_and_only_the_last_steps_are_kept() -> None:
    counts = ClassesByStep()
    for step in range(MOST_STEPS + 5):
        counts.add(step, [PseudoLabel((0,), 0.75, values=(0.75, 0.25))] * 9)
    share, held = counts.minority()
    assert share == pytest.approx(0.25, abs=1e-4) and held == pytest.approx(9 * MOST_STEPS)
    assert min(counts.steps) == 5


@pytest.mark.parametrize("skew", SKEWS)
def test_steps_of_labels_that_are_well_are_no_collapse(skew: float) -> None:
    """Also small steps, of skewed data, where most have one class alone; and those of labels in turns are one."""
    rng = np.random.default_rng(0)
    gold = minority_of_parts(
        [dict(enumerate((np.bincount(rng.random(16) < skew, minlength=2) * MASS).tolist())) for _ in range(100)]
    )[0]
    for size in (2, 8, 64):
        well = by_step([(rng.random(size) >= skew).astype(int).tolist() for _ in range(3200 // size)])
        turns = by_step([[int(rng.random() >= skew)] * max(size, 8) for _ in range(1 + 3200 // size)])
        for counts, alarmed in ((well, False), (turns, True)):
            share, held = counts.minority()
            window = ClassesByStep.of([{"0": one} for one in counts.state_dict().values()]).minority()[0]
            now = {"rows": held, "pseudo/kept": 1.0, "pseudo/minority": window, "pseudo/minority_labelled": 1 - skew}
            now |= {"pseudo/minority_within": share, "within": held, "pseudo/minority_within_labelled": gold}
            signs = signs_of_collapse(now, None)
            assert bool(signs) == alarmed, (size, share, gold)


def within(share: float, usual: float, number: float = 400.0) -> dict[str, float]:
    """A window of two classes, half of each as in labelled data, of which so many are not the first of their step."""
    halves = {"pseudo/minority": 0.5, "pseudo/minority_labelled": 0.5, "targets": number}
    found = {"pseudo/minority_within": share, "within": number, "pseudo/minority_within_labelled": usual}
    return {"rows": number, "pseudo/kept": 1.0, **halves, **found}


def test_a_teacher_that_goes_to_and_fro_is_told_from_one_that_doubts() -> None:
    """The first window of the planted collapse of `minilm_vader`, soft labels, against half of its distance."""
    assert len(signs_of_collapse(within(0.11, 0.36), None)) == 1
    assert signs_of_collapse(within(0.16, 0.36), None) == []
    # What was so in a healthy run is no change.
    assert signs_of_collapse(within(0.11, 0.36), within(0.2, 0.36)) == []
    assert len(signs_of_collapse(within(0.11, 0.36), within(0.24, 0.36))) == 1


def test_where_length_tells_the_class_steps_of_one_class_are_usual() -> None:
    assert signs_of_collapse(within(0.03, 0.05), None) == []
    assert len(signs_of_collapse(within(0.03, 0.15), None)) == 1


def test_few_steps_are_joined_with_those_of_the_next_windows() -> None:
    guard, now = CollapseGuard(0.0), within(0.0, 0.4, 30.0)
    assert guard.look(now, 10.0) == [] and guard.shares["pseudo/minority_within"] == [0.0, 30.0]
    again = CollapseGuard(0.0)
    again.load_state_dict(json.loads(json.dumps(guard.state_dict())))
    (sign,) = again.look(now, 20.0)
    assert sign.startswith("labels are of one class at a time: 0.00%")
    assert again.shares["pseudo/minority_within"] == [
        0.0,
        0.0,
    ]


def test_numbers_collapse_when_they_no_longer_spread() -> None:
    rng = np.random.default_rng(0)
    gold = torch.tensor(50_000 + 1_000 * rng.standard_normal(500))

    def said(spread: float, healthy: dict[str, float] | None = None) -> list[str]:
        found = 51_000 + spread * 1_000 * rng.standard_normal(400)
        return signs_of_collapse(window(torch.tensor(found), gold, numbers=True), healthy)

    # A regression that explains a tenth of the variance spreads a third as far: that is no collapse.
    assert said(1.0) == said(0.33) == said(0.12) == []
    assert said(0.05)[0].startswith("labels spread 0.05")
    (sign,) = said(0.0)
    assert sign == "labels spread 0.000 times as far as the labelled numbers"
    assert said(0.05, {"rows": 400.0, "pseudo/spread": 0.07}) == []
    assert said(0.05, {"rows": 400.0, "pseudo/spread": 0.5}) != []


def test_numbers_are_no_probabilities() -> None:
    """Of two numbers per row the first one has collapsed."""
    gold = torch.tensor([[1.0, -20.0], [3.0, 20.0], [5.0, 60.0]])
    found = torch.tensor([[2.0, 0.0], [2.0, 40.0], [2.0, -40.0]])
    known, counts = LabelCounts(True), LabelCounts(True)
    known.add_targets(gold, None)
    counts.add_targets(found, None)
    counts.add_used(PseudoLabel((), 1.0, values=tuple(row)) for row in found.tolist())
    assert known.deviations == pytest.approx([np.std([1, 3, 5]), np.std([-20, 20, 60])])
    metrics = counts.metrics(known)
    assert metrics["pseudo/spread"] == 0.0 and metrics["pseudo/distinct"] == pytest.approx(1.0, rel=1e-3)
    assert not {"pseudo/kl", "pseudo/minority", "pseudo/length_ratio"} & metrics.keys()
    # Exact sums: the same in any order and on any number of processes, and through JSON.
    halves = []
    for rows in (found[:1], found[1:]):
        half = LabelCounts(True)
        half.add_targets(rows, None)
        halves.append(json.loads(json.dumps(half.state_dict())))
    assert (
        LabelCounts.of(halves, True).deviations == LabelCounts.of(halves[::-1], True).deviations == counts.deviations
    )
