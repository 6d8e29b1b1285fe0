from __future__ import annotations

import gettext
import hashlib
import importlib.util
import io
import json
import struct
import zipfile
from pathlib import Path
from types import ModuleType

import pytest
import typer


def load() -> ModuleType:
    path = Path(__file__).parents[2] / "scripts" / "prepare_wagtail.py"
    spec = importlib.util.spec_from_file_location("prepare_wagtail", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


script = load()


def catalogue(pairs: dict[str, str], order: str = "<") -> bytes:
    """A .mo file, texts behind two tables."""
    pairs = {"": "Content-Type: text/plain; charset=UTF-8\n", **pairs}
    strings = [[text.encode() for text in column] for column in (sorted(pairs), [pairs[key] for key in sorted(pairs)])]
    start = 28 + 16 * len(pairs)
    tables, content = b"", b""
    for column in strings:
        for text in column:
            tables += struct.pack(f"{order}2I", len(text), start + len(content))
            content += text + b"\0"
    head = struct.pack(f"{order}7I", 0x950412DE, 0, len(pairs), 28, 28 + 8 * len(pairs), 0, 0)
    return head + tables + content


@pytest.mark.parametrize("order", ["<", ">"])
def test_catalogues_are_read_as_gettext_reads_them(order: str) -> None:
    pairs = {"Save": "Enregistrer", "menu\x04Open": "Ouvrir", "%d page\0%d pages": "%d page fr\0%d pages fr"}
    content = catalogue(pairs, order)
    found = script.read_catalogue(content)
    assert found == {"Save": "Enregistrer", "Open": "Ouvrir", "%d page": "%d page fr"}
    theirs = gettext.GNUTranslations(io.BytesIO(content))
    assert theirs.gettext("Save") == found["Save"] and theirs.pgettext("menu", "Open") == found["Open"]
    with pytest.raises(ValueError, match=r"no \.mo file: it begins with 504b0304"):
        script.read_catalogue(b"PK\x03\x04")


def test_manifests_hold_every_text_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = {f"Text {number}": f"Texte {number}" for number in range(200)}
    twins = {"Text 7": "Texte 7", "text 7.": "texte 7.", "Wide \n space": "Espace\nlarge", "Empty": " "}
    path = tmp_path / "package.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("wagtail/admin/locale/fr/LC_MESSAGES/django.mo", catalogue(texts | twins))
        archive.writestr("wagtail/zoo/locale/fr/LC_MESSAGES/django.mo", catalogue({"Text 7": "Autre"}))
        archive.writestr("wagtail/zoo/locale/it/LC_MESSAGES/django.mo", catalogue({"Text 7": "Testo"}))
    with pytest.raises(typer.Exit):
        script.main(tmp_path, path)
    assert "is not the package with sha256 1e6ad5c7" in capsys.readouterr().err
    monkeypatch.setattr(script, "SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    with pytest.raises(typer.Exit):
        script.main(tmp_path, path, language="xx")
    assert "no catalogue in 'xx'; there are fr, it" in capsys.readouterr().err
    script.main(tmp_path / "out", path, "fr", 0.2, 0.4, 0)
    names = ("evaluation", "labelled", "unlabelled")
    rows = {name: [json.loads(line) for line in (tmp_path / "out" / f"{name}.jsonl").open()] for name in names}
    sources = [row["source"] for name in names for row in rows[name]]
    assert sorted(sources) == sorted([*texts, "text 7.", "Wide space"])
    assert all(set(row) == {"source"} for row in rows["unlabelled"])
    pairs = {row["source"]: row["target"] for name in names[:2] for row in rows[name]}
    assert all((texts | {"text 7.": "texte 7.", "Wide space": "Espace large"})[key] == pairs[key] for key in pairs)
    place = {row["source"]: name for name in names for row in rows[name]}
    assert place["Text 7"] == place["text 7."]
    # Shares 0.2, 0.4, 0.4 of 202 texts: within 4 standard deviations.
    assert abs(len(rows["evaluation"]) - 40) < 24 and abs(len(rows["labelled"]) - 81) < 28
