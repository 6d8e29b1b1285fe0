"""Recipes from checkpoints with tokenizers of their own family, trained here: label, target, loss, saved model."""

from __future__ import annotations

import copy
import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import saved_models
import torch
import yaml
from datasets import Dataset
from manifests import write_manifest
from transformers import AutoModelForSeq2SeqLM, AutoModelForSpeechSeq2Seq, AutoProcessor, AutoTokenizer

from hf_ema_scaling.labels import PseudoLabel, Seq2SeqLabeler
from hf_ema_scaling.recipe import ASR_SEQ2SEQ, TRANSLATION, build_asr_seq2seq, build_translation, parse, run

WORDS = {"save": "garder", "page": "page", "new": "neuf", "image": "image", "the": "là", "coffee": "café"}
INPUTS = ("input_ids", "attention_mask", "input_features", "input_values", "labels")
SOURCES = [f"{a} {b}" for a in WORDS for b in WORDS]
FIXED: dict[str, Any] = {
    "reference_batch_size": 4,
    "per_device_train_batch_size": 2,
    "max_steps": 5,
    "pl_start": 1,
    "unlabeled_ratio": 3.0,
    "learning_rate": 1e-3,
    "ema_momentum": 0.5,
    "save_strategy": "no",
    "logging_steps": 1,
    "use_cpu": True,
    "disable_tqdm": True,
    "dataloader_pin_memory": False,
}


def needs_sentencepiece(name: str) -> Any:
    there = importlib.util.find_spec("sentencepiece") is not None
    return pytest.param(name, marks=pytest.mark.skipif(not there, reason="transformers reads it by sentencepiece"))


@dataclass(frozen=True)
class Family:
    """A seed with which some labels come to an end, and what stands around a text."""

    seed: int
    start: str
    before: tuple[str, ...] = ()
    after: tuple[str, ...] = ("</s>",)


@dataclass(frozen=True)
class Translator(Family):
    """What a family's tokenizer wants to be told."""

    languages: tuple[str, ...] = ()
    prefix: str = ""

    @property
    def told(self) -> dict[str, str]:
        return dict(zip(("src_lang", "tgt_lang"), self.languages, strict=False))


TRANSLATORS = {
    "t5": Translator(17, "<pad>", prefix="new: "),
    "mbart_50": Translator(3, "</s>", before=("fr_XX",), languages=("en_XX", "fr_XX")),
    "mbart_25": Translator(10, "fr_XX", after=("</s>", "fr_XX"), languages=("en_XX", "fr_XX")),
    "nllb": Translator(19, "</s>", before=("fra_Latn",), languages=("eng_Latn", "fra_Latn")),
    "m2m100": Translator(14, "</s>", before=("__fr__",), languages=("en", "fr")),
}


def translated(source: str) -> str:
    return " ".join(WORDS[word] for word in source.split())


