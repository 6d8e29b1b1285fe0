"""Everything the configurations of `recipes/` ask for, in small: run them from a folder that `build_world` has made.

Local sources stand where the scripts `prepare_*.py` would put them, so the files run as they are; sources on the Hub
come from `load_dataset` in the place of that of `datasets`.
"""

from __future__ import annotations

import importlib
import json
import runpy
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_whisper
from datasets import Audio, ClassLabel, Dataset, DatasetDict, Features, IterableDataset, List, Translation, Value
from manifests import write_manifest
from transformers import BertConfig, BertModel

from hf_ema_scaling.data.text import build_word_tokenizer
from hf_ema_scaling.recipe.config import read_mapping
from hf_ema_scaling.recipe.registry import DEFAULT_KIND

RECIPES = Path(__file__).parents[1] / "recipes"
CONFIGS = {path.stem: path for path in sorted((RECIPES / "configs").glob("*.yaml"))}

CLASSES = ("negative", "positive")
TOPICS = ("World", "Sports", "Business", "Sci/Tech")
TAGS = ("O", "B-person", "I-person", "B-place", "I-place")
WORDS = ["a", "good", "bad", "dull", "film", "is", "and", "so", "very", "long"]
WORDS += ["in", "new", "york", "we", "met", "ann", "lee", "late"]
PAIRS = {"save": "garder", "page": "page", "new": "neuf", "image": "image", "the": "la"}
LIBRISPEECH = {"train.clean.100", "train.clean.360", "train.clean.360+train.other.500"}
LIBRISPEECH |= {"train.other.500", "validation.clean", "validation.other"}
WHISPER = ("--model_name_or_path", "data/whisper-tiny-en", "--freq_width", "2", "--min_seconds", "0")
WHISPER = (*WHISPER, "--max_label_tokens", "8", "--generation_max_length", "8", "--max_seconds", "2")
T5 = {"model_type": "t5", "d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2}

# Two steps, the second with pseudo-labels, on any machine. Everything else is as the file has it.
COMMON = (
    "--max_steps",
    "2",
    "--reference_batch_size",
    "4",
    "--per_device_train_batch_size",
    "2",
    "--warmup_steps",
    "0",
)
COMMON = (*COMMON, "--use_cpu", "true", "--bf16", "false", "--dataloader_num_workers", "0", "--disable_tqdm", "true")
STARTS = {"pl_start": "1", "small_batch_until": "1", "labels_per_class": "3", "labelled_rows": "6", "num_proc": "1"}
"""Arguments that a file's own values of are too large for so little, where it has them."""
SMALL = {
    "ag_news": ("--model_name_or_path", "data/minilm"),
    "conll2003": ("--model_name_or_path", "data/minilm"),
    # The small model has no dropout.
    "minilm_vader": ("--pl_dropout", "null"),
    "librispeech_whisper": WHISPER,
    "whisper_asterisk": (*WHISPER, "--window_seconds", "1", "--max_seconds", "1"),
    "wmt16_ro_en": ("--model_name_or_path", "null", "--model_config", json.dumps(T5), "--vocabulary_size", "280"),
    "wagtail_fr": ("--vocabulary_size", "280"),
}
"""By configuration: models from the Hub in small, and a window of Whisper that fits them."""


def script_of(config: Path) -> Path:
    """The program that runs a configuration."""
    return RECIPES / f"{read_mapping(config).get('recipe', DEFAULT_KIND)}.py"


def small(name: str) -> list[str]:
    """The arguments that make a dry run of a configuration."""
    given = read_mapping(CONFIGS[name])
    starts = [word for key, value in STARTS.items() if given.get(key) is not None for word in (f"--{key}", value)]
    return [*COMMON, *starts, *SMALL.get(name, ())]


def run_script(monkeypatch: pytest.MonkeyPatch, script: Path, *argv: str) -> None:
    """Runs a program as `python script argv` does, in this process."""
    monkeypatch.setattr(sys, "argv", [str(script), *argv])
    runpy.run_path(str(script), run_name="__main__")


def texts(rows: int, classes: tuple[str, ...]) -> Dataset:
    """`rows` sentences, of every class in turn."""
    draws = np.random.default_rng(rows)
    lines = [f"{' '.join(draws.choice(WORDS, size=3))} {classes[row % len(classes)].lower()}" for row in range(rows)]
    labels = [row % len(classes) for row in range(rows)]
    features = Features({"text": Value("string"), "label": ClassLabel(names=list(classes))})
    return Dataset.from_dict({"text": lines, "label": labels}, features=features)


def words(rows: int) -> Dataset:
    """`rows` sentences of tagged words."""
    tokens = [["in", "new", "york", "we", "met", "ann"], ["ann", "lee", "is", "late"], ["so", "late"]]
    tags = [[0, 3, 4, 0, 0, 1], [1, 2, 0, 0], [0, 0]]
    features = Features({"tokens": List(Value("string")), "ner_tags": List(ClassLabel(names=list(TAGS)))})
    columns = {
        name: [values[row % 3] for row in range(rows)] for name, values in (("tokens", tokens), ("ner_tags", tags))
    }
    return Dataset.from_dict(columns, features=features)


def pairs() -> list[tuple[str, str]]:
    """Two words in two languages, all combinations."""
    sources = [f"{a} {b}" for a in PAIRS for b in PAIRS]
    return [(text, " ".join(PAIRS[word] for word in text.split())) for text in sources]


def build_world(folder: Path) -> Path:
    """Writes `folder/data` with a source of every name that a configuration has."""
    data = folder / "data"
    for name in ("labelled", "unlabelled", "evaluation"):
        write_manifest(data / "asterisk" / f"{name}.jsonl", 6, seed=len(name), labelled=name != "unlabelled")
    manifest = write_manifest(data / "speech.jsonl", 6, seed=0)
    rows = [json.loads(line) for line in manifest.read_text(encoding="utf-8").splitlines()]
    columns: dict[str, Any] = {name: [row[name] for row in rows] for name in ("text", "duration")}
    columns["audio"] = [str(data / row["audio"]) for row in rows]
    speech = Dataset.from_dict(columns).cast_column("audio", Audio())
    splits = ("labelled", "unlabelled", "evaluation", "evaluation_noisy")
    DatasetDict(dict.fromkeys(splits, speech)).save_to_disk(data / "synthetic")
    free = texts(9, CLASSES).remove_columns("label").add_column("source", ["movies", "products", "movies"] * 3)
    sets = {name: texts(8, CLASSES) for name in ("train", "test", "shifted", "products")}
    DatasetDict({**sets, "unlabelled": free}).save_to_disk(data / "vader")
    tagged = {"train": words(9), "test": words(3), "unlabelled": words(9).remove_columns("ner_tags")}
    DatasetDict(tagged).save_to_disk(data / "twitter_ner")
    (data / "wagtail").mkdir()
    for number, name in enumerate(("labelled", "unlabelled", "evaluation")):
        lines = [{"source": source, "target": target} for source, target in pairs()[8 * number : 8 * number + 8]]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (data / "wagtail" / f"{name}.jsonl").write_text(text, encoding="utf-8")
    tiny_whisper.save(data / "whisper-tiny-en", english=True)
    tokenizer = build_word_tokenizer([" ".join([*WORDS, *(name.lower() for name in (*CLASSES, *TOPICS))])])
    tokenizer.add_special_tokens({"mask_token": "[MASK]"})
    shape: dict[str, Any] = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    # Without dropout: its masks are another matter on two processes.
    shape |= {"intermediate_size": 8, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = BertConfig(vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, **shape)
    BertModel(config).save_pretrained(data / "minilm")
    tokenizer.save_pretrained(data / "minilm")
    return folder


def serve_hub(monkeypatch: pytest.MonkeyPatch, folder: Path) -> list[tuple[str, str | None, str]]:
    """Puts rows as the Hub's data sets have them in the place of `load_dataset`; returns what will be asked for."""
    asked: list[tuple[str, str | None, str]] = []

    def load_dataset(name: str, config: str | None, *, split: str) -> Dataset:
        asked.append((name, config, split))
        match name, config, split:
            case "fancyzhx/ag_news", None, "train" | "test":
                return texts(16, TOPICS)
            case "lhoestq/conll2003", None, "train" | "validation" | "test":
                return words(9)
            case "wmt/wmt16", "ro-en", "train" | "validation":
                rows = {"translation": [{"en": target, "ro": source} for source, target in pairs()[:8]]}
                return Dataset.from_dict(rows, features=Features({"translation": Translation(["en", "ro"])}))
            case "openslr/librispeech_asr", "all", known if known in LIBRISPEECH:
                speech = DatasetDict.load_from_disk(str(folder / "data" / "synthetic"))["labelled"]
                return speech.remove_columns("duration").map(lambda row: {"text": row["text"].upper()})
        raise AssertionError(f"no such data set on the Hub: {name} {config} {split}")

    # By name: `hf_ema_scaling.recipe.sources` is also reached as an attribute of the package.
    monkeypatch.setattr(importlib.import_module("hf_ema_scaling.recipe.sources"), "load_dataset", load_dataset)

    def stream(name: str, config: str | None, *, split: str, streaming: bool) -> IterableDataset:
        assert streaming
        return load_dataset(name, config, split=split).to_iterable_dataset()

    monkeypatch.setattr(importlib.import_module("hf_ema_scaling.recipe.speech_streams"), "load_dataset", stream)
    return asked
