"""What a labeler of an encoder-decoder says beside the label: scores, reasons, languages, draws."""

from __future__ import annotations

import functools
import math
from typing import Any

import pytest
import tiny_generation as tiny
import torch
from tiny_generation import HEADS, MAX_NEW

from hf_ema_scaling.ema import DeadTeacherError, EMATeacher, WeightAverage
from hf_ema_scaling.labels import generative_labeler_for


def labelled(name: str, **options: Any) -> tuple[Any, Any, Any, list[Any]]:
    head = HEADS[name]
    model = head.make(head.seed)
    batch = tiny.batch_of(tiny.rows_for(head.kind))
    labeler = generative_labeler_for(model, **({"max_new_tokens": MAX_NEW} | head.options | options))
    return model, batch, labeler, labeler.label(model, batch)


@pytest.mark.parametrize("name", ["whisper", "whisper-english"])
def test_no_speech_is_the_probability_of_its_token_behind_the_start(name: str) -> None:
    model, batch, _, labels = labelled(name)
    with torch.no_grad():
        logits = model(**batch, decoder_input_ids=torch.full((6, 1), 3)).logits[:, 0]
    expected = logits.softmax(-1)[:, 8].tolist()
    assert [label.scores["no_speech"] for label in labels] == pytest.approx(expected, abs=1e-6)
    assert max(expected) > 2 * min(expected)


def test_without_a_language_the_teacher_chooses_one_for_each_row() -> None:
    model = tiny.whisper(3)
    batch = tiny.batch_of(tiny.rows_for("whisper"))

    def labels_in(language: str | None) -> list[Any]:
        return generative_labeler_for(model, max_new_tokens=MAX_NEW, language=language).label(model, batch)

    with torch.no_grad():
        shares = model(**batch, decoder_input_ids=torch.full((6, 1), 3)).logits[:, 0, [4, 5]].softmax(-1)
    labels = labels_in(None)
    assert [label.ids[0] for label in labels] == [4 + int(row.argmax()) for row in shares]
    assert {label.ids[0] for label in labels} == {4, 5}
    assert [label.scores["language"] for label in labels] == pytest.approx(shares.max(-1).values.tolist(), abs=1e-6)
    fixed = {4: labels_in("en"), 5: labels_in("French")}
    assert "language" not in fixed[4][0].scores
    for row, label in enumerate(labels):
        assert label.ids == fixed[label.ids[0]][row].ids


def test_text_scores_count_text_tokens_on_both_sides() -> None:
    labeler = labelled("t5")[2]
    sources = {
        "input_ids": torch.tensor([[10, 11, 12, 1], [10, 10, 1, 0]]),
        "attention_mask": torch.tensor([[1] * 4, [1] * 3 + [0]]),
    }
    scores = labeler._scores(sources, [(11, 11, 12, 13, 1), (10, 1)])
    # Text of the sources: 3 and 2 tokens; of the labels: 4 and 1. Shared with multiplicity: 11, 12; and 10.
    assert scores == [{"length_ratio": 4 / 3, "copy": 2 / 4}, {"length_ratio": 1 / 2, "copy": 1.0}]


def test_only_text_has_scores_of_the_source() -> None:
    assert set(labelled("t5")[3][0].scores) == {"log_probability", "ended", "length_ratio", "copy"}
    assert set(labelled("moonshine")[3][0].scores) == {"log_probability", "ended"}


def test_a_label_that_the_student_has_no_room_for_is_too_long() -> None:
    labels = labelled("mbart-25")[3]
    # The target is text, end and language.
    kept = sorted({len(label.ids) for label in labels if label.kept})
    assert len(kept) >= 2
    short = labelled("mbart-25", max_target_tokens=kept[0])[3]
    for before, after in zip(labels, short, strict=True):
        assert after.ids == before.ids
        assert after.reason == ("too_long" if before.kept and len(before.ids) > kept[0] else before.reason)


def test_a_forced_end_does_not_hide_that_a_label_was_cut_off() -> None:
    model, batch, _, labels = labelled("bart")
    with torch.no_grad():
        sequences = model.generate(**batch, max_new_tokens=MAX_NEW, num_beams=1)
    assert (sequences == 2).sum(-1).min() >= 2  # the start, and an end in every row
    assert [label.reason for label in labels].count("no_eos") == 2


def test_what_the_model_generates_with_by_default_does_not_reach_labels() -> None:
    head = HEADS["bart"]
    model = head.make(head.seed)
    config = model.generation_config
    config.num_beams, config.do_sample, config.temperature, config.top_p, config.max_length = 3, True, 2.0, 0.5, 4
    before = config.to_dict()
    batch = tiny.batch_of(tiny.rows_for("text"))
    torch.manual_seed(0)
    state = torch.get_rng_state()
    labels = generative_labeler_for(model, max_new_tokens=MAX_NEW).label(model, batch)
    assert torch.equal(torch.get_rng_state(), state)
    assert [label.ids for label in labels] == [label.ids for label in labelled("bart")[3]]
    assert model.generation_config is config and config.to_dict() == before


