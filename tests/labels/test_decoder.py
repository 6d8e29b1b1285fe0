"""Decoder inputs by each family's own rule, also for rows whose label was dropped."""

from __future__ import annotations

from typing import Any

import pytest
import tiny_generation as tiny
import torch

from hf_ema_scaling.labels.decoder import (
    decoder_input_ids,
    is_encoder_decoder,
    with_decoder_inputs,
    with_decoder_start,
    wraps_last_token,
)

LABELS = torch.tensor([[7, 8, 2, 5], [7, 2, 5, -100], [-100] * 4])


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (tiny.whisper, [[3, 7, 8, 2], [3, 7, 2, 5]]),
        (tiny.moonshine, [[1, 7, 8, 2], [1, 7, 2, 5]]),
        (tiny.speech2text, [[2, 7, 8, 2], [2, 7, 2, 5]]),
        (tiny.seamless, [[3, 7, 8, 2], [3, 7, 2, 5]]),
        (tiny.t5, [[0, 7, 8, 2], [0, 7, 2, 5]]),
        (tiny.bart, [[2, 7, 8, 2], [2, 7, 2, 5]]),
        (tiny.m2m100, [[2, 7, 8, 2], [2, 7, 2, 5]]),
        # The last token of the row comes first.
        (tiny.mbart, [[5, 7, 8, 2], [5, 7, 2, 5]]),
    ],
)
def test_the_models_own_rule(make: Any, expected: list[list[int]]) -> None:
    model = make()
    assert wraps_last_token(model) == (make is tiny.mbart)
    before = LABELS.clone()
    found = decoder_input_ids(model, LABELS)
    assert found[:2].tolist() == expected
    assert int(found.min()) >= 0 and int(found.max()) < tiny.VOCABULARY
    assert torch.equal(LABELS, before)


def test_decoder_inputs_that_are_there_stay_and_other_models_get_none() -> None:
    given = torch.zeros(3, 4, dtype=torch.long)
    assert with_decoder_inputs(tiny.t5(), {"decoder_input_ids": given}, LABELS) == {"decoder_input_ids": given}
    ids = torch.ones(3, 4, dtype=torch.long)
    assert with_decoder_inputs(tiny.gpt2(), {"input_ids": ids}, LABELS) == {"input_ids": ids}
    assert not is_encoder_decoder(torch.nn.Linear(1, 1))


def test_a_decoder_without_labels_reads_its_start() -> None:
    ids = torch.full((2, 5), 9)
    assert with_decoder_start(tiny.t5(), {"input_ids": ids})["decoder_input_ids"].tolist() == [[0], [0]]
    assert with_decoder_start(tiny.mbart(), {"input_ids": ids})["decoder_input_ids"].shape == (2, 1)


def test_a_class_without_a_rule_is_refused_with_the_way_out() -> None:
    class Stranger(torch.nn.Module):
        config = tiny.t5().config

    with pytest.raises(TypeError, match=r"Stranger shifts labels .* prepare_decoder_input_ids_from_labels"):
        decoder_input_ids(Stranger(), LABELS)
