"""Labels of generating heads, against a plain greedy loop over full forward passes of each row alone."""

from __future__ import annotations

import math
from typing import Any

import pytest
import tiny_generation as tiny
import torch
from tiny_generation import HEADS, MAX_NEW, Head

from hf_ema_scaling.ema import EMATeacher, WeightAverage
from hf_ema_scaling.labels import CausalLMLabeler, Decoding, MakesTargets, PseudoLabel, generative_labeler_for
from hf_ema_scaling.labels.decoder import with_decoder_inputs
from hf_ema_scaling.training.losses import loss_for
from hf_ema_scaling.training.pseudo_label_step import with_targets

heads = pytest.mark.parametrize("name", HEADS)


def labeler_for(head: Head, model: Any, **changes: Any) -> Any:
    return generative_labeler_for(model, **({"max_new_tokens": MAX_NEW} | head.options | changes))


def targets_of(head: Head, labeler: Any, batch: tiny.Tensors, labels: list[PseudoLabel]) -> tiny.Tensors:
    """What the trainer makes of the labels."""
    micro_batch: Any = {"inputs": batch, "positions": list(range(len(labels)))}
    return with_targets(micro_batch, labeler, labels, 1.0)["inputs"]


@heads
def test_a_label_is_what_a_greedy_loop_without_cache_or_padding_finds(name: str) -> None:
    head = HEADS[name]
    model = head.make(head.seed)
    model.config.use_cache = False  # as Trainer leaves it
    rows = tiny.rows_for(head.kind)
    expected = [tiny.greedy(head, model, row) for row in rows]
    # The case is only worth something with labels of several lengths, and one that never comes to its end.
    assert len({len(tokens) for tokens, ended, _ in expected if ended}) >= 3
    assert not all(ended for _, ended, _ in expected)

    labels = labeler_for(head, model).label(model, tiny.batch_of(rows))

    for label, (tokens, ended, likelihood) in zip(labels, expected, strict=True):
        assert label.ids == (*head.before, *tokens, *head.after)
        assert label.reason == (None if ended and len(tokens) > 1 else "empty" if ended else "no_eos")
        assert label.scores["log_probability"] == pytest.approx(likelihood, abs=1e-5)
        assert label.confidence == pytest.approx(math.exp(likelihood), abs=1e-5)


@heads
def test_the_average_labels_as_the_model_with_its_weights(name: str) -> None:
    head = HEADS[name]
    student = head.make(head.seed + 1)
    teacher = EMATeacher(student, WeightAverage(head.make(head.seed)))
    batch = tiny.batch_of(tiny.rows_for(head.kind))
    labeler = labeler_for(head, student)
    same = labeler.label(head.make(head.seed), batch)
    assert labeler.label(teacher, batch) == same
    assert labeler.label(student, batch) != same


@heads
def test_the_models_own_loss_of_a_label_is_ours(name: str) -> None:
    head = HEADS[name]
    model = head.make(head.seed)
    if model.config.pad_token_id is None:
        model.config.pad_token_id = 0  # Moonshine cannot take labels without
    rows = tiny.rows_for(head.kind)
    labeler = labeler_for(head, model)
    checked = 0
    for row in rows:
        labels = labeler.label(model, row)
        if not labels[0].kept:
            continue
        inputs = targets_of(head, labeler, row, labels)
        own = model(**inputs).loss
        targets = inputs.pop("labels")
        logits = model(**with_decoder_inputs(model, inputs, targets)).logits
        ours = loss_for(model)(model, inputs, logits, targets)
        assert ours.shape == (1,)
        assert float(ours.detach()[0]) == pytest.approx(float(own.detach()), abs=1e-6)
        # The teacher finds its own label as likely as it said: the student starts where the teacher did.
        if not head.before and not head.after:
            assert float(own.detach()) == pytest.approx(-labels[0].scores["log_probability"], abs=1e-5)
        checked += 1
    assert checked >= 2


@heads
def test_a_row_alone_and_in_a_padded_batch_has_one_label(name: str) -> None:
    head = HEADS[name]
    model = head.make(head.seed)
    rows = tiny.rows_for(head.kind)
    labeler = labeler_for(head, model)
    together = labeler.label(model, tiny.batch_of(rows, filler=13))
    for row, label in zip(rows, together, strict=True):
        alone = labeler.label(model, row)[0]
        assert (alone.ids, alone.reason) == (label.ids, label.reason)
        assert alone.confidence == pytest.approx(label.confidence, abs=1e-5)
        assert alone.scores == pytest.approx(label.scores, abs=1e-5)


