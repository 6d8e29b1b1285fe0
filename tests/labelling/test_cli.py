"""`hf-ema-scaling label`."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
from datasets import load_dataset
from label_inputs import waveform
from typer.testing import CliRunner

from hf_ema_scaling.cli import main
from hf_ema_scaling.labelling import Head
from hf_ema_scaling.recipe import load_speech


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    lines = []
    for number in range(4):
        samples = waveform(0.5 + 0.1 * number, number) if number != 2 else np.zeros(8000, dtype=np.float32)
        soundfile.write(tmp_path / f"{number}.wav", samples, 16_000)
        lines.append(json.dumps({"audio": f"{number}.wav", "id": f"u{number}", "text": "HIDDEN"}))
    (tmp_path / "list.jsonl").write_text("\n".join(lines))
    return tmp_path / "list.jsonl"


def call(*arguments: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(main, ["label", *map(str, arguments)])
    return result.exit_code, result.stdout, result.stderr


def test_a_manifest_and_what_recipes_make_of_its_labels(average_folder: Path, manifest: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    code, printed, _ = call(average_folder, manifest, "--output", out, "--keep_columns", "audio,id", "--device", "cpu")
    assert code == 0
    lines = [line.split() for line in printed.splitlines()]
    assert lines[1:4] == [["kept", "3", "1.9"], ["silent", "1", "0.5"], ["total", "4", "2.4"]]
    found = load_dataset(str(out), split="train")
    assert found["reason"][:] == [None, None, "silent", None] and found["id"][:] == ["u0", "u1", "u2", "u3"]
    assert "HIDDEN" not in (out / "labelling.json").read_text()
    rows = load_speech(str(out), text_column="label")
    assert [Path(path).name for path in rows["audio"]] == ["0.wav", "1.wav", "3.wav"]
    assert rows["label"][:] == [found["label"][i] for i in (0, 1, 3)]
    # Once more: nothing is left to do, and the table is the same.
    again = call(average_folder, manifest, "--output", out, "--keep_columns", "audio,id", "--device", "cpu")
    assert again == (0, printed, "")
    code, printed, _ = call(
        *(average_folder, manifest, "--output", out, "--keep_columns", "audio,id", "--device", "cpu", "--json")
    )
    assert json.loads(printed)["reasons"]["kept"]["rows"] == 3


def test_unfinished_labels_are_no_source(average_folder: Path, manifest: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert call(average_folder, manifest, "--output", out)[0] == 0
    record = json.loads((out / "labelling.json").read_text())
    (out / "labelling.json").write_text(json.dumps(record | {"complete": False}))
    with pytest.raises(ValueError, match="not all rows are labelled yet"):
        load_speech(str(out), text_column="label")


def test_errors_are_one_line_and_exit_code_1(average_folder: Path, manifest: Path, tmp_path: Path) -> None:
    (tmp_path / "1.wav").write_bytes(b"RIFF")
    code, printed, errors = call(average_folder, manifest, "--output", tmp_path / "out")
    assert (code, printed) == (1, "")
    assert "row 2: " in errors and "1.wav: not readable as audio" in errors and "Traceback" not in errors
    code, printed, _ = call(average_folder, manifest, "--output", tmp_path / "out", "--on_bad_item", "skip")
    assert code == 0 and "unreadable" in printed
    code, _, errors = call(average_folder, tmp_path / "gone.jsonl", "--output", tmp_path / "x")
    assert code == 1 and "gone.jsonl: no such file" in errors


def test_texts(text_head: Head, tmp_path: Path) -> None:
    text_head.model.save_pretrained(tmp_path / "model")  # type: ignore[operator]
    text_head.processing_class.save_pretrained(tmp_path / "model")
    (tmp_path / "texts.jsonl").write_text('{"text": "a good film"}\n{"text": " "}\n{"text": "bad"}\n')
    code, printed, _ = call(tmp_path / "model", tmp_path / "texts.jsonl", "--output", tmp_path / "out")
    assert code == 0 and "empty_text" in printed
    found = load_dataset(str(tmp_path / "out"), split="train")
    assert set(found["label"]) <= {"neg", "pos", "none", ""} and found["reason"][:] == [None, "empty_text", None]