def translation(name: str, folder: Path) -> Any:
    """The trainer of the recipe for a saved model of this family."""
    family = TRANSLATORS[name]
    (folder / "model").mkdir()
    getattr(saved_models, name)(folder / "model", [*SOURCES, *map(translated, SOURCES)], family.seed)
    for kind, rows in {"labelled": SOURCES[:12], "unlabelled": SOURCES[12:28], "evaluation": SOURCES[28:]}.items():
        pairs = [{"source": text, **({} if kind == "unlabelled" else {"target": translated(text)})} for text in rows]
        (folder / f"{kind}.jsonl").write_text("\n".join(map(json.dumps, pairs)), encoding="utf-8")
    values = {
        "recipe": "translation",
        **{kind: str(folder / f"{kind}.jsonl") for kind in ("labelled", "unlabelled", "evaluation")},
        "model_name_or_path": str(folder / "model"),
        "source_prefix": family.prefix,
        "max_length": 24,
        "generation_max_length": 12,
        "max_label_tokens": 12,
        **dict(zip(("source_language", "target_language"), family.languages, strict=False)),
        **FIXED,
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    arguments = ["--config", str(folder / "recipe.yaml"), "--output_dir", str(folder / "out")]
    return build_translation(*parse(TRANSLATION, arguments))


def own_losses(model: Any, rows: list[dict[str, Any]]) -> list[float]:
    """The loss of each row alone, by the model itself; Moonshine wants an id for padding, and has none."""
    model = copy.deepcopy(model).eval()
    if model.config.pad_token_id is None:
        model.config.pad_token_id = model.config.eos_token_id
    with torch.no_grad():
        return [float(model(**{key: torch.as_tensor(value)[None] for key, value in row.items()}).loss) for row in rows]


def inputs_of(trainer: Any, row: dict[str, Any]) -> dict[str, torch.Tensor]:
    """What the student reads of a row alone."""
    batch = trainer.data_collator([{name: value for name, value in row.items() if name in INPUTS}])
    return {name: value for name, value in batch.items() if name != "labels"}


def check_losses(trainer: Any, rows: Any) -> None:
    """Our loss of rows, in padded batches, is the mean of those that the model itself computes one by one."""
    given = [{**{k: v[0] for k, v in inputs_of(trainer, row).items()}, "labels": row["labels"]} for row in rows]
    losses = own_losses(trainer.model, given)
    assert trainer.evaluate(rows)["eval_loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)


def pseudo_labelled(trainer: Any) -> tuple[Any, list[PseudoLabel]]:
    """Unlabelled rows with labels by the student in the place of the teacher; and the labels."""
    model = trainer.model.eval()
    rows = [dict(row) for row in trainer.unlabeled_dataset]
    found = [trainer.labeler.label(model, inputs_of(trainer, row))[0] for row in rows]
    kept = [row | {"labels": list(label.ids)} for row, label in zip(rows, found, strict=True) if label.kept]
    assert len(kept) > 0
    return Dataset.from_list(kept).with_format("numpy"), [label for label in found if label.kept]


def check_label(ids: Any, family: Family, tokenizer: Any, special: set[int]) -> None:
    """Forced tokens, text without a special token, the end."""
    tokens = tokenizer.convert_ids_to_tokens(list(map(int, ids)))
    before, after = len(family.before), len(family.after)
    assert tuple(tokens[:before]) == family.before and tuple(tokens[len(tokens) - after :]) == family.after
    assert not special & set(map(int, ids[before : len(ids) - after]))


def check_saved(model: Any, labeler: Seq2SeqLabeler, batch: Any, tokenizer: Any) -> int:
    """A model as it is saved, by a plain `generate`, writes what the labeler reads off it; labels with an end."""
    labels = labeler.label(model, batch)
    # What is forced after the start counts as new for `generate`.
    most = labeler.decoding.max_new_tokens + len(labeler.prompt) - 1
    written = model.generate(**batch, max_new_tokens=most)
    ended = 0
    for ids, label in zip(written.tolist(), labels, strict=True):
        if label.reason == "no_eos":
            continue  # where `generate` forces an end
        ended += 1
        text = tokenizer.decode(label.ids, skip_special_tokens=True)
        assert text == tokenizer.decode(ids, skip_special_tokens=True)
        assert not any(mark in text for mark in ("XX", "Latn", "__", "</s>"))
        whole = [*labeler.prompt[:1], *label.ids[: len(label.ids) - len(labeler.suffix)]]
        assert ids[: len(whole)] == whole
    return ended


@pytest.mark.parametrize("name", ["t5", "mbart_50", "mbart_25", "nllb", needs_sentencepiece("m2m100")])
def test_translation_from_a_checkpoint(name: str, tmp_path: Path) -> None:
    family, trainer = TRANSLATORS[name], translation(name, tmp_path)
    labeler = trainer.labeler
    source, text = SOURCES[0], translated(SOURCES[0])
    own = AutoTokenizer.from_pretrained(tmp_path / "model", **family.told)
    row = trainer.train_dataset[0]
    assert list(row["input_ids"]) == own(family.prefix + source).input_ids
    # What the tokenizer itself makes of a target is what others fine-tune these models on.
    assert list(row["labels"]) == own(text_target=text).input_ids
    assert own.convert_ids_to_tokens(labeler.prompt[0]) == family.start
    assert own.decode(row["labels"], skip_special_tokens=True) == text
    special = set(own.all_special_ids) - {own.unk_token_id}
    check_label(row["labels"], family, own, special)
    check_losses(trainer, trainer.eval_dataset)
    rows, labels = pseudo_labelled(trainer)
    for label in labels:
        check_label(label.ids, family, own, special)
    check_losses(trainer, rows)
    run(trainer)
    used = trainer.ledger.to_dict()["used"]["unlabelled"]
    assert used["kept"]["items"] > 0
    average = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "out" / "ema").eval()
    loaded = AutoTokenizer.from_pretrained(tmp_path / "out" / "ema")
    texts = [family.prefix + source for source in SOURCES]
    batch = dict(loaded(texts, return_tensors="pt", padding=True))
    assert batch["input_ids"].tolist() == own(texts, padding=True).input_ids
    assert check_saved(average, labeler, batch, loaded) > 0


@dataclass(frozen=True)
class Recogniser(Family):
    """What a family's recipe wants to be told."""

    argv: tuple[str, ...] = ()


RECOGNISERS = {
    "moonshine": Recogniser(1, "<s>", argv=("--spec_augment", "false")),
    "speech2text": Recogniser(34, "</s>"),
    "seamless": Recogniser(21, "</s>", before=("__fra__",), argv=("--language", "fra")),
}


@pytest.mark.parametrize("name", ["moonshine", needs_sentencepiece("speech2text"), "seamless"])
def test_recognition_from_a_checkpoint(name: str, tmp_path: Path) -> None:
    family = RECOGNISERS[name]
    (tmp_path / "model").mkdir()
    getattr(saved_models, name)(tmp_path / "model", [*SOURCES, *map(translated, SOURCES)], family.seed)
    texts = {"labelled": translated(SOURCES[5]), "unlabelled": None, "evaluation": translated(SOURCES[8])}
    sources = []
    for seed, (kind, text) in enumerate(texts.items()):
        path = write_manifest(tmp_path / f"{kind}.jsonl", 8, seed=seed, text=text, labelled=text is not None)
        sources += [f"--{kind}", str(path)]
    values = {"model_name_or_path": str(tmp_path / "model"), "max_label_tokens": 12, "generation_max_length": 14}
    # Encoders that look beyond the mask: a row is itself only when it is alone.
    values["per_device_eval_batch_size"] = 1
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values | FIXED), encoding="utf-8")
    arguments = ["--config", str(tmp_path / "recipe.yaml"), "--output_dir", str(tmp_path / "out"), *sources]
    trainer = build_asr_seq2seq(*parse(ASR_SEQ2SEQ, [*arguments, *family.argv]))
    labeler, processor = trainer.labeler, AutoProcessor.from_pretrained(tmp_path / "model")
    own = processor.tokenizer
    row = trainer.train_dataset[0]
    text = own.decode(list(row["labels"]), skip_special_tokens=True)
    assert text.lower() == texts["labelled"]
    special = set(own.all_special_ids) - {own.unk_token_id}
    check_label(row["labels"], family, own, special)
    assert own.convert_ids_to_tokens(labeler.prompt[0]) == family.start
    check_losses(trainer, trainer.eval_dataset)
    rows, labels = pseudo_labelled(trainer)
    for label in labels:
        check_label(label.ids, family, own, special)
    check_losses(trainer, rows)
    metrics = run(trainer)
    assert trainer.ledger.to_dict()["used"]["unlabelled"]["kept"]["items"] > 0
    assert metrics["eval_ema_wer"] > 0
    average = AutoModelForSpeechSeq2Seq.from_pretrained(tmp_path / "out" / "ema").eval()
    loaded = AutoProcessor.from_pretrained(tmp_path / "out" / "ema")
    ended = (
        check_saved(average, labeler, inputs_of(trainer, row), loaded.tokenizer) for row in trainer.unlabeled_dataset
    )
    assert sum(ended) > 0
