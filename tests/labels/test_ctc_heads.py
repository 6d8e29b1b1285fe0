"""Golden labels and losses of every CTC head, computed here frame by frame on each row alone."""

from __future__ import annotations

import math
from itertools import groupby
from typing import Any

import pytest
import torch
from ctc_models import MODELS, padded, talkative, utterances
from torch import Tensor

from hf_ema_scaling.data.collator import pad_labels
from hf_ema_scaling.labels import CTCLabeler, blank_id
from hf_ema_scaling.labels.ctc import ctc_frame_lengths, sees_padding
from hf_ema_scaling.training.losses import is_ctc, loss_for

SIZES = (61, 40, 53, 37)
TARGETS = [[3, 4, 4, 5], [7], [5, 3], [9, 2, 9]]


def alone(model: Any, name: str, row: Tensor) -> Tensor:
    """Logits (frames, vocabulary) of one utterance without padding or mask."""
    with torch.no_grad():
        logits: Tensor = model(**{name: row[None]}).logits[0]
    return logits


def golden(logits: Tensor) -> tuple[list[int], float]:
    """Best path, repeats merged, blanks dropped; and the geometric mean of its probabilities."""
    path, total = [], 0.0
    for frame in logits.double().tolist():
        best = max(range(len(frame)), key=frame.__getitem__)
        path.append(best)
        total += frame[best] - math.log(sum(math.exp(value) for value in frame))
    return [token for token, _ in groupby(path) if token != 0], math.exp(total / len(path))


@pytest.mark.parametrize("architecture", MODELS)
def test_a_padded_batch_has_the_golden_labels_of_its_rows(architecture: str) -> None:
    build, name = MODELS[architecture]
    model = talkative(build())
    rows = utterances(name, SIZES)
    labels = CTCLabeler(blank_id(model.config)).label(model, padded(name, rows))
    for row, label in zip(rows, labels, strict=True):
        ids, confidence = golden(alone(model, name, row))
        assert list(label.ids) == ids
        assert label.confidence == pytest.approx(confidence, rel=1e-4)
        assert label.reason is None
    assert len({label.ids for label in labels}) >= 3
    assert max(len(label.ids) for label in labels) >= 3


@pytest.mark.parametrize("architecture", MODELS)
def test_models_that_see_padding_are_known(architecture: str) -> None:
    build, name = MODELS[architecture]
    model = talkative(build())
    apart = []
    for sizes in ((61, 40, 53, 37), (64, 41, 50, 39)):
        rows = utterances(name, sizes)
        with torch.no_grad():
            together = model(**padded(name, rows)).logits
        for row, logits in zip(rows, together, strict=True):
            own = alone(model, name, row)
            apart.append(float((logits[: len(own)] - own).abs().max()))
    assert (max(apart) > 1e-2) == sees_padding(model)
    assert max(apart) > 1e-2 or max(apart) < 1e-4


@pytest.mark.parametrize("architecture", MODELS)
def test_the_loss_of_each_row_is_the_models_own(architecture: str) -> None:
    build, name = MODELS[architecture]
    model = talkative(build())
    assert is_ctc(model)
    rows = utterances(name, SIZES)
    batches = [[row] for row in range(4)] if sees_padding(model) else [[0, 1, 2, 3]]
    for numbers in batches:
        batch = padded(name, [rows[number] for number in numbers])
        with torch.no_grad():
            logits = model(**batch).logits
            losses = loss_for(model)(model, batch, logits, pad_labels([TARGETS[number] for number in numbers]))
        assert losses.shape == (len(numbers),)
        for number, loss in zip(numbers, losses.tolist(), strict=True):
            row, target = rows[number], TARGETS[number]
            single = padded(name, [row])
            with torch.no_grad():
                own = float(model(**single, labels=torch.tensor([target])).loss)
            # "sum" adds up nats, "mean" divides by the length of the target as we do.
            own /= {"sum": len(target), "mean": 1}[model.config.ctc_loss_reduction]
            assert loss == pytest.approx(own, rel=1e-4)
            assert loss == pytest.approx(forward_loss(alone(model, name, row), target), rel=1e-4)


def forward_loss(logits: Tensor, target: list[int]) -> float:
    """-log p(target) / tokens by the forward recursion over blanks and tokens (Graves et al. 2006, section 4.1)."""
    probabilities = logits.double().softmax(-1).tolist()
    states = [0]
    for token in target:
        states += [token, 0]
    alpha = [probabilities[0][0], probabilities[0][states[1]]] + [0.0] * (len(states) - 2)
    for frame in probabilities[1:]:
        before, alpha = alpha, []
        for s, token in enumerate(states):
            total = before[s] + (before[s - 1] if s >= 1 else 0.0)
            if s >= 2 and token != 0 and token != states[s - 2]:
                total += before[s - 2]
            alpha.append(total * frame[token])
    return -math.log(alpha[-1] + alpha[-2]) / len(target)


@pytest.mark.parametrize("architecture", MODELS)
def test_a_row_with_no_frame_is_empty(architecture: str) -> None:
    build, name = MODELS[architecture]
    model = talkative(build())
    rows = utterances(name, (61, 40))
    batch = padded(name, rows)
    batch["attention_mask"][1] = 0
    assert ctc_frame_lengths(model, batch).tolist()[1] == 0
    label = CTCLabeler(blank_id(model.config)).label(model, batch)[1]
    assert (label.ids, label.confidence, label.reason) == ((), 0.0, "empty")


def test_all_heads_of_transformers_are_here_but_the_one_that_is_refused() -> None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CTC_MAPPING_NAMES

    known = {type(build()).__name__ for build, _ in MODELS.values()}
    assert known == set(MODEL_FOR_CTC_MAPPING_NAMES.values()) - {"OmniASRForCTC"}