def test_the_cache_is_on_whatever_the_configuration_says(monkeypatch: pytest.MonkeyPatch) -> None:
    head = HEADS["t5"]
    model = head.make(head.seed)
    model.config.use_cache = model.generation_config.use_cache = False
    read: list[int] = []
    forward = model.forward

    @functools.wraps(forward)
    def counting(*args: Any, **inputs: Any) -> Any:
        read.append(inputs["decoder_input_ids"].shape[1])
        return forward(*args, **inputs)

    monkeypatch.setattr(model, "forward", counting)
    generative_labeler_for(model, max_new_tokens=5).label(model, tiny.batch_of(tiny.rows_for("text")))
    assert read == [1, 1, 1, 1, 1, 5]  # each new token alone, and once all of them for their probabilities


def test_the_encoder_runs_once(monkeypatch: pytest.MonkeyPatch) -> None:
    head = HEADS["whisper"]
    model = head.make(head.seed)
    encoder, calls = model.get_encoder(), []
    forward = encoder.forward
    monkeypatch.setattr(encoder, "forward", lambda *a, **k: (calls.append(1), forward(*a, **k))[1])
    generative_labeler_for(model, max_new_tokens=5).label(model, tiny.batch_of(tiny.rows_for("whisper")))
    assert len(calls) == 1


@pytest.mark.parametrize("name", ["whisper", "t5", "moonshine", "gpt2"])
def test_draws_depend_on_seed_and_position_alone(name: str) -> None:
    head = HEADS[name]
    model = head.make(head.seed)
    rows = tiny.rows_for(head.kind)
    sampling = generative_labeler_for(model, max_new_tokens=MAX_NEW, temperature=1.5, seed=3, **head.options)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    labels = sampling.at([40, 41, 42, 43, 44, 45]).label(model, tiny.batch_of(rows))
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    for place in (3, 0, 5):
        alone = sampling.at([40 + place]).label(model, rows[place])[0]
        assert (alone.ids, alone.reason) == (labels[place].ids, labels[place].reason)
    others = [
        sampling.at([50, 51, 52, 53, 54, 55]),
        generative_labeler_for(model, max_new_tokens=MAX_NEW, temperature=1.5, seed=4, **head.options).at(
            [40, 41, 42, 43, 44, 45]
        ),
        generative_labeler_for(model, max_new_tokens=MAX_NEW, **head.options),
    ]
    for other in others:
        assert [label.ids for label in other.label(model, tiny.batch_of(rows))] != [label.ids for label in labels]
    with pytest.raises(ValueError, match="2 positions for 6 rows"):
        sampling.at([1, 2]).label(model, tiny.batch_of(rows))


def test_a_teacher_in_train_mode_does_not_label() -> None:
    model, batch, labeler, _ = labelled("t5")
    with pytest.raises(RuntimeError, match="train mode"):
        labeler.label(model.train(), batch)
    teacher = EMATeacher(model, WeightAverage(model))
    teacher.module.encoder.train()
    with pytest.raises(DeadTeacherError, match="encoder"):
        labeler.label(teacher, batch)


def test_a_teacher_in_half_precision_labels_in_it() -> None:
    model, batch, labeler, labels = labelled("whisper")
    teacher = EMATeacher(model, WeightAverage(model), dtype=torch.bfloat16)
    half = labeler.label(teacher, batch)
    apart = [abs(a.confidence - b.confidence) for a, b in zip(labels, half, strict=True) if a.ids == b.ids]
    assert len(apart) >= 4 and 1e-5 < max(apart) < 0.1


def test_a_teacher_that_has_diverged_is_an_error() -> None:
    model, batch, labeler, _ = labelled("t5")
    with torch.no_grad():
        model.get_output_embeddings().weight[5] = math.nan
    with pytest.raises(ValueError, match="NaN in rows"):
        labeler.label(model, batch)


def test_other_inputs_are_refused_by_name_and_labels_are_not_looked_at() -> None:
    model, batch, labeler, labels = labelled("t5")
    with pytest.raises(ValueError, match=r"input_values, got \['pixel_values'\]"):
        labeler.label(model, {"pixel_values": batch["input_ids"]})
    poisoned = labeler.label(
        model, {**batch, "labels": torch.full((6, 4), 10**6), "decoder_input_ids": batch["input_ids"]}
    )
    assert [label.ids for label in poisoned] == [label.ids for label in labels]
