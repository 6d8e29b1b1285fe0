"""Losses and gradients by source, and how far the student agrees with its teacher."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import head_runs
import numpy as np
import pytest
import tiny
import tiny_generation
import torch
import transducers

from hf_ema_scaling.data.collator import pad_labels
from hf_ema_scaling.labels import (
    ClassLabeler,
    CTCLabeler,
    MultiLabelLabeler,
    PseudoLabel,
    generative_labeler_for,
    greedy_ctc,
    labeler_for,
    two_views,
)
from hf_ema_scaling.labels.base import MakesTargets
from hf_ema_scaling.labels.ctc import labels_differ
from hf_ema_scaling.labels.decoder import with_decoder_inputs
from hf_ema_scaling.training.student_watch import StudentWatch, decoder_differs, differ_for, student_metrics


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
    watch = StudentWatch(differ_for(tiny.bert(), ClassLabeler(3)))
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


def test_labels_that_cannot_be_compared_are_not() -> None:
    assert differ_for(tiny.wav2vec2(), tiny.ContentLabeler()) is None
    assert differ_for(tiny.wav2vec2(), CTCLabeler(0)) is not None
    # A second view does not hide what the labeler is.
    assert differ_for(tiny.wav2vec2(), two_views(CTCLabeler(0), lambda batch: batch)) is not None
    # Numbers agree to no bit; of two of them the larger one is no class.
    model = head_runs.classifier("regression", 2)
    assert differ_for(model, labeler_for(model)) is None


def test_several_classes_are_compared_at_their_thresholds() -> None:
    model = head_runs.classifier("multi_label_classification", 3)
    differ = differ_for(model, MultiLabelLabeler(3, thresholds=(0.5, 0.5, 0.9)))
    assert differ is not None
    logits = torch.tensor([[2.0, 1.0, 1.0], [2.0, 1.0, 4.0], [-1.0, -1.0, -1.0]])
    labels = torch.tensor([[1.0, 1, 0], [1, 0, 0], [0, 0, 0]])
    assert differ({}, logits, labels).tolist() == pytest.approx([0.0, 2 / 3, 0.0])


def test_of_a_decoder_the_share_of_tokens_behind_the_right_beginning() -> None:
    logits = torch.nn.functional.one_hot(torch.tensor([[1, 2, 3, 4, 0], [1, 2, 3, 4, 0]]), 5).float()
    labels = torch.tensor([[1, 2, 0, 0, -100], [-100, 1, 3, 4, 2]])
    assert decoder_differs(logits, labels).tolist() == [0.5, 0.5]
    # What was forced at the beginning and the end does not count.
    assert decoder_differs(logits, labels, 1, 1).tolist() == [0.5, 0.0]
    assert decoder_differs(logits, labels, 2, 2).tolist() == [0.0, 0.0]


def student_says(model: Any, labeler: Any, batch: dict[str, torch.Tensor], labels: list[PseudoLabel]) -> list[float]:
    differ = differ_for(model, labeler)
    assert differ is not None
    targets = pad_labels([label.ids for label in labels])
    inputs = labeler.with_targets(batch, labels) if isinstance(labeler, MakesTargets) else batch | {"labels": targets}
    targets = inputs.pop("labels")
    with torch.no_grad():
        logits = model(**with_decoder_inputs(model, inputs, targets)).logits
    return differ(inputs, logits, targets).float().tolist()


@pytest.mark.parametrize("name", ["t5", "mbart-50", "mbart-25", "gpt2"])
def test_a_decoder_agrees_with_its_own_labels_and_with_no_others(name: str) -> None:
    head = tiny_generation.HEADS[name]
    model = head.make(head.seed)
    labeler = generative_labeler_for(model, max_new_tokens=8, **head.options)
    rows = tiny_generation.rows_for(head.kind, 6)
    whole = [label.kept for label in labeler.label(model, tiny_generation.batch_of(rows))]
    batch = tiny_generation.batch_of([row for row, kept in zip(rows, whole, strict=True) if kept])
    labels = labeler.label(model, batch)
    assert len(labels) > 1 and student_says(model, labeler, batch, labels) == [0.0] * len(labels)
    # The first token that the teacher chose becomes another.
    at = len(head.before)
    changed = [PseudoLabel((*one.ids[:at], 10 + (one.ids[at] - 9) % 14, *one.ids[at + 1 :]), 0.9) for one in labels]
    assert all(0 < share <= 1 for share in student_says(model, labeler, batch, changed))


@pytest.mark.parametrize(("head", "seed"), [("rnnt", 1), ("tdt", 6)])
def test_a_transducer_agrees_with_its_own_labels_and_with_no_others(head: str, seed: int) -> None:
    model = transducers.build(head, seed)
    labeler = labeler_for(model)
    torch.manual_seed(3)
    mask = (torch.arange(48) < torch.tensor([48, 31, 40, 17])[:, None]).long()
    batch = {"input_features": 3 * torch.randn(4, 48, 8), "attention_mask": mask}
    labels = [PseudoLabel(label.ids, 0.9) for label in labeler.label(model, batch)]
    assert min(len(label.ids) for label in labels) > 0 and len({label.ids for label in labels}) > 2
    assert student_says(model, labeler, batch, labels) == [0.0] * 4
    for change in (
        lambda ids: (*ids, 1),
        lambda ids: ids[:-1],
        lambda ids: ((ids[0] + 1) % 7, *ids[1:]),
    ):
        others = [PseudoLabel(tuple(change(label.ids)), 0.9) for label in labels]
        assert student_says(model, labeler, batch, others) == [1.0] * 4


def test_gradient_share_by_hand_and_in_any_split(tmp_path: Path) -> None:
    """The gradient of cross-entropy in the logits is softmax - target, times the weight of the row."""
    shares = []
    for micro in (16, 2):
        changes = {"logging_strategy": "steps", "logging_steps": 1, "per_device_train_batch_size": micro}
        made = head_runs.texts(tmp_path, head_runs.classifier(), unlabeled_weight=0.25, **changes)
        run = tiny.at_fixed_weights(**made)
        shares.append([log["gradient/unlabelled_share"] for log in run.state.log_history if "loss" in log])
    assert len(shares[0]) == 3 and shares[1] == pytest.approx(shares[0], rel=1e-5)
    model, sizes = head_runs.classifier().eval(), [0.0, 0.0]
    for source, index, _ in run.drawn[0]:
        row = (made["train"], made["unlabeled_dataset"])[source][index]
        with torch.no_grad():
            p = model(input_ids=row["input_ids"][None]).logits[0].softmax(-1)
        # At fixed weights the teacher is the student.
        target = torch.nn.functional.one_hot(row["labels"] if source == 0 else p.argmax(), 3)
        sizes[source] += float((p - target).norm()) * (0.25 if source else 1.0)
    assert shares[0][0] == pytest.approx(sizes[1] / sum(sizes), rel=1e-4) and 0.02 < shares[0][0] < 0.5


def test_looking_at_gradients_changes_no_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run() -> Any:
        made = tiny.trainer(
            tiny.wav2vec2(dropout=0.1),
            tiny.arguments(tmp_path, logging_strategy="steps", logging_steps=1, per_device_train_batch_size=2),
            tiny.speech(12),
            unlabeled_dataset=tiny.speech(12, 1, labels=False),
            pseudo_label_args=tiny.pseudo(pl_start=1.0),
            labeler=tiny.ContentLabeler(),
        )
        made.train()
        return made

    looking = run()
    told = ["gradient/unlabelled_share" in log for log in looking.state.log_history if "loss" in log]
    assert told == [False, True, True, True]
    monkeypatch.setattr(StudentWatch, "begin", lambda self, measuring: None)
    without = run()
    assert not any("gradient/unlabelled_share" in log for log in without.state.log_history)
    assert tiny.same_bits(looking.recorder.gradients, without.recorder.gradients)
    assert tiny.same_bits(looking.recorder.weights, without.recorder.weights)
