"""`hf-ema-scaling label` on corrupt inputs: an error that names the item, or written with its reason and counted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from corrupt import FILES, GOOD, LINES, TEXTS, WORDS, Dropped, Fine, Outcome, Raised, nothing_hangs, tone, wav
from datasets import load_dataset
from labelled_heads import CASES
from typer.testing import CliRunner

from hf_ema_scaling import cli
from hf_ema_scaling.data.bad_items import UNWANTED
from hf_ema_scaling.labelling import Head, loading

__all__ = ["nothing_hangs"]  # a fixture of every test here


@pytest.fixture
def heads(monkeypatch: pytest.MonkeyPatch) -> None:
    """`load_head` gives the tiny head of that name."""

    def load(name: str, **_: Any) -> Head:
        return CASES[name].make()

    monkeypatch.setattr("hf_ema_scaling.labelling.load_head", load)
    assert loading.load_head is not load


def label(*arguments: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(cli.main, ["label", *map(str, arguments), "--json"])
    return result.exit_code, result.stdout, result.stderr


def judged(name: str, data: Path, outcome: Outcome, tmp_path: Path) -> None:
    """Under both choices; what cannot be a row of the data set is not written, what cannot be read is.

    An empty text is nothing that one would train on without a label, so here it is always written with its reason.
    """
    if isinstance(outcome, Raised) and outcome.reason in UNWANTED:
        outcome = Dropped(outcome.reason)
    if isinstance(outcome, Raised):
        code, printed, told = label(name, data, "--output", tmp_path / "raise")
        assert (code, printed) == (1, "") and "Traceback" not in told
        assert any(place in told for place in ("row 2", "line 2", "1 of 3 audio files")), told
    code, printed, told = label(name, data, "--output", tmp_path / "skip", "--on_bad_item", "skip")
    assert code == 0, told
    reasons = {reason: counts["rows"] for reason, counts in json.loads(printed)["reasons"].items()}
    found = load_dataset(str(tmp_path / "skip"), split="train")
    assert sum(reasons.values()) == len(found) and found["row"][:] == list(range(len(found)))
    if isinstance(outcome, Raised | Dropped):
        assert len(found) == 2 or found["reason"][1] == outcome.reason
        others = [found["reason"][row] for row in ((0, 1) if len(found) == 2 else (0, 2))]
        assert others[0] == others[1] != outcome.reason
    else:
        assert len(found) == 3 and found["reason"][0] == found["reason"][2]


HEARD = (
    *("wav cut in half", "empty file", "text in a wav", "0 s", "5 ms", "1 h", "silence", "NaN", "floats out of range"),
    *("a rate that shares no divisor", "a rate of 2 GHz", "stereo", "flac cut short", "8 kHz"),
)


@pytest.mark.parametrize("case", HEARD)
@pytest.mark.parametrize("name", ["ctc", "moonshine"])
def test_files(case: str, name: str, heads: None, tmp_path: Path) -> None:
    content, outcome = FILES[case]
    assert content is not None
    for file, sound in (("good.wav", wav()), ("also.wav", wav()), ("bad.wav", content)):
        (tmp_path / file).write_bytes(sound)
    (tmp_path / "list.jsonl").write_text(
        "\n".join(json.dumps({"audio": file}) for file in ("good.wav", "bad.wav", "also.wav"))
    )
    judged(name, tmp_path / "list.jsonl", outcome, tmp_path)


@pytest.mark.parametrize("case", ["no file", "null audio", "audio is a number", "wrong column", "not JSON", "a list"])
def test_lines_of_a_manifest(case: str, heads: None, tmp_path: Path) -> None:
    line, outcome = LINES[case]
    assert isinstance(line, str)
    (tmp_path / "good.wav").write_bytes(wav())
    (tmp_path / "list.jsonl").write_text(f"{GOOD}\n{line}\n{GOOD}\n")
    judged("ctc", tmp_path / "list.jsonl", outcome, tmp_path)


READ = ("empty text", "white space", "null text", "a number as text", "a lone surrogate", "no known word")
KINDS = {"one-class": "text", "several-classes": "text", "t5": "source", "gpt2": "prompt"}


@pytest.mark.parametrize("case", READ)
@pytest.mark.parametrize("name", KINDS)
def test_texts(case: str, name: str, heads: None, tmp_path: Path) -> None:
    line, outcome = TEXTS[case]
    column = KINDS[name]
    lines = ['{"text": "abba"}', line, '{"text": "abba"}']
    (tmp_path / "list.jsonl").write_text("\n".join(lines).replace('"text"', f'"{column}"'), encoding="utf-8")
    judged(name, tmp_path / "list.jsonl", outcome, tmp_path)


@pytest.mark.parametrize("case", [case for case in WORDS if "tag" not in case])
def test_words(case: str, heads: None, tmp_path: Path) -> None:
    line, outcome = WORDS[case]
    good = '{"tokens": ["a", "film"]}'
    (tmp_path / "list.jsonl").write_text(f"{good}\n{line}\n{good}\n", encoding="utf-8")
    judged("words", tmp_path / "list.jsonl", outcome, tmp_path)


def test_texts_that_are_too_long(heads: None, tmp_path: Path) -> None:
    """Classified by their beginning; words, and what is written from, are left out."""
    long = " ".join(["a"] * 40)
    for name, column, reason in (
        ("one-class", "text", None),
        ("words", "tokens", "too_long"),
        ("bart", "source", "too_long"),
        ("gpt2", "prompt", "too_long"),
    ):
        values: list[Any] = [long.split(), ["a"]] if name == "words" else [long, "a"]
        (tmp_path / "list.jsonl").write_text("\n".join(json.dumps({column: value}) for value in values))
        code, _, told = label(name, tmp_path / "list.jsonl", "--output", tmp_path / name)
        assert code == 0, told
        found = load_dataset(str(tmp_path / name), split="train")
        assert found["reason"][0] == reason and found["tokens" if name != "words" else "row"][0] >= 0


def test_beyond_the_window_of_whisper(heads: None, tmp_path: Path) -> None:
    """Its window is 2 s here: what is longer is an error that names the row, or written with its reason."""
    for file, seconds in (("short.wav", 1.0), ("long.wav", 2.1), ("whole.wav", 2.0), ("very.wav", 50.0)):
        (tmp_path / file).write_bytes(wav(np.asarray(tone(seconds))))
    names = ("short", "long", "whole", "very")
    (tmp_path / "list.jsonl").write_text("\n".join(json.dumps({"audio": f"{name}.wav"}) for name in names))
    code, printed, told = label("whisper", tmp_path / "list.jsonl", "--output", tmp_path / "raise")
    assert (code, printed) == (1, "")
    assert "row 2: 2.100 s of audio, and the model hears 2 s at once" in told
    code, printed, _ = label("whisper", tmp_path / "list.jsonl", "--output", tmp_path / "s", "--on_bad_item", "skip")
    assert code == 0
    assert json.loads(printed)["reasons"]["beyond_window"] == {"rows": 2, "seconds": 52.1}
    reasons = load_dataset(str(tmp_path / "s"), split="train")["reason"][:]
    assert reasons[1] == reasons[3] == "beyond_window" not in (reasons[0], reasons[2])
    # Who says that longer rows are not wanted gets no error.
    code, _, told = label("whisper", tmp_path / "list.jsonl", "--output", tmp_path / "max", "--max_seconds", "2")
    assert code == 0, told
    reasons = load_dataset(str(tmp_path / "max"), split="train")["reason"][:]
    assert reasons[1] == reasons[3] == "too_long"


def test_there_are_enough_of_both_kinds() -> None:
    assert sum(not isinstance(FILES[case][1], Fine) for case in HEARD) >= 10
