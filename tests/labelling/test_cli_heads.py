"""`hf-ema-scaling label` with heads from a folder, and what recipes make of their labels."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import tiny_whisper
from datasets import load_dataset
from label_inputs import RATE, waveform
from labelled_heads import CASES, SENTENCES, TEXTS
from typer.testing import CliRunner

from hf_ema_scaling.cli import main
from hf_ema_scaling.hub.details import CardDetails
from hf_ema_scaling.hub.labels import dataset_card
from hf_ema_scaling.labelling import load_head
from hf_ema_scaling.recipe import load_text
from hf_ema_scaling.recipe.sources import load_pairs, load_words


def call(*arguments: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(main, ["label", *map(str, arguments), "--device", "cpu"])
    return result.exit_code, result.stdout, result.stderr


def saved(name: str, folder: Path) -> Path:
    head = CASES[name].make()
    head.model.save_pretrained(folder)  # type: ignore[operator]
    head.processing_class.save_pretrained(folder)
    return folder


def lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def card_of(folder: Path) -> str:
    record = json.loads((folder / "labelling.json").read_text())
    columns = list(load_dataset(str(folder), split="train").column_names)
    return dataset_card(record, columns, folder=folder, repo_id="owner/name", details=CardDetails())


def test_whisper_in_a_language(tmp_path: Path) -> None:
    model = tiny_whisper.save(tmp_path / "model")
    rows = []
    for number in range(3):
        soundfile.write(tmp_path / f"{number}.wav", waveform(0.5 + 0.4 * number, number), RATE)
        rows.append({"audio": f"{number}.wav", "text": "abc def"})
    data = lines(tmp_path / "list.jsonl", rows)
    gold = lines(tmp_path / "gold.jsonl", rows * 8)
    asked = ("--language", "fr", "--task", "translate", "--max_new_tokens", "6", "--options", '{"num_beams": 2}')
    fitted = ("--filters", '{"rate": "fit", "no_eos": null}', "--labelled", gold)
    code, _, told = call(model, data, "--output", tmp_path / "out", *asked, *fitted)
    assert code == 0, told
    found = load_dataset(str(tmp_path / "out"), split="train")
    # <fr> <translate> <notimestamps>
    assert all(ids[:3] == [5, 7, 23] for ids in found["label_ids"])
    record = json.loads((tmp_path / "out" / "labelling.json").read_text())
    settings = {"language": "fr", "task": "translate", "max_new_tokens": 6, "num_beams": 2}
    assert record["arguments"]["labels"] == settings
    assert [name for name, _ in record["arguments"]["filters"]] == ["rate", "no_eos"]
    assert "automatic-speech-recognition" in card_of(tmp_path / "out")
    # Another task is another labelling.
    code, _, told = call(model, data, "--output", tmp_path / "out", "--language", "fr", "--max_new_tokens", "6")
    assert code == 1 and "arguments.labels.task was 'translate', is None" in told
    for argument, message in (
        (("--language", "xx"), "language 'xx' is not known to this Whisper"),
        (("--options", '{"thresholds": 0.4}'), "have no option thresholds: it has language, task"),
        (("--source_language", "en"), "is for models that translate"),
    ):
        code, _, told = call(model, data, "--output", tmp_path / "no", *argument)
        assert code == 1 and message in told and "Traceback" not in told
    code, _, told = call(model, data, "--output", tmp_path / "no", "--options", "[1]")
    assert code == 2 and "JSON mapping" in told


def test_whisper_writes_what_it_was_trained_to(tmp_path: Path) -> None:
    folder = tiny_whisper.save(tmp_path / "model")
    saved_config = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps(saved_config | {"language": "en", "task": "translate"}))
    assert load_head(str(folder), device="cpu").labeler.prompt == (3, 4, 7, 23)  # type: ignore[attr-defined]
    head = load_head(str(folder), device="cpu", language="fr")
    assert head.labeler.prompt == (3, 5, 7, 23)  # type: ignore[attr-defined]
    assert head.settings == {"language": "fr", "task": "translate"}


def test_translations_become_pairs(tmp_path: Path) -> None:
    data = lines(tmp_path / "texts.jsonl", [{"source": text, "target": "HIDDEN"} for text in TEXTS])
    model = saved("t5", tmp_path / "model")
    code, _, told = call(
        *(model, data, "--output", tmp_path / "out", "--prefix", "fed: ", "--max_new_tokens", "8"),
        *("--filters", '{"length_ratio": {"maximum": 0.8}}'),
    )
    assert code == 0, told
    pairs = load_pairs(str(tmp_path / "out"), text_column="source", target_column="label")
    found = load_dataset(str(tmp_path / "out"), split="train")
    kept = [row for row in found if row["reason"] is None]
    assert 0 < len(kept) < len(TEXTS)
    assert [(row["source"], row["label"]) for row in pairs] == [(row["source"], row["label"]) for row in kept]
    assert "HIDDEN" not in (tmp_path / "out" / "labelling.json").read_text()
    assert "text-generation" in card_of(tmp_path / "out")


def test_tags_become_rows_of_words(tmp_path: Path) -> None:
    rows = [{"tokens": text.split(), "ner_tags": ["HIDDEN"] * len(text.split())} for text in SENTENCES]
    model, data = saved("words", tmp_path / "model"), lines(tmp_path / "words.jsonl", rows)
    code, printed, told = call(model, data, "--output", tmp_path / "out")
    assert code == 0, told
    assert printed.splitlines()[0].split() == ["rows", "word_count"]
    words = load_words(str(tmp_path / "out"), tag_column="tags")
    assert words["tokens"][:] == [row["tokens"] for row in rows]
    assert [len(tags) for tags in words["tags"]] == [len(row["tokens"]) for row in rows]
    assert "token-classification" in card_of(tmp_path / "out")


def test_several_classes_and_numbers_become_labels(tmp_path: Path) -> None:
    data = lines(tmp_path / "texts.jsonl", [{"text": text} for text in SENTENCES])
    for name in ("several-classes", "regression"):
        code, _, told = call(saved(name, tmp_path / name), data, "--output", tmp_path / f"{name}-out")
        assert code == 0, told
        found = load_text(str(tmp_path / f"{name}-out"), label_column="label")
        assert len(found) == len(SENTENCES)
    found = load_dataset(str(tmp_path / "several-classes-out"), split="train")
    for threshold in (0.2, 0.8):
        out = tmp_path / f"at{threshold}"
        options = json.dumps({"thresholds": threshold})
        assert call(tmp_path / "several-classes", data, "--output", out, "--options", options)[0] == 0
        values, ids = np.array(found["label_values"]), load_dataset(str(out), split="train")["label_ids"]
        assert [list(np.flatnonzero(row >= threshold)) for row in values] == list(ids)


def test_completions_of_prompts(tmp_path: Path) -> None:
    model, data = saved("gpt2", tmp_path / "model"), lines(tmp_path / "p.jsonl", [{"prompt": text} for text in TEXTS])
    code, _, told = call(model, data, "--output", tmp_path / "out")
    assert code == 1 and "max_new_tokens is required" in told
    code, _, told = call(model, data, "--output", tmp_path / "out", "--max_new_tokens", "8")
    assert code == 0, told
    found = load_dataset(str(tmp_path / "out"), split="train")
    assert set(found["reason"]) <= {None, "no_eos", "empty"} and any(found["label"])
    assert "text-generation" in card_of(tmp_path / "out")


def test_other_models_are_refused(tmp_path: Path) -> None:
    from transformers import BertConfig, BertModel

    BertModel(BertConfig(vocab_size=9, hidden_size=4, num_hidden_layers=1, num_attention_heads=1)).save_pretrained(
        tmp_path / "model"
    )
    with pytest.raises(NotImplementedError, match="BertModel labels no data sets yet"):
        load_head(str(tmp_path / "model"))
