from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from hf_ema_scaling.data.text import build_word_tokenizer
from hf_ema_scaling.recipe import SUPERVISED, build_supervised, load_text, parse, results_table, run
from hf_ema_scaling.training import EMATrainer
from hf_ema_scaling.training.self_check import PASSED, SKIPPED, WARNING, self_check

CONFIG = Path(__file__).parents[2] / "recipes" / "configs" / "vader_text.yaml"
GOOD, BAD = ["a good film", "good and funny", "so good"], ["a bad film , so bad", "dull", "bad and dull and long"]
MODEL = {"model_type": "distilbert", "dim": 8, "n_layers": 1, "n_heads": 2, "hidden_dim": 8}


def write_texts(path: Path, rows: int) -> Path:
    """`rows` texts and labels in turn, as JSON lines."""
    picked = [{"text": (GOOD, BAD)[row % 2][row // 2 % 3], "label": ("pos", "neg")[row % 2]} for row in range(rows)]
    path.write_text("".join(json.dumps(row) + "\n" for row in picked), encoding="utf-8")
    return path


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """The YAML file of a recipe that takes two steps."""
    values = {
        "recipe": "supervised",
        "labelled": str(write_texts(tmp_path / "train.jsonl", 16)),
        "evaluation": str(write_texts(tmp_path / "test.jsonl", 6)),
        "model_config": MODEL | {"max_position_embeddings": 16},
        "max_length": 16,
        "reference_batch_size": 4,
        "per_device_train_batch_size": 2,
        "bucket_window": 2,
        "max_steps": 2,
        "optim": "rmsprop",
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


def build(config: Path, output: Path, *argv: str) -> EMATrainer:
    own = ["--config", str(config), "--output_dir", str(output), *argv]
    return build_supervised(*parse(SUPERVISED, own, ignored=("recipe",)))


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def test_two_steps_from_yaml_to_the_saved_models(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = build(recipe, tmp_path / "out", "--corruption", "0.5")
    before = weights(trainer.model)
    metrics = run(trainer)
    assert metrics["optimizer_steps"] == 2 and trainer.plan.recipe.optimizer == "rmsprop"
    assert {name for name in metrics if name.endswith("accuracy")} == {
        *("eval_clean_accuracy", "eval_ema_clean_accuracy", "eval_corrupted_accuracy", "eval_ema_corrupted_accuracy")
    }
    folders = (tmp_path / "out", tmp_path / "out" / "ema")
    student, average = (weights(load(folder)) for folder in folders)
    assert not equal(before, student) and not equal(student, average) and not equal(before, average)
    for folder, prefix in zip(folders, ("eval_clean", "eval_ema_clean"), strict=True):
        model, tokenizer = load(folder), AutoTokenizer.from_pretrained(folder)
        assert (model.config.id2label, model.config.vocab_size) == ({0: "neg", 1: "pos"}, len(tokenizer))
        rows = [json.loads(line) for line in (tmp_path / "test.jsonl").read_text().splitlines()]
        inputs = tokenizer([row["text"] for row in rows], padding=True, return_tensors="pt")
        logits = model.eval()(**inputs).logits
        labels = torch.tensor([model.config.label2id[row["label"]] for row in rows])
        assert metrics[f"{prefix}_accuracy"] == (logits.argmax(-1) == labels).float().mean()
        assert metrics[f"{prefix}_loss"] == pytest.approx(
            torch.nn.functional.cross_entropy(logits, labels).item(), abs=1e-5
        )
    printed = capsys.readouterr().out.splitlines()
    header = next(line.split() for line in printed if "error rate" in line)
    assert header == ["accuracy", "error", "rate", "loss"]
    assert sum(line.split()[:2] == ["corrupted", "average"] for line in printed) == 1


def load(folder: Path) -> Any:
    return AutoModelForSequenceClassification.from_pretrained(folder)


def test_it_learns(recipe: Path, tmp_path: Path) -> None:
    longer = ("--max_steps", "60", "--learning_rate", "5e-3", "--logging_steps", "60", "--ema_momentum", "0.9")
    trainer = build(recipe, tmp_path / "out", *longer)
    trainer.train()
    found = trainer.evaluate()
    assert found["eval_accuracy"] == found["eval_ema_accuracy"] == 1.0 and found["eval_ema_error_rate"] == 0.0


def test_rows_lengths_and_limits(recipe: Path, tmp_path: Path) -> None:
    limits = ("--max_labelled", "5", "--max_evaluation", "4", "--max_length", "5", "--length_column_name", "tokens")
    trainer = build(recipe, tmp_path / "out", *limits)
    assert len(trainer.train_dataset) == 5
    assert trainer.train_dataset["tokens"][:] == [5, 5, 5, 3, 4]
    assert trainer.eval_dataset["tokens"][:] == [5, 5, 5, 3]
    assert trainer.train_dataset["labels"][:] == [1, 0, 1, 0, 1]
    batch = trainer.data_collator([dict(trainer.train_dataset[row]) for row in (3, 4)])
    assert batch["input_ids"].shape == (2, 4) and batch["attention_mask"].sum().item() == 7


def test_noise_is_of_test_data_only_and_fixed(recipe: Path, tmp_path: Path) -> None:
    sets = json.dumps({name: str(tmp_path / "test.jsonl") for name in ("clean", "shifted")})
    noisy, other = (
        build(recipe, tmp_path / "out", "--evaluation", sets, "--corruption", "0.4", *more)
        for more in (("--seed", "1"), ("--seed", "2"))
    )
    plain = build(recipe, tmp_path / "out", "--evaluation", sets)
    ids = {name: rows["input_ids"][:] for name, rows in noisy.eval_dataset.items()}
    assert list(ids) == ["clean", "shifted", "corrupted"] and list(plain.eval_dataset) == ["clean", "shifted"]
    assert ids["clean"] == ids["shifted"] == plain.eval_dataset["clean"]["input_ids"][:]
    assert ids["corrupted"] == other.eval_dataset["corrupted"]["input_ids"][:]
    assert noisy.train_dataset["input_ids"][:] == plain.train_dataset["input_ids"][:]
    changed = [a != b for x, y in zip(ids["clean"], ids["corrupted"], strict=True) for a, b in zip(x, y, strict=True)]
    assert 0 < sum(changed) <= 12 and all(1 not in row for row in ids["corrupted"])


def test_the_initialisation_has_a_seed_of_its_own(recipe: Path, tmp_path: Path) -> None:
    first, second, alone, same = (
        build(recipe, tmp_path / "out", *argv)
        for argv in (
            ("--seed", "1", "--init_seed", "5"),
            ("--seed", "2", "--init_seed", "5"),
            ("--seed", "2"),
            ("--seed", "5"),
        )
    )
    assert equal(weights(first.model), weights(second.model)) and equal(weights(first.model), weights(same.model))
    assert not equal(weights(second.model), weights(alone.model))
    assert first.sampler.stream.index.tolist() != second.sampler.stream.index.tolist()
    assert second.sampler.stream.index.tolist() == alone.sampler.stream.index.tolist()
    for trainer in (first, second):
        trainer.train()
    assert not equal(weights(first.model), weights(second.model))


@pytest.fixture
def checkpoint(recipe: Path, tmp_path: Path) -> Path:
    """A trained classifier of `neg` and `pos`."""
    trainer = build(recipe, tmp_path / "base")
    trainer.save_model()
    return tmp_path / "base"


def test_a_checkpoint_keeps_its_labels_or_gets_new_ones(recipe: Path, checkpoint: Path, tmp_path: Path) -> None:
    start = ("--model_config", "null", "--model_name_or_path", str(checkpoint))
    kept = build(recipe, tmp_path / "out", *start)
    assert equal(weights(kept.model), weights(load(checkpoint)))
    fresh = build(recipe, tmp_path / "out", *start, "--new_labels", "true", "--init_seed", "7")
    assert equal(weights(kept.model.distilbert), weights(fresh.model.distilbert))
    assert not torch.equal(kept.model.classifier.weight, fresh.model.classifier.weight)
    three = tmp_path / "three.csv"
    three.write_text('label,text\n2,"good, bad"\n10,dull\n1,so so\n')
    other = ("--labelled", str(three), "--evaluation", "null")
    with pytest.raises(ValueError, match="base knows the labels neg, pos, not 1, 2, 10: set new_labels"):
        build(recipe, tmp_path / "out", *start, *other)
    made = build(recipe, tmp_path / "out", *start, *other, "--new_labels", "true")
    assert made.model.config.id2label == {0: "1", 1: "2", 2: "10"}
    assert made.train_dataset["labels"][:] == [1, 2, 0]
    assert made.model.classifier.out_features == 3 and made.model.dtype == torch.float32
    run(made)


def test_tokenizers_that_do_not_fit(recipe: Path, checkpoint: Path, tmp_path: Path) -> None:
    start = ("--model_config", "null", "--model_name_or_path", str(checkpoint))
    large = build_word_tokenizer([" ".join(f"w{number}" for number in range(40))])
    large.save_pretrained(tmp_path / "large")
    with pytest.raises(ValueError, match=r"large has 44 tokens, .*base knows 14: give the tokenizer"):
        build(recipe, tmp_path / "out", *start, "--tokenizer_name_or_path", str(tmp_path / "large"))
    fresh = build(recipe, tmp_path / "out", "--tokenizer_name_or_path", str(tmp_path / "large"))
    assert fresh.model.config.vocab_size == 44
    large.pad_token = None
    large.save_pretrained(tmp_path / "unpadded")
    with pytest.raises(ValueError, match="unpadded has no padding token"):
        build(recipe, tmp_path / "out", "--tokenizer_name_or_path", str(tmp_path / "unpadded"))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--max_length", "17"), "max_length=17 must be above the 2 special tokens and at most 16"),
        (("--max_length", "2"), "max_length=2 must be above the 2 special tokens"),
        (("--max_labelled", "1"), "train.jsonl: all 1 rows have the same label"),
        (("--corruption", "1.5"), r"corruption must lie in \[0, 1\], got 1.5"),
        (("--corruption", "0.1", "--evaluation", "null"), "and there is none: give evaluation"),
        (("--corruption", "0.1", "--evaluation", '{"a": "b", "c": "d"}'), "there is none: name it so among a, c"),
        (("--corruption", "0.1", "--evaluation", '{"clean": "b", "corrupted": "d"}'), "give yours another name"),
        (("--model_name_or_path", "x"), "give model_name_or_path or model_config, one of them"),
        (("--model_config", '{"model_type": "distilbert", "dimm": 8}'), "no 'dimm': did you mean dim"),
    ],
)
def test_refused(recipe: Path, tmp_path: Path, argv: tuple[str, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(recipe, tmp_path / "out", *argv)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"text": "a"}, "test.jsonl, row 2: no label; it has text"),
        ({"text": " ", "label": "pos"}, "test.jsonl, row 2: text is empty"),
        ({"text": None, "label": "pos"}, "test.jsonl, row 2: text is null"),
        ({"text": 5, "label": "pos"}, "test.jsonl, row 2: text is 5, not a string"),
        ({"text": "a", "label": None}, "test.jsonl, row 2: the label is null"),
        ({"text": "a", "label": 0.5}, "test.jsonl, row 2: the label is 0.5: a class is a string or an integer"),
        ({"text": "a", "label": "neutral"}, "test.jsonl: row 2: the label 'neutral' is none of neg, pos"),
    ],
)
def test_rows_that_cannot_be_used_are_named(recipe: Path, tmp_path: Path, line: object, message: str) -> None:
    (tmp_path / "test.jsonl").write_text(json.dumps({"text": "a", "label": "pos"}) + f"\n{json.dumps(line)}\n")
    with pytest.raises(ValueError, match=message):
        build(recipe, tmp_path / "out")


def test_saved_data_sets_and_tables(tmp_path: Path) -> None:
    features = Features({"review": Value("string"), "stars": ClassLabel(names=["few", "many"])})
    rows = Dataset.from_dict({"review": ["a", "b"], "stars": [1, 0]}, features=features)
    hidden = Dataset.from_dict({"review": ["a"], "stars": [-1]}, features=features)
    DatasetDict({"train": rows, "hidden": hidden}).save_to_disk(str(tmp_path / "saved"))
    columns = {"text_column": "review", "label_column": "stars"}
    loaded = load_text(f"{tmp_path}/saved:train", **columns)
    assert (loaded["review"][:], loaded.features["stars"].names) == (["a", "b"], ["few", "many"])
    with pytest.raises(ValueError, match="saved:hidden, row 1: the label is -1, which names none of few, many"):
        load_text(f"{tmp_path}/saved:hidden", **columns)
    with pytest.raises(ValueError, match="has the splits train, hidden"):
        load_text(f"{tmp_path}/saved", **columns)
    with pytest.raises(
        ValueError, match=r"no column text, label; it has review, stars\. Name the columns by text_colu"
    ):
        load_text(f"{tmp_path}/saved:train")
    with pytest.raises(ValueError, match="is neither a file"):
        load_text(str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"absent.csv: no such file"):
        load_text("absent.csv")
    table = tmp_path / "table.csv"
    table.write_text('\ufefftext,label,more\n"one, two",1,x\nthree,0,y\n', encoding="utf-8")
    loaded = load_text(str(table))
    assert (loaded["text"][:], loaded["label"][:]) == (["one, two", "three"], ["1", "0"])


def test_the_checks_of_a_recipe(recipe: Path, tmp_path: Path) -> None:
    found = {result.name: result for result in self_check(lambda: build(recipe, tmp_path / "out"))}
    assert {name: result.result for name, result in found.items()} == {
        **dict.fromkeys(("recipe", "data", "split", "teacher"), PASSED),
        "labels": SKIPPED,
        "plan": found["plan"].result,
    }
    assert found["plan"].result in (PASSED, WARNING)
    assert found["split"].detail.startswith("2 rows in 1 or 2 micro-batches")


def test_the_table_names_the_metrics_there_are() -> None:
    metrics = {"eval_accuracy": 0.75, "eval_error_rate": 0.25, "eval_loss": 0.5, "eval_ema_accuracy": 1.0}
    lines = [line.split() for line in results_table(metrics).splitlines()]
    assert lines[:3] == [
        ["accuracy", "error", "rate", "loss"],
        ["student", "0.7500", "0.2500", "0.5000"],
        ["average", "1.0000", "nan", "nan"],
    ]
    probe = {"eval_probe_accuracy": 0.5, "eval_ema_probe_accuracy": 0.625, "train_loss": 3.0}
    lines = [line.split() for line in results_table(probe).splitlines()]
    assert lines[:3] == [["probe", "accuracy"], ["student", "0.5000"], ["average", "0.6250"]]
    sets = {"eval_a_loss": 1.0, "eval_ema_b_accuracy": 0.5, "eval_a_runtime": 9.0}
    lines = [line.split() for line in results_table(sets).splitlines()]
    assert lines[:3] == [["accuracy", "loss"], ["a", "student", "nan", "1.0000"], ["b", "average", "0.5000", "nan"]]


def test_the_config_runs_and_its_comments_are_right(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    features = Features({"text": Value("string"), "label": ClassLabel(names=["negative", "positive"])})
    texts = [text for pair in zip(BAD, GOOD, strict=True) for text in pair] * 4
    rows = Dataset.from_dict({"text": texts, "label": [0, 1] * 12}, features=features)
    monkeypatch.chdir(tmp_path)
    DatasetDict(dict.fromkeys(("train", "test", "shifted"), rows)).save_to_disk("data/vader")
    trainer = build(CONFIG, tmp_path / "out", "--max_steps", "2", "--warmup_steps", "1", "--small_batch_until", "1")
    args = trainer.args
    assert args.half_life(1.0) == pytest.approx(2213, rel=1e-3)
    assert 8 * (1 - args.momentum(1.0)) == pytest.approx(0.04)
    assert (args.optim, trainer.plan.rule.name) == ("rmsprop", "rmsprop")
    assert len(build(CONFIG, tmp_path / "out", "--kappa", "8").plan) == 200 + 1000 / 8
    metrics = run(trainer)
    sets = {"clean", "corrupted", "shifted"}
    assert {name for name in metrics if name.endswith("accuracy")} == {
        f"eval_{ema}{name}_accuracy" for name in sets for ema in ("", "ema_")
    }
