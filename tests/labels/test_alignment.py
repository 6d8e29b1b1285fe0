"""Alignment of class probabilities: by hand, towards the labelled shares, and the same at every kappa."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from hf_ema_scaling.labels import PseudoLabel
from hf_ema_scaling.labels.alignment import PRIOR_LABELS, LabelAlignment, class_shares, with_probabilities
from hf_ema_scaling.labels.sequence import ClassLabeler, MultiLabelLabeler

CHUNK = 8
"""Rows in a reference step."""


def soft(*probabilities: float, reason: str | None = None) -> PseudoLabel:
    best = int(np.argmax(probabilities))
    return PseudoLabel(
        (best,), max(probabilities), reason, probabilities, {"entropy": 0.0, "margin": 0.0, "mine": 3.0}
    )


def taught(alignment: LabelAlignment, labels: list[PseudoLabel], source: int = 0) -> None:
    """One step of these labels."""
    for label in labels:
        alignment.align(label, source, 0.0, soft=True)
    alignment.end_step(alignment.measured(), 1.0)


def test_log_odds_are_shifted_to_the_wanted_mean() -> None:
    alignment = LabelAlignment([0.25, 0.75], momentum=0.0)
    first = soft(0.6, 0.4)
    assert alignment.align(first, 0, 0.0, soft=True).values == pytest.approx((0.6, 0.4))
    alignment.history.measured[:] = 0
    # Labels that are all alike are given the labelled shares themselves, up to the few that count against it.
    taught(alignment, [soft(0.9, 0.1)] * 30)
    wanted, known = math.log(0.75 / 0.25), math.log(0.1 / 0.9)
    shift = (wanted - known) * 30 / (30 + PRIOR_LABELS)
    found = alignment.align(first, 0, 0.0, soft=True)
    # Log-odds are known to a bin, 0.1 wide.
    assert math.log(found.values[1] / found.values[0]) == pytest.approx(math.log(0.4 / 0.6) + shift, abs=0.05)
    # The class changes with them, and so do the scores; what others measured stays.
    assert found.ids == (1,) and found.confidence == max(found.values) and sum(found.values) == pytest.approx(1.0)
    assert found.scores["margin"] == pytest.approx(found.values[1] - found.values[0])
    assert found.scores["entropy"] == pytest.approx(-sum(p * math.log2(p) for p in found.values))
    assert found.scores["mine"] == 3.0
    hard = alignment.align(first, 0, 0.0, soft=False)
    assert (hard.ids, hard.confidence, hard.values) == (found.ids, found.confidence, ())


@pytest.mark.parametrize("sharpness", [1.0, 20.0])
def test_a_teacher_that_leans_to_one_class_gives_labels_of_the_labelled_shares(sharpness: float) -> None:
    """Also one that is sure of everything, where a ratio of means would change next to nothing."""
    rng = np.random.default_rng(0)
    logits = sharpness * rng.normal(1.0, 1.5, 4000)
    labels = [soft(p, q) for p, q in zip(1 / (1 + np.exp(logits)), 1 / (1 + np.exp(-logits)), strict=True)]
    alignment = LabelAlignment([0.5, 0.5], momentum=0.98)
    shares = []
    for step in range(0, 4000, CHUNK):
        members = [alignment.align(label, 0, 0.0, soft=True) for label in labels[step : step + CHUNK]]
        alignment.end_step(alignment.measured(), 1.0)
        shares += [label.values[1] for label in members]
    assert np.mean([label.values[1] for label in labels]) > 0.65
    assert abs(np.mean(shares[1000:]) - 0.5) < 0.02


def test_three_classes_that_lean_a_little_are_given_the_labelled_shares() -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal((0.5, 0.0, -0.5), 2.0, (4000, 3))
    every = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    alignment = LabelAlignment([0.4, 0.3, 0.3], momentum=0.98)
    for step in range(0, 4000, CHUNK):
        taught(alignment, [soft(*row) for row in every[step : step + CHUNK].tolist()])
    found = np.mean([alignment.align(soft(*row), 0, 0.0, soft=True).values for row in every.tolist()], 0)
    assert np.abs(found - [0.4, 0.3, 0.3]).max() < 0.03 < np.abs(every.mean(0) - [0.4, 0.3, 0.3]).max()


def test_sources_are_aligned_one_by_one_and_dropped_labels_not_at_all() -> None:
    alignment = LabelAlignment([0.5, 0.5], sources=2, momentum=0.0)
    taught(alignment, [soft(0.9, 0.1)] * 40, source=1)
    label, dropped = soft(0.6, 0.4), soft(0.9, 0.1, reason="theirs")
    assert alignment.align(label, 0, 0.0, soft=True).ids == (0,)
    assert alignment.align(label, 1, 0.0, soft=True).ids == (1,)
    before = alignment.measured().copy()
    assert alignment.align(dropped, 1, 0.0, soft=True) is dropped
    assert (alignment.measured() == before).all()


def test_a_class_that_labelled_data_lacks_is_never_given() -> None:
    alignment = LabelAlignment([0.5, 0.5, 0.0])
    assert alignment.align(soft(0.2, 0.1, 0.7), 0, 0.0, soft=True).values == pytest.approx((2 / 3, 1 / 3, 0.0))
    assert alignment.align(soft(0.0, 0.0, 1.0), 0, 0.0, soft=True).values == pytest.approx((0.5, 0.5, 0.0))


def test_shifts_after_the_same_labels_are_those_of_kappa_1_in_any_order_and_through_a_checkpoint() -> None:
    rng = np.random.default_rng(1)
    p = rng.random(320)
    sources = rng.integers(0, 2, 320)
    states = []
    for kappa, processes in ((1, 1), (4, 1), (8, 3)):
        alignment = LabelAlignment([0.5, 0.5], sources=2, momentum=0.9)
        for low in range(0, 320, CHUNK * kappa):
            numbers = np.arange(low, min(low + CHUNK * kappa, 320))
            ages = (numbers[-1] + 1 - np.arange(320)) / CHUNK
            total = np.zeros_like(alignment.measured())
            for part in np.array_split(rng.permutation(numbers), processes):
                for i in part:
                    alignment.align(soft(1 - p[i], p[i]), int(sources[i]), ages[i], soft=True)
                total += alignment.measured()
                alignment.history.measured = np.zeros_like(total)
            alignment.end_step(total, len(numbers) / CHUNK)
            again = LabelAlignment([0.5, 0.5], sources=2, momentum=0.9)
            again.load_state_dict(json.loads(json.dumps(alignment.state_dict())))
            assert (again.shifts() == alignment.shifts()).all()
            alignment = again
        states.append(alignment.shifts())
    assert states[1] == pytest.approx(states[0], rel=1e-7) and states[2] == pytest.approx(states[0], rel=1e-7)
    assert abs(states[0][0, 1] - states[0][1, 1]) > 1e-2


def test_a_hard_labeler_gives_probabilities_to_align_and_classes_to_learn() -> None:
    logits = torch.tensor([[2.0, 0.0, 1.0]])
    given = ClassLabeler(3)
    labeler, learns = with_probabilities(given)
    (label,) = labeler.from_logits(logits)
    assert label.values == pytest.approx(logits.softmax(-1)[0].tolist()) and not learns
    assert given.from_logits(logits)[0].values == () and with_probabilities(ClassLabeler(3, soft=True))[1]
    assert labeler.with_targets({}, [label])["labels"].tolist() == [0]


def test_what_cannot_be_aligned_is_refused() -> None:
    with pytest.raises(ValueError, match="is a MultiLabelLabeler"):
        with_probabilities(MultiLabelLabeler(3))
    with pytest.raises(ValueError, match=r"a label has 0 probabilities, and there are 2 classes"):
        LabelAlignment([0.5, 0.5]).align(PseudoLabel((0,), 0.9), 0, 0.0, soft=True)
    with pytest.raises(ValueError, match=r"add up to 1 .* got \[0.5, 0.6\]"):
        LabelAlignment([0.5, 0.6])
    with pytest.raises(ValueError, match="at least 2 classes"):
        LabelAlignment([1.0])
    assert class_shares([0, 0, 2, 1], 3) == [0.5, 0.25, 0.25]
    with pytest.raises(ValueError, match=r"ids of 3 classes, got \[0, 3\]"):
        class_shares([0, 3], 3)
    with pytest.raises(ValueError, match="ids of 2 classes"):
        class_shares(np.array([[0.0, 1.0]]), 2)
