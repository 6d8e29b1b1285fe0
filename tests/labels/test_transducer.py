"""Transducers: labels by a loop over one row, losses by transformers' own and by a sum over all paths."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from transducers import BLANK, HEADS, SIZE, build

from hf_ema_scaling.data.collator import pad_labels
from hf_ema_scaling.labels.base import MakesTargets, PseudoLabel
from hf_ema_scaling.labels.transducer import TransducerLabeler, decoder_inputs
from hf_ema_scaling.training.losses import loss_for

TARGETS = [[3, 4, 4], [5], [1, 6], [4, 1, 3, 3]]


def batch() -> tuple[list[Tensor], dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randn(length, 8, generator=generator) for length in (44, 20, 33, 40)]
    lengths = torch.tensor([len(row) for row in rows])
    padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    mask = (torch.arange(padded.shape[1])[None] < lengths[:, None]).long()
    return rows, {"input_features": padded, "attention_mask": mask}


def golden(model: Any, row: Tensor) -> tuple[list[int], float]:
    """One row, one decision at a time; the decoder reads all tokens so far, without a cache."""
    durations = getattr(model.config, "durations", None)
    tokens, logs, frame, here = [], [], 0, 0
    with torch.no_grad():
        encoded = model.get_audio_features(row[None]).pooler_output[0]
        while frame < len(encoded):
            state = model.decoder(torch.tensor([[BLANK, *tokens]]))[0, -1]
            logits = model.joint(decoder_hidden_states=state, encoder_hidden_states=encoded[frame])
            scores = logits[:SIZE].double().log_softmax(-1).tolist()
            best = max(range(SIZE), key=scores.__getitem__)
            logs.append(scores[best])
            step = int(best == BLANK) if durations is None else durations[int(logits[SIZE:].argmax())]
            if best == BLANK:
                step = max(step, 1)
            else:
                tokens.append(best)
            here = here + 1 if step == 0 else 0
            if here == 3:
                step, here = 1, 0
            frame += step
    return tokens, math.exp(sum(logs) / len(logs))


@pytest.mark.parametrize("head", HEADS)
def test_a_padded_batch_has_the_golden_labels_of_its_rows(head: str) -> None:
    seen: set[tuple[int, ...]] = set()
    for seed in range(4):
        model = build(head, seed)
        rows, inputs = batch()
        labels = TransducerLabeler(BLANK).label(model, inputs)
        for row, label in zip(rows, labels, strict=True):
            ids, confidence = golden(model, row)
            assert list(label.ids) == ids
            assert label.confidence == pytest.approx(confidence, rel=1e-4)
            assert label.reason == (None if ids else "empty")
        seen |= {label.ids for label in labels}
    assert len(seen) >= 6 and max(map(len, seen)) >= 5


def test_a_row_is_labelled_as_by_generate() -> None:
    """RNN-T only: with TDT `generate` may take a duration for a token."""
    model = build("rnnt")
    rows, inputs = batch()
    labels = TransducerLabeler(BLANK).label(model, inputs)
    for row, label in zip(rows, labels, strict=True):
        sequence = (
            model.generate(input_features=row[None], decoder_start_token_id=BLANK, max_new_tokens=200)
            .sequences[0]
            .tolist()
        )
        assert tuple(token for token in sequence[1:] if token != BLANK) == label.ids


@pytest.mark.parametrize("head", HEADS)
def test_the_loss_of_each_row_is_the_models_own(head: str) -> None:
    model = build(head)
    rows, inputs = batch()
    labels = pad_labels(TARGETS)
    with torch.no_grad():
        logits = model(**inputs, decoder_input_ids=decoder_inputs(labels, BLANK)).logits
        losses = loss_for(model)(model, inputs, logits, labels)
        for row, target, loss in zip(rows, TARGETS, losses.tolist(), strict=True):
            ids = torch.tensor([target])
            mask = torch.ones(1, len(row), dtype=torch.long)
            output = model(
                row[None],
                attention_mask=mask,
                decoder_input_ids=decoder_inputs(ids, BLANK),
                labels=ids,
                output_attention_mask=True,
            )
            assert loss == pytest.approx(float(output.loss), rel=1e-4)
            if head == "rnnt":
                assert loss == pytest.approx(all_paths(output.logits[0], target), rel=1e-4)
        # Of some rows only, the others being dropped.
        some = loss_for(model)(model, {k: v[1:3] for k, v in inputs.items()}, logits[1:3], labels[1:3])
    assert torch.allclose(some, losses[1:3], rtol=1e-5)


def all_paths(logits: Tensor, target: list[int]) -> float:
    """-log of the sum over all paths through the lattice of RNN-T, per token."""
    scores = logits.double().log_softmax(-1).exp().tolist()
    frames = len(scores)

    @cache
    def rest(t: int, u: int) -> float:
        total = scores[t][u][BLANK] * (rest(t + 1, u) if t + 1 < frames else float(u == len(target)))
        if u < len(target):
            total += scores[t][u][target[u]] * rest(t, u + 1)
        return total

    return -math.log(rest(0, 0)) / len(target)


@pytest.mark.parametrize("head", HEADS)
def test_the_loss_has_a_gradient_and_refuses_empty_labels(head: str) -> None:
    model = build(head)
    _, inputs = batch()
    labels = pad_labels(TARGETS)
    logits = model(**inputs, decoder_input_ids=decoder_inputs(labels, BLANK)).logits
    loss_for(model)(model, inputs, logits, labels).sum().backward()
    assert all(float(p.grad.abs().sum()) > 0 for p in (model.joint.head.weight, model.encoder_projector.weight))
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    with pytest.raises(ValueError, match="row 1 has an empty target"):
        loss_for(model)(model, inputs, logits.detach(), pad_labels([[1], [], [2], [3]]))


def test_targets_of_kept_labels() -> None:
    labeler = TransducerLabeler(BLANK)
    assert isinstance(labeler, MakesTargets)
    labels = [PseudoLabel((3, 4), 0.9), PseudoLabel((5,), 0.1, "confidence")]
    made = labeler.with_targets({"input_features": torch.zeros(2, 8, 8)}, labels)
    assert made["labels"].tolist() == [[3, 4], [-100, -100]]
    assert made["decoder_input_ids"].tolist() == [[BLANK, 3, 4], [BLANK, BLANK, BLANK]]


def test_special_ids_nan_and_train_mode() -> None:
    model = build("rnnt")
    _, inputs = batch()
    plain = TransducerLabeler(BLANK).label(model, inputs)
    some = plain[0].ids[0]
    without = TransducerLabeler(BLANK, special_ids=[some]).label(model, inputs)
    assert without[0].ids == tuple(token for token in plain[0].ids if token != some)
    with torch.no_grad():
        model.joint.head.bias[0] = math.nan
    with pytest.raises(ValueError, match="logits are NaN"):
        TransducerLabeler(BLANK).label(model, inputs)
    with pytest.raises(RuntimeError, match="train mode"):
        TransducerLabeler(BLANK).label(model.train(), inputs)
