"""Two steps of the recipe for few labels, from texts to the saved models."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerFast, set_seed

from hf_ema_scaling.labels import ClassLabeler
from hf_ema_scaling.recipe import TEXT_CLASSIFICATION, build_text_classification, parse, run
from hf_ema_scaling.recipe.planning import plan_recipe
from hf_ema_scaling.training import EMATrainer, PseudoLabelTrainer
from hf_ema_scaling.training.self_check import FAILED, self_check

GOOD, BAD = ["a good film", "good and funny", "so good"], ["a bad film , so bad", "dull", "bad and dull and long"]


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def texts(rows: int) -> list[dict[str, Any]]:
    return [{"text": (GOOD, BAD)[row % 2][row // 2 % 3], "label": ("pos", "neg")[row % 2]} for row in range(rows)]


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """The YAML file of a recipe that takes two steps, the second with pseudo-labels."""
    words = sorted({word for text in [*GOOD, *BAD] for word in text.split()})
    vocabulary = {word: index for index, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    special = {f"{name.lower()}_token": f"[{name}]" for name in ("PAD", "UNK", "CLS", "SEP", "MASK")}
    PreTrainedTokenizerFast(
        tokenizer_object=backend, model_input_names=["input_ids", "attention_mask"], **special
    ).save_pretrained(tmp_path / "tokenizer")
    values = {
        "recipe": "text_classification",
        "labelled": write(tmp_path / "train.jsonl", texts(16)),
        "labels_per_class": 3,
        "unlabelled": write(tmp_path / "free.jsonl", [{"text": row["text"]} for row in texts(20)]),
        "evaluation": write(tmp_path / "test.jsonl", texts(6)),
        "model_config": {
            "model_type": "distilbert",
            "dim": 8,
            "n_layers": 1,
            "n_heads": 2,
            "hidden_dim": 8,
            "max_position_embeddings": 16,
        },
        "tokenizer_name_or_path": str(tmp_path / "tokenizer"),
        "max_length": 16,
        "mask_share": 0.2,
        "word_dropout": 0.2,
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
    return build_text_classification(*parse(TEXT_CLASSIFICATION, own))


def test_two_steps_from_yaml_to_the_saved_models(recipe: Path, tmp_path: Path) -> None:
    trainer = build(recipe, tmp_path / "out", "--soft_labels", "true", "--temperature", "0.5")
    assert type(trainer) is PseudoLabelTrainer and type(trainer.labeler) is ClassLabeler
    assert (trainer.labeler.soft, trainer.labeler.temperature, trainer.labeler.outputs) == (True, 0.5, 2)
    metrics = run(trainer)
    assert metrics["optimizer_steps"] == 2 and {"eval_accuracy", "eval_ema_accuracy"} <= metrics.keys()
    logs = [entry for entry in trainer.state.log_history if "pseudo/kept" in entry]
    assert [entry["pseudo/kept"] for entry in logs] == [1.0]
    average, student = (
        AutoModelForSequenceClassification.from_pretrained(tmp_path / "out" / part).classifier.weight
        for part in ("ema", ".")
    )
    assert not torch.equal(average, student)


def test_labels_are_drawn_by_class_and_seed(recipe: Path, tmp_path: Path) -> None:
    first, again, other, alike = (
        build(recipe, tmp_path / "out", *argv).train_dataset
        for argv in ((), ("--label_seed", "0"), ("--label_seed", "1"), ("--seed", "1"))
    )
    assert Counter(first["labels"]) == {0: 3, 1: 3}
    assert first["input_ids"][:] == again["input_ids"][:] != other["input_ids"][:] == alike["input_ids"][:]
    assert len(build(recipe, tmp_path / "out", "--labels_per_class", "null").train_dataset) == 16


def test_the_labels_of_unlabelled_texts_are_not_read(recipe: Path, tmp_path: Path) -> None:
    poisoned = [row | {"label": None} for row in texts(20)]
    trainers = [
        build(recipe, tmp_path / "out"),
        build(recipe, tmp_path / "out", "--unlabelled", write(tmp_path / "poisoned.jsonl", poisoned)),
    ]
    for trainer in trainers:
        assert set(trainer.unlabeled_dataset.column_names) == {"input_ids", "attention_mask", "length"}
        set_seed(0)
        trainer.train()
    one, two = (list(trainer.model.parameters()) for trainer in trainers)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_without_unlabelled_texts_the_same_run_on_labels_alone(recipe: Path, tmp_path: Path) -> None:
    trainer = build(recipe, tmp_path / "out", "--unlabelled", "null")
    assert type(trainer) is EMATrainer and trainer.plan.recipe.pl_start is None
    assert trainer.augmentation is not None
    assert build(recipe, tmp_path / "out", "--mask_share", "0", "--word_dropout", "0").augmentation is None
    assert plan_recipe(recipe)[0].recipe.pl_start == 1
    assert plan_recipe(recipe, ["--unlabelled", "null"])[0].recipe.pl_start is None


def test_labels_are_aligned_by_the_sources_of_unlabelled_texts(recipe: Path, tmp_path: Path) -> None:
    free = write(tmp_path / "named.jsonl", [{"text": row["text"], "from": row["label"]} for row in texts(20)])
    argv = ["--unlabelled", free, "--source_column", "from", "--align_labels", "source"]
    trainer = build(recipe, tmp_path / "out", *argv, "--augment_labelled", "false")
    assert trainer.unlabeled_dataset["from"][:] == ["pos", "neg"] * 10
    assert (trainer.judge.alignment.alignment.sources, trainer.args.augment_labelled) == (2, False)
    results = self_check(lambda: build(recipe, tmp_path / "out", *argv))
    assert FAILED not in {result.result for result in results}, results
    run(trainer)
    # Two classes of the two rows or so that each source gave.
    counted = trainer.judge.chain.state_dict()["LabelAlignment(classes=2, sources=2, momentum=0.98)"]["sums"]
    halves = [sum(counted[: len(counted) // 2]), sum(counted[len(counted) // 2 :])]
    assert sum(halves) == pytest.approx(4, rel=0.05) and min(halves) > 0
    with pytest.raises(ValueError, match="no nowhere; it has text"):
        build(recipe, tmp_path / "out", "--source_column", "nowhere")
    assert type(build(recipe, tmp_path / "out", *argv, "--unlabelled", "null")) is EMATrainer


def test_views_and_a_second_view_from_the_file(recipe: Path, tmp_path: Path) -> None:
    """The views of the flags, written by name, are the same run; a second view drops labels that hang on a word."""
    values = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    shares = {"word_dropout": values.pop("word_dropout"), "token_masking": values.pop("mask_share")}
    named = tmp_path / "named.yaml"
    views = {name: {"share": share} for name, share in shares.items()}
    # In this order.
    named.write_text(yaml.safe_dump(values | {"views": views}, sort_keys=False))
    runs = [build(recipe, tmp_path / "out"), build(named, tmp_path / "out")]
    for trainer in runs:
        set_seed(0)
        trainer.train()
    one, two = (list(trainer.model.parameters()) for trainer in runs)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    without = build(named, tmp_path / "out", "--views", "null")
    assert without.augmentation is None

    seconds = {"second_view": {"token_masking": {"share": 0.6}}, "filters": {"disagree": {"maximum": 0.5}}}
    named.write_text(yaml.safe_dump(values | seconds))
    trainer = build(named, tmp_path / "out")
    made: list[Any] = []
    label = trainer.labeler.labeler.label

    def watched(teacher: Any, batch: Any) -> Any:
        found = label(teacher, batch)
        made.append([label.ids for label in found])
        return found

    trainer.labeler.labeler.label = watched
    set_seed(0)
    trainer.train()
    # Labels of rows as they are and of their second views alternate.
    pairs = [(a, b) for one, other in zip(made[::2], made[1::2], strict=True) for a, b in zip(one, other, strict=True)]
    logs = [entry for entry in trainer.state.log_history if "pseudo/kept" in entry]
    # The only step with pseudo-labels has two of them.
    assert [entry["pseudo/kept"] for entry in logs] == [sum(a == b for a, b in pairs[-2:]) / 2]
    assert len(pairs) >= 2 and trainer.judge.chain.reasons == ("disagree",)


def test_the_checks_of_a_recipe(recipe: Path, tmp_path: Path) -> None:
    found = {result.name: result for result in self_check(lambda: build(recipe, tmp_path / "out"))}
    assert FAILED not in {result.result for result in found.values()}, found


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--pl_start", "0"), "pl_start must be above 0"),
        (("--labels_per_class", "9"), "train.jsonl: 9 rows of each class are asked for, but there are only"),
        (("--labels_per_class", "0"), "labels_per_class must be at least 1, got 0"),
        (("--mask_share", "1"), r"share must lie in \[0, 1\), got 1.0"),
        (("--tokenizer_name_or_path", "null"), "has no mask token: set mask_share to 0"),
        (("--temperature", "0"), "temperature must be above 0"),
        (
            ("--views", '{"token_mask": {}}'),
            "no view is called 'token_mask'.*there are token_masking, word",
        ),
        (("--views", '{"token_masking": {"share": 0.1}}'), "leave mask_share, word_dropout out, or views"),
        (("--second_view", '{"noise": {}}'), "second_view: the view noise is one of speech, and this model reads"),
        (("--second_view", '{"masking": {}}'), "second_view: no view is called 'masking'.*there are token_masking"),
    ],
)
def test_refused(recipe: Path, tmp_path: Path, argv: tuple[str, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(recipe, tmp_path / "out", *argv)
