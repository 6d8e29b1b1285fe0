"""Two steps of the recipe for tags, from words to the saved models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import set_seed

from hf_ema_scaling.data.text import build_word_tokenizer
from hf_ema_scaling.recipe import (
    TOKEN_CLASSIFICATION,
    build_token_classification,
    load_words,
    parse,
    results_table,
    run,
)
from hf_ema_scaling.training import EMATrainer, PseudoLabelTrainer
from hf_ema_scaling.training.self_check import FAILED, self_check

ROWS = [
    {
        "tokens": ["in", "new", "york", "we", "met", "ann"],
        "ner_tags": ["O", "B-place", "I-place", "O", "O", "B-person"],
    },
    {"tokens": ["ann", "lee", "is", "late"], "ner_tags": ["B-person", "I-person", "O", "O"]},
    {"tokens": ["so", "late"], "ner_tags": ["O", "O"]},
]


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """The YAML file of a recipe that takes two steps, the second with pseudo-labels."""
    values = {
        "recipe": "token_classification",
        "labelled": write(tmp_path / "train.jsonl", ROWS * 4),
        "labelled_rows": 6,
        "unlabelled": write(tmp_path / "free.jsonl", [{"tokens": row["tokens"]} for row in ROWS * 5]),
        "evaluation": write(tmp_path / "test.jsonl", ROWS * 2),
        "model_config": {
            "model_type": "bert",
            "hidden_size": 8,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 8,
            "max_position_embeddings": 16,
        },
        "max_length": 16,
        "reference_batch_size": 4,
        "per_device_train_batch_size": 2,
        "bucket_window": 2,
        "max_steps": 2,
        "seed": 0,
        "pl_start": 1,
        "learning_rate": 1e-3,
        "ema_momentum": 0.5,
        "save_strategy": "no",
        "logging_steps": 1,
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


def build(config: Path, output: Path, *argv: str) -> Any:
    own = ["--config", str(config), "--output_dir", str(output), *argv]
    return build_token_classification(*parse(TOKEN_CLASSIFICATION, own))


def test_two_steps_from_yaml_to_the_saved_models(recipe: Path, tmp_path: Path) -> None:
    trainer = build(recipe, tmp_path / "out")
    assert type(trainer) is PseudoLabelTrainer
    assert trainer.labeler.names == ["O", "B-person", "I-person", "B-place", "I-place"] and trainer.labeler.bio
    assert set(trainer.unlabeled_dataset.column_names) == {"input_ids", "attention_mask", "word_ids", "length"}
    metrics = run(trainer)
    measures = ("f1", "precision", "recall", "accuracy")
    assert metrics["optimizer_steps"] == 2
    assert {f"eval_{ema}{name}" for ema in ("", "ema_") for name in measures} <= metrics.keys()
    assert results_table(metrics).splitlines()[0].split() == ["F1", "precision", "recall", "accuracy", "loss"]
    assert (tmp_path / "out" / "ema" / "model.safetensors").is_file()
    logs = [entry for entry in trainer.state.log_history if "pseudo/kept" in entry]
    assert [entry["pseudo/kept"] for entry in logs] == [1.0] and 2 <= logs[0]["pseudo/tokens"] <= 6


def test_it_learns(recipe: Path, tmp_path: Path) -> None:
    longer = ("--max_steps", "80", "--pl_start", "40", "--learning_rate", "1e-2", "--logging_steps", "80")
    trainer = build(recipe, tmp_path / "out", *longer, "--label_all_tokens", "true", "--min_word_confidence", "0.5")
    trainer.train()
    found = trainer.evaluate()
    assert found["eval_f1"] == found["eval_ema_f1"] == 1.0


def test_rows_are_drawn_and_their_tags_known(recipe: Path, tmp_path: Path) -> None:
    first, again, other = (
        build(recipe, tmp_path / "out", *argv).train_dataset
        for argv in ((), ("--label_seed", "0"), ("--label_seed", "1"))
    )
    assert len(first) == 6 and first["input_ids"][:] == again["input_ids"][:] != other["input_ids"][:]
    alone = build(recipe, tmp_path / "out", "--unlabelled", "null", "--labelled_rows", "1")
    assert type(alone) is EMATrainer and alone.model.config.num_labels == 5


def test_the_tags_of_unlabelled_rows_are_not_read(recipe: Path, tmp_path: Path) -> None:
    poisoned = write(tmp_path / "poisoned.jsonl", [row | {"ner_tags": ["nonsense"]} for row in ROWS * 5])
    trainers = [build(recipe, tmp_path / "out", *more) for more in ((), ("--unlabelled", poisoned))]
    for trainer in trainers:
        set_seed(0)
        trainer.train()
    one, two = (list(trainer.model.parameters()) for trainer in trainers)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_the_checks_of_a_recipe(recipe: Path, tmp_path: Path) -> None:
    found = {result.name: result for result in self_check(lambda: build(recipe, tmp_path / "out"))}
    assert FAILED not in {result.result for result in found.values()}, found


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"tokens": ["a"]}, "test.jsonl, row 2: no ner_tags; it has tokens"),
        ({"tokens": [], "ner_tags": []}, r"test.jsonl, row 2: tokens is \[\], not a list of words"),
        ({"tokens": ["a", " "], "ner_tags": ["O", "O"]}, "test.jsonl, row 2: the word ' ' is empty or no string"),
        ({"tokens": ["a", "b"], "ner_tags": ["O"]}, "test.jsonl, row 2: 2 words, but 1 tags"),
        ({"tokens": ["a"], "ner_tags": None}, "test.jsonl, row 2: 1 words, but None tags"),
        ({"tokens": "a", "ner_tags": ["O"]}, "test.jsonl, row 2: tokens is .a., not a list of words"),
        ({"tokens": ["a"], "ner_tags": ["B-x"]}, "test.jsonl: row 2: the tag 'B-x' is none of O, B-person"),
    ],
)
def test_rows_that_cannot_be_used_are_named(recipe: Path, tmp_path: Path, line: dict[str, Any], message: str) -> None:
    write(tmp_path / "test.jsonl", [ROWS[0], line])
    with pytest.raises(ValueError, match=message):
        build(recipe, tmp_path / "out")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--pl_start", "0"), "pl_start must be above 0"),
        (("--labelled_rows", "13"), "labelled_rows is 13, but there are only 12"),
        (
            ("--word_dropout", "0.1"),
            "drops or moves tokens, and the labels of BertForTok.* are by token",
        ),
        (("--min_word_confidence", "2"), "min_word_confidence must lie in"),
        (("--max_length", "17"), "max_length=17 must be above the 2 special tokens and at most 16"),
    ],
)
def test_refused(recipe: Path, tmp_path: Path, argv: tuple[str, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(recipe, tmp_path / "out", *argv)


def test_words_of_a_checkpoint_with_other_tags(recipe: Path, tmp_path: Path) -> None:
    build(recipe, tmp_path / "base").save_model()
    build_word_tokenizer(["x"]).save_pretrained(tmp_path / "other")
    start = ("--model_config", "null", "--model_name_or_path", str(tmp_path / "base"))
    kept = build(recipe, tmp_path / "out", *start)
    assert kept.model.config.id2label[1] == "B-person" and kept.model.config.problem_type is None
    fresh = build(recipe, tmp_path / "out", *start, "--new_labels", "true", "--init_seed", "7")
    assert not torch.equal(kept.model.classifier.weight, fresh.model.classifier.weight)
    one, other = (trainer.model.bert.embeddings.word_embeddings.weight for trainer in (kept, fresh))
    assert torch.equal(one, other)
    with pytest.raises(FileNotFoundError, match=r"absent\.jsonl: no such file"):
        load_words("absent.jsonl")
