from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from datasets import Dataset, DatasetDict

from hf_ema_scaling.data.audio import read_audio
from hf_ema_scaling.recipe import load_speech, sources

Manifest = Callable[..., Path]


def wav(path: Path, samples: int = 800) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, np.full(samples, 0.25, dtype=np.float32), 16_000)


def test_manifest_paths_are_relative_to_it(
    tmp_path: Path, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest(tmp_path / "a.jsonl", 3, seed=0, text="ab")
    monkeypatch.chdir(tmp_path.parent)
    dataset = load_speech(f"{tmp_path.name}/a.jsonl")
    assert dataset.column_names == ["audio", "text"]
    assert dataset["text"][:] == ["ab"] * 3
    assert [Path(path) for path in dataset["audio"]] == [tmp_path / f"wav/a{row}.wav" for row in range(3)]


def test_texts_are_not_needed_where_they_are_not_read(tmp_path: Path, manifest: Manifest) -> None:
    path = manifest(tmp_path / "a.jsonl", 2, seed=0, labelled=False)
    assert load_speech(str(path), text_column=None).column_names == ["audio"]
    with pytest.raises(ValueError, match=r"a.jsonl, row 1: no text; it has audio, duration, id. Name the columns"):
        load_speech(str(path))
    with pytest.raises(ValueError, match="no sound; it has audio"):
        load_speech(str(path), audio_column="sound", text_column=None)


def test_features_are_made_anew_when_a_file_changes(tmp_path: Path, manifest: Manifest) -> None:
    path = manifest(tmp_path / "a.jsonl", 2, seed=0)
    first = load_speech(str(path))
    assert load_speech(str(path))._fingerprint == first._fingerprint
    os.utime(tmp_path / "wav/a0.wav", ns=(1, 1))
    assert load_speech(str(path))._fingerprint != first._fingerprint


def test_audio_that_is_not_there(tmp_path: Path, manifest: Manifest) -> None:
    path = manifest(tmp_path / "a.jsonl", 3, seed=0)
    (tmp_path / "wav/a1.wav").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"1 of 3 audio files are not there, first .*a1.wav; paths are relative"
    ):
        load_speech(str(path))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "a.jsonl: no rows"),
        ('\n{"audio": ', "a.jsonl, line 2: not JSON"),
        ("[1]", r"line 1: a JSON object .*\[1\]"),
    ],
)
def test_manifests_that_are_none(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "a.jsonl").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        load_speech(str(tmp_path / "a.jsonl"))


def test_audio_folders(tmp_path: Path) -> None:
    for name in ("jsonl/train/x.wav", "csv/x.wav", "plain/b/x.flac", "plain/a.wav"):
        wav(tmp_path / name)
    (tmp_path / "jsonl/train/metadata.jsonl").write_text('{"file_name": "x.wav", "text": "ab"}\n')
    (tmp_path / "csv/metadata.csv").write_text("file_name,text\nx.wav,ba\n")
    for source, text in (
        (f"{tmp_path}/jsonl:train", "ab"),
        (f"{tmp_path}/jsonl/train", "ab"),
        (f"{tmp_path}/csv", "ba"),
    ):
        (row,) = load_speech(source)
        assert row["text"] == text and len(read_audio(row["audio"])) == 800
    plain = load_speech(str(tmp_path / "plain"), text_column=None)
    assert [Path(path).name for path in plain["audio"]] == ["a.wav", "x.flac"]
    with pytest.raises(ValueError, match="empty: no rows"):
        (tmp_path / "empty").mkdir()
        load_speech(str(tmp_path / "empty"), text_column=None)


def test_saved_data_sets(tmp_path: Path) -> None:
    wav(tmp_path / "x.wav")
    dataset = Dataset.from_dict({"audio": [str(tmp_path / "x.wav")], "text": ["ab"], "speaker": [3]})
    dataset.save_to_disk(tmp_path / "one")
    DatasetDict(train=dataset, test=dataset).save_to_disk(tmp_path / "many")
    for source in (f"{tmp_path}/one", f"{tmp_path}/many:test"):
        assert load_speech(source)[0] == {"audio": str(tmp_path / "x.wav"), "text": "ab"}
    with pytest.raises(ValueError, match=r"has the splits train, test: write one of them as .*many:train"):
        load_speech(f"{tmp_path}/many")
    with pytest.raises(ValueError, match="one: no column words; it has audio, text, speaker"):
        load_speech(f"{tmp_path}/one", text_column="words")


@pytest.mark.parametrize(
    ("source", "asked"),
    [
        ("owner/name:train", ("owner/name", None, "train")),
        ("openslr/librispeech_asr:clean:train.100", ("openslr/librispeech_asr", "clean", "train.100")),
        ("a/b:all:train.clean.360+train.other.500", ("a/b", "all", "train.clean.360+train.other.500")),
    ],
)
def test_hub_sources(monkeypatch: pytest.MonkeyPatch, source: str, asked: tuple[Any, ...]) -> None:
    calls = []

    def load_dataset(name: str, config: str | None, *, split: str) -> Dataset:
        calls.append((name, config, split))
        return Dataset.from_dict({"audio": ["x.wav"], "text": ["ab"]})

    monkeypatch.setattr(sources, "load_dataset", load_dataset)
    assert len(load_speech(source)) == 1
    assert calls == [asked]


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        ("owner/name", ValueError, "owner/name:split or owner/name:config:split"),
        ("owner/name:a:b:c", ValueError, "'owner/name:a:b:c' is no file or folder here"),
        ("owner/name::train", ValueError, "is no file or folder here"),
        ("./missing", FileNotFoundError, "./missing: no such file or folder, seen from"),
        ("data/missing.jsonl", FileNotFoundError, "data/missing.jsonl: no such file"),
        ("https://host/audio.tar", NotImplementedError, "streaming from a URL is not supported yet"),
        ("no-such-owner/no-such-name:train", ValueError, "no-such-name:train: neither here nor on the Hub"),
    ],
)
def test_sources_that_cannot_be(source: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        load_speech(source)


def test_a_line_may_be_blank(tmp_path: Path) -> None:
    wav(tmp_path / "x.wav")
    line = json.dumps({"audio": "x.wav", "text": "ab"})
    (tmp_path / "a.jsonl").write_text(f"\n{line}\n\n", encoding="utf-8")
    assert len(load_speech(str(tmp_path / "a.jsonl"))) == 1


@pytest.mark.parametrize(("sign", "name"), [(";", "semicolons"), ("\t", "tabs")])
@pytest.mark.parametrize("on_bad_item", ["raise", "skip"])
def test_a_table_without_commas_is_refused_as_such(tmp_path: Path, sign: str, name: str, on_bad_item: str) -> None:
    wav(tmp_path / "a.wav")
    (tmp_path / "a.csv").write_text(f"audio{sign}text\na.wav{sign}one, two\n", encoding="utf-8")
    with pytest.raises(ValueError, match=f"a.csv: its header .* has {name} where commas separate columns"):
        load_speech(str(tmp_path / "a.csv"), on_bad_item=on_bad_item)
    (tmp_path / "a.csv").write_text('audio,text\na.wav,"one, two"\n', encoding="utf-8")
    assert load_speech(str(tmp_path / "a.csv"))["text"][:] == ["one, two"]
