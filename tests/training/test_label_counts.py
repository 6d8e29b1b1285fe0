"""What is counted of labels, in closed form."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from hf_ema_scaling.labels import PseudoLabel
from hf_ema_scaling.training.label_counts import LabelCounts


def with_targets(labels: torch.Tensor, milliseconds: int | None = None) -> LabelCounts:
    counts = LabelCounts()
    counts.add_targets(labels, milliseconds)
    return counts


def used(*labels: PseudoLabel) -> LabelCounts:
    counts = LabelCounts()
    counts.add_used(labels)
    return counts


def test_divergence_by_hand() -> None:
    """One more of each token in labelled data, natural logarithm."""
    found, gold = with_targets(torch.tensor([0, 0, 2])), with_targets(torch.tensor([0, 1, 1, 2, 2, 2]))
    found.add_used([PseudoLabel((0,), 1.0)])
    p, q = np.array([2, 1]) / 3, np.array([2, 4]) / 9
    metrics = found.metrics(gold)
    assert metrics["pseudo/kl"] == pytest.approx(float((p * np.log(p / q)).sum()), rel=1e-12)
    assert metrics["pseudo/kl_limit"] == pytest.approx(-math.log(4 / 9), rel=1e-12)
    assert "pseudo/kl" not in used(PseudoLabel((0,), 1.0)).metrics(gold)


def test_one_class_alone_diverges_by_the_limit_and_the_same_labels_by_nothing() -> None:
    gold = with_targets(torch.arange(3).repeat(10_000))
    for labels, expected in ((torch.zeros(9_000, dtype=torch.long), math.log(3)), (torch.arange(3).repeat(3000), 0.0)):
        found = with_targets(labels)
        found.add_used([PseudoLabel((0,), 1.0)])
        metrics = found.metrics(gold)
        assert metrics["pseudo/kl"] == pytest.approx(expected, abs=3e-3)
        assert metrics["pseudo/kl_limit"] == pytest.approx(math.log(3), abs=1e-3)


def test_soft_targets_count_by_their_probabilities() -> None:
    soft = with_targets(torch.tensor([[0.75, 0.25], [0.25, 0.75], [0.5, 0.5]]))
    assert (soft.targets / soft.targets.sum()).tolist() == [0.5, 0.5]
    # A regression has no classes.
    assert with_targets(torch.tensor([0.5, 1.5])).targets.size == 0


def test_lengths_are_compared_per_second_where_durations_are_known() -> None:
    padded = torch.tensor([[1, 2, 3], [4, -100, -100]])
    gold, found = with_targets(padded, 8000), with_targets(torch.tensor([[1, 2], [3, -100]]), 2000)
    found.add_used([PseudoLabel((1,), 1.0)])
    assert found.metrics(gold)["pseudo/length_ratio"] == pytest.approx((3 / 2000) / (4 / 8000))
    rows, bare = with_targets(padded), with_targets(torch.tensor([[1, 2], [3, -100]]))
    bare.add_used([PseudoLabel((1,), 1.0)])
    assert bare.metrics(rows)["pseudo/length_ratio"] == pytest.approx(1.5 / 2)
    # Labels without tokens have length 0, and classes none.
    empty = with_targets(torch.full((2, 1), -100), 1000)
    empty.add_used([PseudoLabel((1,), 1.0)])
    assert empty.metrics(gold)["pseudo/length_ratio"] == 0.0
    classes = with_targets(torch.tensor([1, 2]))
    classes.add_used([PseudoLabel((1,), 1.0)])
    assert "pseudo/length_ratio" not in classes.metrics(with_targets(torch.tensor([1])))


@pytest.mark.parametrize("number", [1, 30, 1000, 10_000])
def test_distinct_labels_are_counted_to_about_one_percent(number: int) -> None:
    labels = [PseudoLabel((i % number, i % number // 7), 1.0) for i in range(max(2 * number, 100))]
    counts = used(*labels, PseudoLabel((-1,), 1.0, "confidence"))
    assert counts.distinct == pytest.approx(number, rel=0.015, abs=0.1)
    assert counts.metrics(LabelCounts())["pseudo/distinct"] == counts.distinct / len(labels)


def test_scores_are_means_over_labels_made() -> None:
    counts = LabelCounts()
    for name, values in (("blank", (1.0, 0.5)), ("x", (-math.inf, math.nan))):
        counts.add_made([PseudoLabel((), 0.0, "empty", scores={name: value}) for value in values])
    assert counts.metrics(LabelCounts()) == {"score/blank": 0.75, "score/x": -1e6}


def test_sums_have_no_order() -> None:
    rng = np.random.default_rng(0)
    parts = []
    for _ in range(4):
        counts = LabelCounts()
        size = int(rng.integers(1, 40))
        counts.add_used([PseudoLabel((int(rng.integers(9)),), float(rng.random())) for _ in range(size)])
        counts.add_made([PseudoLabel((1,), 0.5, scores={"blank": float(rng.random())}) for _ in range(size)])
        counts.add_targets(torch.tensor(rng.integers(0, size, (size, 3))), int(rng.integers(900)))
        parts.append(json.loads(json.dumps(counts.state_dict())))
    texts = {json.dumps(LabelCounts.of(order).state_dict()) for order in (parts, parts[::-1], parts[2:] + parts[:2])}
    assert len(texts) == 1
    assert LabelCounts.of(parts).metrics(LabelCounts.of(parts[:1])) == LabelCounts.of(parts[::-1]).metrics(
        LabelCounts.of(parts[:1])
    )


def test_nothing_was_labelled() -> None:
    assert LabelCounts().metrics(with_targets(torch.tensor([1]))) == {}
    nothing_kept = used(PseudoLabel((), 0.2, "empty")).metrics(with_targets(torch.tensor([1])))
    assert nothing_kept["pseudo/kept"] == 0 and nothing_kept["pseudo/tokens"] == 0
    assert "pseudo/distinct" not in nothing_kept and "pseudo/kl" not in nothing_kept
