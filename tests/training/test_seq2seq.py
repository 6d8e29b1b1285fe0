"""Trainers of generating models: whose metrics they report, what labels they learn, and resuming."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import tiny_generation
import torch
from head_runs import END, PADDING, arguments, collate, model_of, rows_of
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import GenerationConfig, PreTrainedTokenizerFast, WhisperFeatureExtractor

from hf_ema_scaling.labels import Seq2SeqLabeler, generative_labeler_for
from hf_ema_scaling.training.arguments import PseudoLabelArguments
from hf_ema_scaling.training.seq2seq import EMASeq2SeqTrainer, PseudoLabelSeq2SeqTrainer
from hf_ema_scaling.training.trainer import PseudoLabelTrainer

FAMILIES = ("whisper", "t5")


def text_of(family: str, ids: Any) -> list[list[int]]:
    """Generated ids up to their end, without padding and the token that the decoder starts with."""
    rows = [[int(i) for i in row if i not in (-100, PADDING[family])] for row in ids]
    # Beam search fills up with the end where padding is 0.
    return [row[: row.index(END[family])] if END[family] in row else row for row in rows]


@pytest.mark.parametrize("family", FAMILIES)
def test_metrics_of_both_weight_sets_are_of_what_each_generates(family: str, tmp_path: Path) -> None:
    seen: list[list[list[int]]] = []
    counted: list[list[list[int]]] = []

    def metrics(prediction: Any) -> dict[str, float]:
        seen.append(text_of(family, prediction.predictions))
        counted.append(text_of(family, prediction.label_ids))
        return {"total": float(sum(map(sum, seen[-1])))}

    held_out = rows_of(family, 7, 3)
    made = EMASeq2SeqTrainer(
        model_of(family),
        arguments(tmp_path, predict_with_generate=True, generation_max_length=9, generation_num_beams=2),
        train_dataset=rows_of(family, 12),
        eval_dataset=held_out,
        data_collator=collate,
        compute_metrics=metrics,
    )
    made.train()
    config = made.model.generation_config.to_dict()
    results = made.evaluate()
    assert made.model.generation_config.to_dict() == config

    student, average = model_of(family), model_of(family)
    student.load_state_dict(made.model.state_dict())
    with made.average.swapped(made.model):
        average.load_state_dict(made.model.state_dict())
    expected = []
    for model in (student, average):
        batch = collate(list(held_out))
        batch.pop("labels")
        with torch.no_grad():
            expected.append(text_of(family, model.generate(**batch, max_length=9, num_beams=2).tolist()))
    assert expected[0] != expected[1]
    assert seen == expected
    assert counted == [text_of(family, held_out["labels"])] * 2
    assert results["eval_total"] == sum(map(sum, expected[0]))
    assert results["eval_ema_total"] == sum(map(sum, expected[1]))
    # The losses are the models' own, row by row.
    for key, model in (("eval_loss", student), ("eval_ema_loss", average)):
        losses = [float(model(**collate([row])).loss.detach()) for row in held_out]
        assert results[key] == pytest.approx(np.mean(losses), rel=1e-5)


def test_the_generation_config_of_the_arguments_is_used(tmp_path: Path) -> None:
    found: list[Any] = []

    def metrics(prediction: Any) -> dict[str, float]:
        found.append(prediction.predictions)
        return {}

    config = GenerationConfig(
        max_new_tokens=5, min_new_tokens=5, pad_token_id=0, eos_token_id=1, decoder_start_token_id=0
    )
    made = EMASeq2SeqTrainer(
        model_of("t5"),
        arguments(tmp_path, predict_with_generate=True, generation_config=config),
        eval_dataset=rows_of("t5", 4),
        data_collator=collate,
        compute_metrics=metrics,
    )
    made.evaluate()
    (ids,) = found  # the average is made when training begins
    assert (ids[:, 1:6] != 1).all() and (ids[:, 6:] == 0).all()


def pseudo_labelling(family: str, folder: Path, labeler: Any = None, **changes: Any) -> Any:
    model = model_of(family, dropout=0.1)
    options = {"language": "fr"} if family == "whisper" else {}
    made = PseudoLabelSeq2SeqTrainer(
        model,
        arguments(folder, **({"max_steps": 6} | changes)),
        train_dataset=rows_of(family, 12),
        unlabeled_dataset=rows_of(family, 14, 1, labels=False),
        pseudo_label_args=PseudoLabelArguments(pl_start=2.0),
        labeler=labeler or generative_labeler_for(model, max_new_tokens=8, temperature=1.0, **options),
        data_collator=collate,
    )
    return made


@pytest.mark.parametrize("family", FAMILIES)
def test_a_resumed_run_of_sampled_labels_is_the_run_bit_for_bit(family: str, tmp_path: Path) -> None:
    saving = {"save_strategy": "steps", "save_steps": 3, "logging_strategy": "steps", "logging_steps": 1}
    whole = pseudo_labelling(family, tmp_path, **saving)
    whole.train()
    logged = [log["pseudo/kept"] for log in whole.state.log_history if "pseudo/kept" in log]
    assert len(logged) == 4 and max(logged) > 0

    resumed = pseudo_labelling(family, tmp_path, **saving)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert tiny.same_bits(tiny.parameters(resumed.model), tiny.parameters(whole.model))
    assert tiny.same_bits(tiny.average(resumed), tiny.average(whole))

    def told(made: Any) -> list[Any]:
        return [
            {key: value for key, value in log.items() if key in ("loss", "step") or key.startswith("pseudo/")}
            for log in made.state.log_history
            if "loss" in log
        ]

    assert told(resumed) == told(whole)


class Watching(Seq2SeqLabeler):
    """What was labelled at which position; shared by the labelers of all batches."""

    seen: dict[int, tuple[int, ...]]

    def label(self, teacher: Any, batch: Any) -> Any:
        labels = super().label(teacher, batch)
        assert self.positions is not None
        Watching.seen.update(zip(self.positions, [label.ids for label in labels], strict=True))
        return labels


@pytest.mark.parametrize("family", FAMILIES)
def test_sampled_labels_belong_to_the_item_not_to_batches_or_kappa(family: str, tmp_path: Path) -> None:
    found = []
    options = {"language": "fr"} if family == "whisper" else {}
    for number, (size, kappa) in enumerate(((4, 1.0), (3, 1.0), (16, 2.0))):
        Watching.seen = {}
        plain = generative_labeler_for(model_of(family), max_new_tokens=8, temperature=1.0, **options)
        labeler = Watching(**{name: getattr(plain, name) for name in plain.__dataclass_fields__})
        made = pseudo_labelling(
            family,
            tmp_path / str(number),
            labeler,
            per_device_train_batch_size=size,
            kappa=kappa,
            learning_rate=0.0,
        )
        unwatched = tiny.Unwatched()
        unwatched.trainer = made
        made.add_callback(unwatched)
        made.train()
        found.append(Watching.seen)
    assert len(found[0]) == 8 and len(set(found[0].values())) > 3
    assert found[1] == found[0] and found[2] == found[0]


@pytest.mark.parametrize("family", [*FAMILIES, "gpt2"])
def test_gradients_of_a_step_do_not_depend_on_its_micro_batches(family: str, tmp_path: Path) -> None:
    """At fixed weights, with labelled rows, pseudo-labelled rows and dropped ones in a step."""
    options = {"language": "fr"} if family == "whisper" else {}
    gradients, kept = [], []
    for size in (2, 16):
        model = tiny_generation.gpt2(5) if family == "gpt2" else model_of(family, {"whisper": 0, "t5": 95}[family])
        kind = PseudoLabelTrainer if family == "gpt2" else PseudoLabelSeq2SeqTrainer
        recorder, unwatched = tiny.Recorder(), tiny.Unwatched()
        made = kind(
            model,
            arguments(tmp_path, max_steps=3, learning_rate=0.0, per_device_train_batch_size=size, batch_size=12),
            train_dataset=rows_of(family, 12),
            unlabeled_dataset=rows_of(family, 14, 1, labels=False),
            pseudo_label_args=PseudoLabelArguments(pl_start=0.0),
            labeler=generative_labeler_for(model, max_new_tokens=8, **options),
            data_collator=collate,
            callbacks=[recorder, unwatched],
        )
        recorder.trainer = unwatched.trainer = made
        made.train()
        gradients.append(recorder.gradients[0])
        kept.append({name: made.label_statistics.counts[name] for name in ("rows", "kept", "tokens")})
    assert kept[0] == kept[1] and 0 < kept[0]["kept"] < kept[0]["rows"]
    assert tiny.difference(*gradients) < 1e-5


def test_rows_are_padded_without_a_collator_of_ones_own(tmp_path: Path) -> None:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel({str(i): i for i in range(24)}, unk_token="23")), pad_token="0"
    )
    made = EMASeq2SeqTrainer(
        model_of("t5"), arguments(tmp_path), train_dataset=rows_of("t5", 8), processing_class=tokenizer
    )
    rows = list(rows_of("t5", 3))
    found, expected = made.data_collator([dict(row) for row in rows]), collate(rows)
    assert tiny.same_bits(dict(found), expected)
    extractor = WhisperFeatureExtractor(feature_size=4)
    speech = EMASeq2SeqTrainer(
        model_of("whisper"), arguments(tmp_path), train_dataset=rows_of("whisper", 8), processing_class=extractor
    )
    rows = list(rows_of("whisper", 3))
    assert tiny.same_bits(speech.data_collator(rows), collate(rows))


def test_labels_that_begin_with_the_decoders_start_are_refused(tmp_path: Path) -> None:
    rows = rows_of("whisper", 12)
    rows = rows.map(
        lambda row, number: {"labels": [3, *row["labels"]] if number == 5 else row["labels"]}, with_indices=True
    )
    made = EMASeq2SeqTrainer(
        model_of("whisper"), arguments(tmp_path, max_steps=3), train_dataset=rows, data_collator=collate
    )
    with pytest.raises(ValueError, match="labelled row 5 begin with id 3"):
        made.train()


def test_what_the_arguments_refuse(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="sortish_sampler"):
        arguments(tmp_path, sortish_sampler=True)
    with pytest.raises(TypeError, match="EMASeq2SeqTrainingArguments, got EMATrainingArguments"):
        EMASeq2SeqTrainer(model_of("t5"), tiny.arguments(tmp_path), train_dataset=rows_of("t5", 4))
    made = arguments(tmp_path, generation_config=GenerationConfig(max_new_tokens=3))
    assert made.to_dict()["generation_config"]["max_new_tokens"] == 3


def causal(folder: Path) -> Any:
    """A causal language model whose teacher draws the continuation of prompts, with dropout in the student."""
    model = tiny_generation.gpt2(5)
    for part in model.modules():
        if isinstance(part, torch.nn.Dropout):
            part.p = 0.1
    values = {"save_strategy": "steps", "save_steps": 3, "logging_strategy": "steps", "logging_steps": 1}
    return PseudoLabelTrainer(
        model,
        arguments(folder, max_steps=8, per_device_train_batch_size=2, learning_rate=3e-3, **values),
        train_dataset=rows_of("gpt2", 12),
        unlabeled_dataset=rows_of("gpt2", 14, 1, labels=False),
        pseudo_label_args=PseudoLabelArguments(
            pl_start=2.0, unlabeled_ratio=2.0, filters={"length_ratio": {"maximum": 3.0}, "logprob": {"minimum": -4.0}}
        ),
        labeler=generative_labeler_for(model, max_new_tokens=20, temperature=1.0),
        data_collator=collate,
    )


def test_a_resumed_causal_run_is_the_run_bit_for_bit(tmp_path: Path) -> None:
    whole = causal(tmp_path)
    whole.train()
    kept = [log["pseudo/kept"] for log in whole.state.log_history if "pseudo/kept" in log]
    assert len(kept) == 6 and min(kept) < 1 and all(share > 0 for share in kept[1:])
    for stop in (3, 6):
        torch.manual_seed(99)
        resumed = causal(tmp_path)
        resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{stop}"))
        assert resumed.state.global_step == 8
        assert tiny.same_bits(tiny.parameters(resumed.model), tiny.parameters(whole.model))
        assert tiny.same_bits(tiny.average(resumed), tiny.average(whole))
        assert resumed.ledger.to_dict() == whole.ledger.to_dict()
        names = ("pseudo/", "loss", "student/", "gradient/", "score/")
        told = [
            [{k: v for k, v in log.items() if k.startswith(names)} for log in made.state.log_history if "loss" in log]
            for made in (whole, resumed)
        ]
        assert told[0] == told[1] and "student/disagreement" in told[0][-1]
