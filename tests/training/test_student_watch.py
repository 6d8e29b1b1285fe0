"""Losses by source, and whether the student agrees with its teacher."""

from __future__ import annotations

import math

import numpy as np
import pytest
import tiny
import torch

from hf_ema_scaling.labels import CTCLabeler, greedy_ctc
from hf_ema_scaling.labels.ctc import labels_differ
from hf_ema_scaling.training.student_watch import StudentWatch, differ_for, student_metrics


def test_what_the_best_path_says_is_compared_with_labels_without_leaving_the_device() -> None:
    rng = np.random.default_rng(0)
    logits = torch.tensor(rng.standard_normal((200, 7, 4)), dtype=torch.float32)
    lengths = torch.tensor(rng.integers(0, 8, 200))
    best = [[i for i in row if i != 2] for row in greedy_ctc(logits, lengths, 0)]
    labels = torch.full((200, 9), -100)
    for row, ids in zip(labels, best, strict=True):
        row[: len(ids)] = torch.tensor(ids, dtype=torch.long)
    dropped = torch.tensor([0, 2])
    assert not labels_differ(logits, lengths, labels, dropped).any()
    changed = labels.clone()
    expected = torch.zeros(200, dtype=torch.bool)
    for number, ids in enumerate(best):
        kind = number % 4
        if kind == 0 and ids:
            changed[number, len(ids) - 1] = -100  # one token less
            expected[number] = True
        elif kind == 1:
            changed[number, len(ids)] = 1  # one more
            expected[number] = True
        elif kind == 2 and ids:
            changed[number, 0] = 4 - ids[0]  # another
            expected[number] = True
    assert expected.sum() > 100
    assert torch.equal(labels_differ(logits, lengths, changed, dropped), expected)
    # Labels need not be padded to the number of frames.
    assert labels_differ(logits[:1], lengths[:1], torch.full((1, 1), -100), dropped).item() is bool(best[0])


def test_losses_by_source() -> None:
    watch = StudentWatch(differ_for(tiny.bert(), CTCLabeler(0)))
    logits = torch.tensor([[3.0, 0, 0], [0, 3, 0], [0, 0, 3], [3, 0, 0]])
    losses = torch.tensor([0.5, 0.25, 2.0, 1.25], requires_grad=True)
    watch.observe(False, {}, logits[:2], torch.tensor([0, 0]), losses[:2], None)
    watch.observe(True, {}, logits, torch.tensor([0, 1, 1, 2]), losses, torch.tensor([1.0, 1.0, 0.5, 0.5]))
    watch.observe(True, {}, logits[:1], torch.tensor([[1.0, 0, 0]]), losses[:1], torch.tensor([1.0]))
    metrics = student_metrics(watch.drain())
    assert metrics == {
        "loss/labelled": 0.375,
        "loss/unlabelled": pytest.approx((4.0 + 0.5) / 5),
        "loss/unlabelled_share": pytest.approx((0.75 + 1.625 + 0.5) / (0.75 + 1.625 + 0.5 + 0.75)),
        "student/disagreement": 2 / 5,
    }
    assert watch.drain() == {} and student_metrics({}) == {}


def test_infinite_losses_are_counted_as_large_ones() -> None:
    watch = StudentWatch(None)
    watch.observe(True, {}, torch.zeros(2, 3), torch.tensor([0, 0]), torch.tensor([math.inf, math.nan]), None)
    counts = watch.drain()
    assert student_metrics(counts) == {"loss/unlabelled": 1e6, "loss/unlabelled_share": 1.0}


def test_what_takes_more_than_argmax_is_not_compared() -> None:
    assert differ_for(tiny.wav2vec2(), tiny.ContentLabeler()) is None
    assert differ_for(tiny.wav2vec2(), CTCLabeler(0)) is not None
