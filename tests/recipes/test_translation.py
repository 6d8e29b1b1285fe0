from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from datasets import Dataset, Features, Translation
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer
from typer.testing import CliRunner

from hf_ema_scaling.cli import main
from hf_ema_scaling.recipe import TRANSLATION, build_translation, load_pairs, parse, run
from hf_ema_scaling.training.seq2seq import EMASeq2SeqTrainer, PseudoLabelSeq2SeqTrainer

MODELS: dict[str, dict[str, Any]] = {
    "t5": {"d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2},
    "bart": {
        "d_model": 8,
        "encoder_layers": 1,
        "decoder_layers": 1,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
        "encoder_ffn_dim": 8,
        "decoder_ffn_dim": 8,
        "max_position_embeddings": 32,
    },
}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pairs")
    words = {"save": "garder", "page": "page", "new": "neuf", "image": "image", "the": "la"}
    sources = [f"{a} {b}" for a in words for b in words]
    for name, rows in {"labelled": sources[:10], "unlabelled": sources[10:20], "evaluation": sources[20:]}.items():
        pairs = [{"source": text, "target": " ".join(words[word] for word in text.split())} for text in rows]
        lines = [json.dumps(pair if name != "unlabelled" else {"source": pair["source"]}) for pair in pairs]
        (folder / f"{name}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    values = {
        "recipe": "translation",
        **{name: str(folder / f"{name}.jsonl") for name in ("labelled", "unlabelled", "evaluation")},
        "model_config": {"model_type": "t5", **MODELS["t5"]},
        "vocabulary_size": 280,
        "max_length": 24,
        "generation_max_length": 8,
        "reference_batch_size": 4,
        "per_device_train_batch_size": 2,
        "max_steps": 2,
        "pl_start": 1,
        "learning_rate": 1e-3,
        "ema_momentum": 0.5,
        "save_strategy": "no",
        "logging_steps": 1,
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


def build(recipe: Path, output: Path, *argv: str) -> Any:
    return build_translation(*parse(TRANSLATION, ["--config", str(recipe), "--output_dir", str(output), *argv]))


@pytest.mark.parametrize("unlabelled", [True, False])
@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_two_steps_from_yaml_to_the_saved_models(recipe: Path, tmp_path: Path, kind: str, unlabelled: bool) -> None:
    config = json.dumps({"model_type": kind, **MODELS[kind]})
    trainer = build(recipe, tmp_path, "--model_config", config, *(() if unlabelled else ("--unlabelled", "null")))
    assert type(trainer) is (PseudoLabelSeq2SeqTrainer if unlabelled else EMASeq2SeqTrainer)
    tokenizer = trainer.processing_class
    assert tokenizer.decode(trainer.train_dataset[0]["labels"]).strip() == "garder garder</s>"
    metrics = run(trainer)
    assert metrics["optimizer_steps"] == 2
    assert {f"eval_{ema}{name}" for ema in ("", "ema_") for name in ("cer", "exact_match", "loss")} <= metrics.keys()
    student, average = (
        AutoModelForSeq2SeqLM.from_pretrained(folder).state_dict() for folder in (tmp_path, tmp_path / "ema")
    )
    assert all(torch.equal(value, student[name]) for name, value in trainer.model.state_dict().items())
    assert any(not torch.equal(student[name], average[name]) for name in student)
    assert AutoTokenizer.from_pretrained(tmp_path / "ema")("the page").input_ids == tokenizer("the page").input_ids


def test_a_resumed_run_ends_on_the_same_bits(recipe: Path, tmp_path: Path) -> None:
    length = ("--max_steps", "4", "--pl_start", "2", "--save_strategy", "steps", "--save_steps", "2")
    quiet = ("--evaluation", "null")
    run(build(recipe, tmp_path / "through", *length, *quiet))
    checkpoint = tmp_path / "through" / "checkpoint-2"
    run(build(recipe, tmp_path / "resumed", *length, *quiet, "--resume_from_checkpoint", str(checkpoint)))
    for folder in ("", "ema"):
        files = [tmp_path / name / folder / "model.safetensors" for name in ("through", "resumed")]
        assert files[0].read_bytes() == files[1].read_bytes()


def test_a_pretrained_model_with_a_prefix(recipe: Path, tmp_path: Path) -> None:
    run(build(recipe, tmp_path / "base", "--unlabelled", "null", "--evaluation", "null"))
    given = ("--model_config", "null", "--model_name_or_path", str(tmp_path / "base"), "--source_prefix", "to fr: ")
    trainer = build(recipe, tmp_path / "second", *given, "--pl_start", "0", "--ema_start", "0")
    tokenizer = trainer.processing_class
    assert tokenizer.decode(trainer.train_dataset[1]["input_ids"]).strip() == "to fr: save page</s>"
    assert tokenizer.decode(trainer.unlabeled_dataset[0]["input_ids"]).strip() == "to fr: new save</s>"
    assert trainer.model.generation_config.decoder_start_token_id == 1
    saved = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "base").state_dict()
    assert all(torch.equal(value, saved[name]) for name, value in trainer.model.state_dict().items())


def test_check_and_plan(recipe: Path) -> None:
    done = CliRunner().invoke(main, ["check", str(recipe), "--ema_momentum", "0.01"])
    assert done.exit_code == 0 and "PseudoLabelSeq2SeqTrainer on T5ForConditionalGeneration" in done.stdout, (
        done.output
    )
    assert CliRunner().invoke(main, ["plan", str(recipe)]).exit_code == 0


def test_pairs_in_mappings_of_languages(tmp_path: Path) -> None:
    rows = {"translation": [{"en": "page", "fr": "page"}, {"en": "save", "fr": " "}]}
    folder = tmp_path / "saved"
    Dataset.from_dict(rows, features=Features({"translation": Translation(["en", "fr"])})).save_to_disk(str(folder))
    found = load_pairs(str(folder), text_column="translation.en", target_column=None)
    assert found.column_names == ["translation.en"] and found["translation.en"][:] == ["page", "save"]
    with pytest.raises(ValueError, match=r"row 2: translation.fr is empty"):
        load_pairs(str(folder), text_column="translation.en", target_column="translation.fr")
    with pytest.raises(ValueError, match=r"no column translation.de; it has translation.en, translation.fr"):
        load_pairs(str(folder), text_column="translation.de", target_column=None)


@pytest.mark.parametrize(
    ("argv", "error", "message"),
    [
        (("--pl_start", "0"), ValueError, "pl_start must be above 0"),
        (("--target_column", "french"), ValueError, "no french; it has source, target"),
        (("--max_length", "2"), ValueError, "labelled.jsonl: all 10 rows are longer than 2 tokens"),
        (("--max_length", "0"), ValueError, "max_length must be at least 1"),
        (("--model_name_or_path", "somewhere"), ValueError, "give model_name_or_path or model_config"),
        (("--labelled", "./no.jsonl"), FileNotFoundError, "no.jsonl: no such file"),
    ],
)
def test_refused(recipe: Path, tmp_path: Path, argv: tuple[str, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        build(recipe, tmp_path, *argv)


def test_broken_pairs_are_skipped_where_the_recipe_says_so(
    recipe: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lines = ['{"source": "the page", "target": "la page"}', "{}", '{"source": "save", "target": "a</s>b"}', "no JSON"]
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join([*lines, '{"source": "page", "target": null}']), encoding="utf-8")
    with pytest.raises(ValueError, match=r"pairs.jsonl, line 4: not JSON"):
        build(recipe, tmp_path / "out", "--labelled", str(path))
    with caplog.at_level("WARNING"):
        trainer = build(recipe, tmp_path / "out", "--labelled", str(path), "--on_bad_item", "skip")
    assert [trainer.processing_class.decode(row["labels"]).strip() for row in trainer.train_dataset] == ["la page</s>"]
    assert "skipped 3 of 5 rows (1 no_column, 1 no_text, 1 not_a_row)" in caplog.text
    assert "target: skipped 1 of 2 rows (1 special_tokens); first: row 2: text 'a</s>b' holds" in caplog.text