@heads
def test_losses_and_gradients_do_not_depend_on_how_rows_are_split(name: str) -> None:
    head = HEADS[name]
    model = head.make(head.seed)
    rows = [{key: value[:, : shortest(head)] for key, value in row.items()} for row in tiny.rows_for(head.kind)]
    labeler = labeler_for(head, model)
    end = head.eos[0]
    labels = [PseudoLabel((*range(10, 11 + row), end), 1.0, "empty" if row == 3 else None) for row in range(6)]

    def losses(chosen: list[int]) -> torch.Tensor:
        batch = tiny.batch_of([rows[row] for row in chosen])
        inputs = targets_of(head, labeler, batch, [labels[row] for row in chosen])
        targets = inputs.pop("labels")
        inputs = with_decoder_inputs(model, inputs, targets)
        found = loss_for(model)(model, inputs, model(**inputs).logits, targets)
        found.sum().backward()
        return found.detach()

    def gradients() -> torch.Tensor:
        found = torch.cat([p.grad.flatten().double() for p in model.parameters() if p.grad is not None])
        model.zero_grad()
        return found

    whole, together = losses(list(range(len(rows)))), gradients()
    parts = torch.cat([losses([0, 1]), losses(list(range(2, len(rows))))])
    apart = gradients()
    torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-6)
    assert float((apart - together).norm() / together.norm()) < 1e-5
    assert [loss > 0 for loss in whole.tolist()] == [True, True, True, False, True, True]


def shortest(head: Head) -> int | None:
    """Length to which rows are cut where the encoder sees padding, which belongs to the micro-batch."""
    return {"values": 2000, "features": 15}.get(head.kind)


@pytest.mark.parametrize("name", [name for name, head in HEADS.items() if head.kind in ("values", "features")])
def test_these_encoders_see_padding_and_so_are_labelled_by_length(name: str) -> None:
    head = HEADS[name]
    model = head.make(head.seed)
    rows = tiny.rows_for(head.kind)
    assert labeler_for(head, model).by_length
    together = labeler_for(head, model, by_length=False).label(model, tiny.batch_of(rows))
    alone = [labeler_for(head, model).label(model, row)[0] for row in rows]
    assert max(abs(a.confidence - b.confidence) for a, b in zip(alone, together, strict=True)) > 1e-3


@heads
def test_beam_search_does_not_depend_on_the_batch(name: str) -> None:
    head = HEADS[name]
    model = head.make(head.seed)
    rows = tiny.rows_for(head.kind)
    labels = labeler_for(head, model, num_beams=3).label(model, tiny.batch_of(rows))
    for row, label in zip(rows, labels, strict=True):
        alone = labeler_for(head, model, num_beams=3).label(model, row)[0]
        assert (alone.ids, alone.reason) == (label.ids, label.reason)
    greedy = labeler_for(head, model).label(model, tiny.batch_of(rows))
    assert [label.ids for label in greedy] != [label.ids for label in labels]


def test_a_teacher_with_adapters_labels_as_the_model_it_averages() -> None:
    from peft import LoraConfig, get_peft_model

    head = HEADS["t5"]
    batch = tiny.batch_of(tiny.rows_for("text"))
    torch.manual_seed(0)
    student = get_peft_model(head.make(head.seed), LoraConfig(target_modules=["q", "v"], r=2)).eval()
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    labeler = labeler_for(head, student)
    labels = labeler.label(student, batch)
    assert labels != labelled_by_base(head, batch)
    teacher = EMATeacher(student, WeightAverage(student))
    assert [label.ids for label in labeler.label(teacher, batch)] == [label.ids for label in labels]


def labelled_by_base(head: Head, batch: tiny.Tensors) -> list[PseudoLabel]:
    model = head.make(head.seed)
    return labeler_for(head, model).label(model, batch)


def test_causal_prompts_may_be_padded_on_either_side() -> None:
    head = HEADS["gpt2"]
    model = head.make(head.seed)
    rows = tiny.rows_for("causal")
    labeler = labeler_for(head, model)
    assert isinstance(labeler, CausalLMLabeler) and isinstance(labeler, MakesTargets)
    left = labeler.label(model, tiny.batch_of(rows, side="left", filler=2))
    right = labeler.label(model, tiny.batch_of(rows, side="right", filler=2))
    assert [label.ids for label in left] == [label.ids for label in right]


def test_causal_targets_are_prompt_and_label_with_the_prompt_masked() -> None:
    labeler = CausalLMLabeler((9,), Decoding(4))
    batch = {
        "input_ids": torch.tensor([[0, 5, 6], [0, 0, 7], [5, 6, 7]]),
        "attention_mask": torch.tensor([[0, 1, 1], [0, 0, 1], [1, 1, 1]]),
    }
    labels = [PseudoLabel((3, 9), 1.0), PseudoLabel((4, 4, 4, 9), 1.0), PseudoLabel((8, 9), 0.1, "confidence")]
    made = labeler.with_targets(batch, labels)
    assert made["input_ids"].tolist() == [[5, 6, 3, 9, 9], [7, 4, 4, 4, 9], [5, 6, 7, 9, 9]]
    assert made["attention_mask"].tolist() == [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]
    assert made["labels"].tolist() == [[-100, -100, 3, 9, -100], [-100, 4, 4, 4, 9], [-100] * 5]
    with pytest.raises(ValueError, match="token_type_ids"):
        labeler.with_targets({**batch, "token_type_ids": batch["input_ids"]}, labels)
