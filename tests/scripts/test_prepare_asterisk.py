from __future__ import annotations

import gzip
import importlib.util
import io
import json
import random
import tarfile
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import soundfile
import typer


def load() -> ModuleType:
    path = Path(__file__).parents[2] / "scripts" / "prepare_asterisk.py"
    spec = importlib.util.spec_from_file_location("prepare_asterisk", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


script = load()


def write_deb(file: Path, members: dict[str, bytes]) -> Path:
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w:xz") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(f"./{name}")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    parts = {"debian-binary": b"2.0\n", "control.tar.xz": b"odd", "data.tar.xz": data.getvalue()}
    content = b"!<arch>\n"
    for name, part in parts.items():
        content += (
            f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(part):<10}`\n".encode() + part + b"\n" * (len(part) % 2)
        )
    file.write_bytes(content)
    return file


PROMPTS = {
    "hello": "Hello!",
    "digits/7": "7",
    "beep": "[this is a simple beep tone]",
    "hi": "hello",
    "note": "(a chime)",
    "ready": "It's 'ready' for line 12",
}


def g722(seconds: float, seed: int) -> bytes:
    """64 kbit/s of arbitrary code words, which G.722 turns into some sound or other."""
    return np.random.default_rng(seed).integers(0, 256, round(8000 * seconds), dtype=np.uint8).tobytes()


@pytest.fixture
def debs(tmp_path: Path) -> list[Path]:
    lines = "; a comment\n\n" + "".join(f"{key}: {text}\n" for key, text in PROMPTS.items())
    sounds = {f"{script.SOUNDS}/{key}.g722": g722(0.5, i) for i, key in enumerate([*PROMPTS, "untold", "silence/1"])}
    return [
        write_deb(tmp_path / "text.deb", {script.TRANSCRIPTS: gzip.compress(lines.encode())}),
        write_deb(tmp_path / "sounds.deb", sounds),
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Press 1, or 21.", "press one or twenty one"),
        ("It\u2019s the 'operator'", "it's the operator"),
        ("* and #", "star and pound"),
        ("[ascending tones]", None),
        ("Welcome (beep)", "welcome"),
        ("...", None),
    ],
)
def test_texts_become_what_is_spoken(text: str, expected: str | None) -> None:
    pytest.importorskip("num2words")
    assert script.normalise(text) == expected


def test_ambiguous_transcripts_are_left_out(tmp_path: Path) -> None:
    file = tmp_path / "t.gz"
    file.write_bytes(gzip.compress("\ufeffa: one: two\n;b: no\nc: x\nc: y\nd: z\nd: z\nno separator\n".encode()))
    assert script.read_transcripts(file) == {"a": "one: two", "d": "z"}


def rows() -> list[dict[str, object]]:
    return [{"id": str(i), "text": f"text {i % 60}", "duration": 1.0 + i % 3} for i in range(100)]


def test_no_text_is_in_two_splits_and_shares_are_kept() -> None:
    splits = script.split_by_text(rows(), 0.3, 0.2, seed=4)
    texts = {name: {row["text"] for row in members} for name, members in splits.items()}
    assert sum(map(len, texts.values())) == len(set().union(*texts.values())) == 60
    assert sorted((row["id"] for members in splits.values() for row in members), key=int) == [
        str(i) for i in range(100)
    ]
    total = sum(row["duration"] for row in rows())
    for name, share in (("labelled", 0.3), ("unlabelled", 0.5), ("evaluation", 0.2)):
        assert sum(row["duration"] for row in splits[name]) / total == pytest.approx(share, abs=0.04)


def test_splits_depend_on_the_seed_and_not_on_the_order() -> None:
    shuffled = rows()
    random.Random(0).shuffle(shuffled)
    splits = script.split_by_text(rows(), 0.3, 0.2, seed=4)
    assert script.split_by_text(shuffled, 0.3, 0.2, seed=4) == splits
    assert script.split_by_text(rows(), 0.3, 0.2, seed=5) != splits


def test_packages_become_wav_files_and_manifests(
    debs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("num2words")
    pytest.importorskip("av")
    output = tmp_path / "out"
    script.main(output, debs, labelled_share=0.4, evaluation_share=0.3, seed=7)
    printed = capsys.readouterr().out
    assert "left out: 1 no text, 1 nothing spoken, 2 silence or tone" in printed
    texts = {}
    for name in ("labelled", "unlabelled", "evaluation"):
        for line in (output / f"{name}.jsonl").read_text().splitlines():
            row = json.loads(line)
            assert ("text" in row, "hidden_reference" in row) == (name != "unlabelled", name == "unlabelled")
            texts[row["id"]] = row.get("text") or row["hidden_reference"]
            samples, rate = soundfile.read(output / row["audio"], dtype="int16")
            assert (rate, len(samples)) == (16_000, 8_000)
            assert row["duration"] == 0.5
    assert texts == {"hello": "hello", "hi": "hello", "digits/7": "seven", "ready": "it's ready for line twelve"}
    manifests = [(output / f"{name}.jsonl").read_bytes() for name in ("labelled", "unlabelled", "evaluation")]
    assert all(manifests)
    script.main(output, debs[::-1], labelled_share=0.4, evaluation_share=0.3, seed=7)
    assert [(output / f"{name}.jsonl").read_bytes() for name in ("labelled", "unlabelled", "evaluation")] == manifests


def test_a_package_that_would_leave_its_folder_is_refused(tmp_path: Path) -> None:
    deb = write_deb(tmp_path / "evil.deb", {"../../evil": b"x"})
    with pytest.raises(tarfile.OutsideDestinationError):
        script.unpack(deb, tmp_path / "a" / "b")
    (tmp_path / "no.deb").write_bytes(b"text")
    with pytest.raises(ValueError, match=r"no\.deb is not a Debian package"):
        script.unpack(tmp_path / "no.deb", tmp_path)


def test_missing_apt_and_missing_packages_say_what_to_do(
    debs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("num2words")
    pytest.importorskip("av")
    with pytest.raises(typer.Exit):
        script.main(tmp_path / "out", debs[:1])
    assert "the packages lack usr/share/asterisk/sounds" in capsys.readouterr().err
    apt = tmp_path / "apt-get"
    apt.write_text("#!/bin/sh\necho 'E: Unable to locate package' >&2; exit 100\n")
    apt.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    with pytest.raises(typer.Exit):
        script.main(tmp_path / "out")
    assert "run `apt-get update` as root" in capsys.readouterr().err
