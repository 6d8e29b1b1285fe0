"""Which labeler a model gets: how labels begin and end, and what is refused."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import tiny_generation as tiny
import torch
from tiny_generation import HEADS

from hf_ema_scaling.labels import CausalLMLabeler, Seq2SeqLabeler, generative_labeler_for


@pytest.mark.parametrize("name", HEADS)
def test_prompt_and_ends_of_each_family(name: str) -> None:
    head = HEADS[name]
    options = {"max_new_tokens": 4} | head.options
    labeler = generative_labeler_for(head.make(0), **options)
    assert labeler.eos_ids == head.eos
    if isinstance(labeler, CausalLMLabeler):
        assert (labeler.max_positions, labeler.max_target_tokens) == (32, None)
        return
    assert list(labeler.prompt) == head.prompt
    assert list(labeler.suffix) == head.after
    assert labeler.max_target_tokens == {"whisper": 20, "t5": None, "moonshine": 32}.get(name.split("-")[0], 64)


def test_lengths_come_from_the_generation_config_or_the_positions() -> None:
    def steps(model: Any, **options: Any) -> int:
        return generative_labeler_for(model, **options).decoding.max_new_tokens

    assert steps(tiny.whisper(), language="en") == 20 - 4
    assert steps(tiny.bart()) == 64 - 2
    model = tiny.t5()
    with pytest.raises(ValueError, match="T5ForConditionalGeneration has no limit of positions: give max_new_tokens"):
        steps(model)
    assert steps(model, max_new_tokens=7) == 7
    model.generation_config.max_new_tokens = 9
    assert steps(model) == 9
    with pytest.raises(ValueError, match="max_new_tokens is required"):
        steps(tiny.gpt2())


class Tokenizer:
    all_special_ids = (0, 1, 2, 23)
    unk_token_id = 3

    def convert_tokens_to_ids(self, token: str) -> int:
        return {"fr_XX": 7}.get(token, 3)


def test_languages_of_text_are_those_of_the_tokenizer() -> None:
    processor = SimpleNamespace(tokenizer=Tokenizer())
    assert generative_labeler_for(tiny.mbart(), processor, language="fr_XX").prompt == (2, 7)
    older = generative_labeler_for(tiny.mbart_25(), processor, language="fr_XX")
    assert (older.prompt, older.suffix) == ((7,), (7,))
    assert {0, 1, 2, 7, 23} == generative_labeler_for(tiny.mbart(), processor, language="fr_XX").special_ids
    with pytest.raises(ValueError, match="Tokenizer knows no language 'xx'"):
        generative_labeler_for(tiny.mbart(), processor, language="xx")
    with pytest.raises(ValueError, match="language='fr_XX' needs processing_class="):
        generative_labeler_for(tiny.m2m100(), language="fr_XX")


@pytest.mark.parametrize("make", [tiny.mbart, tiny.m2m100, tiny.seamless])
def test_models_of_many_languages_must_be_told_one(make: Any) -> None:
    model = make()
    model.generation_config.forced_bos_token_id = None
    with pytest.raises(ValueError, match="writes many languages: say which"):
        generative_labeler_for(model)
    with pytest.raises(ValueError, match="'xyz'"):
        generative_labeler_for(model, Tokenizer(), language="xyz")


def test_what_whisper_is_asked_for() -> None:
    model = tiny.whisper()
    for language in ("English", "en", "<|en|>"):
        assert generative_labeler_for(model, language=language).prompt == (3, 4, 6, 9)
    assert generative_labeler_for(model, language="fr", task="translate").prompt == (3, 5, 7, 9)
    chosen = generative_labeler_for(model)
    assert isinstance(chosen, Seq2SeqLabeler) and chosen.languages == (4, 5) and chosen.prompt[2:] == (6, 9)
    with pytest.raises(ValueError, match="'de' is not known to this Whisper"):
        generative_labeler_for(model, language="de")
    with pytest.raises(ValueError, match="task must be one of transcribe, translate, got 'sing'"):
        generative_labeler_for(model, task="sing")
    with pytest.raises(ValueError, match="knows English only: leave out language='en'"):
        generative_labeler_for(tiny.whisper_english(), language="en")
    model.generation_config = type(model.generation_config)(eos_token_id=2, decoder_start_token_id=3)
    with pytest.raises(ValueError, match="no no_timestamps_token_id"):
        generative_labeler_for(model)


def test_contradictions_are_refused() -> None:
    with pytest.raises(ValueError, match="task='translate' is Whisper's, and the model is of type t5"):
        generative_labeler_for(tiny.t5(), task="translate")
    with pytest.raises(ValueError, match="GPT2LMHeadModel is none"):
        generative_labeler_for(tiny.gpt2(), language="en", max_new_tokens=3)
    model = tiny.t5()
    model.generation_config.decoder_start_token_id = 4
    with pytest.raises(ValueError, match=r"begins with id 0 in training .* and with 4 in generation"):
        generative_labeler_for(model, max_new_tokens=3)
    model = tiny.gpt2()
    model.config.eos_token_id = model.generation_config.eos_token_id = None
    with pytest.raises(ValueError, match="has no eos_token_id"):
        generative_labeler_for(model, max_new_tokens=3)


def test_a_prompt_without_room_for_its_label_is_not_continued() -> None:
    head = HEADS["gpt2"]
    model = head.make(head.seed)
    rows = tiny.rows_for("causal")
    rows[1] = {"input_ids": torch.full((1, 23), 12), "attention_mask": torch.ones(1, 23, dtype=torch.long)}
    labels = generative_labeler_for(model, max_new_tokens=10).label(model, tiny.batch_of(rows))
    assert (labels[1].ids, labels[1].reason) == ((), "too_long")
    rows.pop(1)
    rest = generative_labeler_for(model, max_new_tokens=10).label(model, tiny.batch_of(rows))
    assert [label.ids for label in rest] == [label.ids for label in labels[:1] + labels[2:]]
    # 22 tokens and 10 new ones fit the 32 positions exactly.
    rows[0] = {"input_ids": torch.full((1, 22), 12), "attention_mask": torch.ones(1, 22, dtype=torch.long)}
    assert generative_labeler_for(model, max_new_tokens=10).label(model, tiny.batch_of(rows))[0].ids


def test_a_causal_label_must_fit_with_its_prompt() -> None:
    head = HEADS["gpt2"]
    model = head.make(head.seed)
    rows = tiny.rows_for("causal")
    plain = generative_labeler_for(model, max_new_tokens=10)
    labels = plain.label(model, tiny.batch_of(rows))
    lengths = [row["input_ids"].shape[1] + len(label.ids) for row, label in zip(rows, labels, strict=True)]
    short = generative_labeler_for(model, max_new_tokens=10, max_target_tokens=8).label(model, tiny.batch_of(rows))
    assert [label.ids for label in short] == [label.ids for label in labels]
    dropped = [length > 8 for length in lengths]
    assert [label.reason for label in short] == [
        "too_long" if long and label.kept else label.reason for long, label in zip(dropped, labels, strict=True)
    ]
    assert "too_long" in {label.reason for label in short} and any(label.kept for label in short)
    with pytest.raises(ValueError, match=r"rows \[0\] of the batch are empty"):
        plain.label(model, {"input_ids": torch.ones(1, 3).long(), "attention_mask": torch.zeros(1, 3).long()})
    with pytest.raises(ValueError, match="prompts to continue need 'input_ids'"):
        plain.label(model, {"input_values": torch.zeros(1, 3)})
