"""Corrupt inputs, what is to become of each, and a watch over time: shared by the tests of data and of labelling.

Every case is the second of three items, so that an error must find it, and what is left must be the two others.
"""

from __future__ import annotations

import io
import json
import logging
import math
import signal
import struct
from collections.abc import Callable, Iterator, Sized
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import soundfile
from datasets import Dataset, Features, List, Value

SECONDS = 20
WAITING = 120
RATE = 16_000


@pytest.fixture(autouse=True)
def nothing_hangs() -> Iterator[None]:
    """Ends a test that has worked for 20 s, or that has waited for two minutes: the machine may be busy."""

    def late(number: int, _: object) -> None:
        raise TimeoutError(f"not done after {SECONDS} s" if number == signal.SIGPROF else f"waiting for {WAITING} s")

    before = {number: signal.signal(number, late) for number in (signal.SIGPROF, signal.SIGALRM)}
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    signal.alarm(WAITING)
    yield
    signal.setitimer(signal.ITIMER_PROF, 0)
    signal.alarm(0)
    for number, handler in before.items():
        signal.signal(number, handler)


@dataclass(frozen=True)
class Raised:
    """An error that names the item, or skipped and counted for this reason."""

    reason: str
    message: str


@dataclass(frozen=True)
class Dropped:
    """Skipped and counted either way: in order, but of no use."""

    reason: str


@dataclass(frozen=True)
class Refused:
    """An error either way: there is nothing to go on with."""

    message: str


@dataclass(frozen=True)
class Fine:
    """Looks corrupt, and is read as it says."""


Outcome = Raised | Dropped | Refused | Fine


def tone(seconds: float = 0.3) -> np.ndarray:
    time = np.arange(round(seconds * RATE)) / RATE
    noise = np.random.default_rng(0).standard_normal(len(time))
    return (0.3 * np.sin(2 * np.pi * 440 * time) + 0.01 * noise).astype(np.float32)


def wav(samples: np.ndarray | None = None, rate: int = RATE, kind: str = "WAV", subtype: str | None = None) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, tone() if samples is None else samples, rate, format=kind, subtype=subtype)
    return file.getvalue()


def patched(place: int, value: bytes) -> bytes:
    """A WAV file with other bytes in its header."""
    content = wav()
    return content[:place] + value + content[place + len(value) :]


def cut(content: bytes, share: float) -> bytes:
    return content[: int(share * len(content))]


def judged(
    run: Callable[[str], Sized], outcome: Outcome, caplog: pytest.LogCaptureFixture, errors: type[Exception]
) -> None:
    for choice in ("raise", "skip"):
        caplog.clear()
        if isinstance(outcome, Refused) or (isinstance(outcome, Raised) and choice == "raise"):
            with pytest.raises(errors, match=outcome.message):
                run(choice)
            continue
        with caplog.at_level(logging.WARNING):
            left = run(choice)
        assert len(left) == (3 if isinstance(outcome, Fine) else 2)
        if isinstance(outcome, Fine):
            assert "skipped" not in caplog.text and "dropped" not in caplog.text
        else:
            assert f"1 {outcome.reason}" in caplog.text
            assert any(name in caplog.text for name in ("row 2", "line 2", "line 3"))


FILES: dict[str, tuple[bytes | None, Outcome]] = {
    "wav cut in half": (cut(wav(), 0.5), Raised("cut_short", r"row 2: .*bad.wav: cut short after 0.15 s")),
    "wav cut by two bytes": (wav()[:-2], Raised("cut_short", r"row 2: .*bad.wav: cut short.*2 more bytes")),
    "wav header alone": (wav()[:44], Raised("cut_short", "row 2: .*bad.wav")),
    "half a header": (wav()[:20], Raised("unreadable", "row 2: .*bad.wav: not readable")),
    "empty file": (b"", Raised("unreadable", "row 2: .*bad.wav: not readable")),
    "text in a wav": (b"<html>404</html>" * 20, Raised("unreadable", "row 2: .*bad.wav: not readable")),
    "random bytes": (np.random.default_rng(0).bytes(5000), Raised("unreadable", "row 2: .*bad.wav: not readable")),
    "no channels": (patched(22, struct.pack("<H", 0)), Raised("unreadable", "row 2: .*bad.wav")),
    "rate 0 in the header": (patched(24, struct.pack("<I", 0)), Raised("unreadable", "row 2: .*bad.wav")),
    "a header that promises a gigabyte": (
        patched(40, struct.pack("<I", 2**30)),
        Raised("cut_short", "row 2: .*bad.wav: cut short"),
    ),
    "0 s": (wav(np.zeros(0, np.float32)), Raised("no_samples", "row 2: .*bad.wav: no samples")),
    "5 ms": (wav(tone(0.005)), Dropped("no_features")),
    "1 h": (wav(np.tile(tone(1.0), 3600), kind="FLAC"), Dropped("too_long")),
    "silence": (wav(np.zeros(8000, np.float32)), Dropped("silent")),
    "NaN": (
        wav(np.where(np.arange(4800) == 7, np.nan, tone()), subtype="FLOAT"),
        Raised("not_finite", "row 2: .*bad.wav: 1 samples are NaN or infinite"),
    ),
    "infinity": (
        wav(np.where(np.arange(4800) < 9, np.inf, tone()), subtype="FLOAT"),
        Raised("not_finite", "row 2: .*bad.wav: 9 samples"),
    ),
    "floats out of range": (
        wav(tone() * 32768, subtype="FLOAT"),
        Raised("out_of_range", r"row 2: .*bad.wav: samples of up to 1\d{4}"),
    ),
    "floats a little above full scale": (wav(tone() * 4, subtype="FLOAT"), Fine()),
    "a rate that shares no divisor": (wav(rate=44_101), Raised("bad_rate", "row 2: .*bad.wav: 44101 Hz and 16000 Hz")),
    "a rate of 2 GHz": (
        patched(24, struct.pack("<I", 2**31 - 1)),
        Raised("bad_rate", "row 2: .*bad.wav: 2147483647 Hz"),
    ),
    "8 kHz": (wav(rate=8000), Fine()),
    "48 kHz": (wav(tone(0.9), rate=48_000), Fine()),
    "stereo": (wav(np.stack([tone(), -0.5 * tone()], axis=1)), Fine()),
    "six channels": (wav(np.stack([tone()] * 6, axis=1)), Fine()),
    "8 bits": (wav(subtype="PCM_U8"), Fine()),
    "24 bits": (wav(subtype="PCM_24"), Fine()),
    "mp3 named wav": (wav(kind="MP3"), Fine()),
    "flac named wav": (wav(kind="FLAC"), Fine()),
    "flac cut short": (cut(wav(tone(2.0), kind="FLAC"), 0.5), Raised("unreadable", "row 2: .*bad.wav")),
    "ogg header alone": (wav(kind="OGG")[:60], Raised("unreadable", "row 2: .*bad.wav: not readable")),
}


GOOD = '{"audio": "good.wav", "text": "ab"}'

LINES: dict[str, tuple[bytes | str, Outcome]] = {
    "no file": ('{"audio": "gone.wav", "text": "ab"}', Raised("missing_file", "1 of 3 audio files .*gone.wav")),
    "a folder": ('{"audio": ".", "text": "ab"}', Raised("missing_file", "1 of 3 audio files are not there")),
    "a null character in a path": (
        '{"audio": "a\\u0000.wav", "text": "ab"}',
        Raised("missing_file", "1 of 3 audio files are not there"),
    ),
    "a path of 9000 characters": (
        json.dumps({"audio": "x" * 9000, "text": "ab"}),
        Raised("missing_file", "1 of 3 audio files are not there"),
    ),
    "null audio": ('{"audio": null, "text": "ab"}', Raised("no_audio", "row 2: audio is null, no path")),
    "audio is a number": ('{"audio": 7, "text": "ab"}', Raised("no_audio", "row 2: audio is 7, no path")),
    "wrong column": (
        '{"sound": "good.wav", "text": "ab"}',
        Raised("no_column", "row 2: no audio; it has sound"),
    ),
    "no text column": ('{"audio": "good.wav"}', Raised("no_column", "row 2: no text; it has audio")),
    "not UTF-8": (b'{"audio": "good.wav", "text": "\xe4"}', Raised("not_utf8", "line 2: not UTF-8 at byte 32")),
    "UTF-16": (GOOD.encode("utf-16-le"), Raised("not_a_row", "line 2: not JSON")),
    "not JSON": ('{"audio": "good.wav", "text": ', Raised("not_a_row", "line 2: not JSON")),
    "two objects in a line": (GOOD + GOOD, Raised("not_a_row", "line 2: not JSON")),
    "a list": ('["good.wav", "ab"]', Raised("not_a_row", "line 2: a JSON object is expected")),
    "nested 100,000 deep": ("[" * 100_000, Raised("not_a_row", "line 2: not JSON")),
    "a column twice": (
        '{"audio": "good.wav", "text": "ab", "text": "c"}',
        Raised("not_a_row", "line 2: text is given twice"),
    ),
    "null text": ('{"audio": "good.wav", "text": null}', Raised("no_text", "row 2: text is null")),
    "a number as text": ('{"audio": "good.wav", "text": 5}', Raised("no_text", "row 2: text is 5, not a string")),
    "a list as text": ('{"audio": "good.wav", "text": ["ab"]}', Raised("no_text", r"row 2: text is \['ab'\]")),
    "a lone surrogate": (
        '{"audio": "good.wav", "text": "a\\ud800"}',
        Raised("not_utf8", "row 2: text has a lone surrogate at character 2"),
    ),
    "empty text": ('{"audio": "good.wav", "text": ""}', Dropped("empty_text")),
    "white space": ('{"audio": "good.wav", "text": " \\t\\n "}', Dropped("empty_text")),
    "unknown characters": (
        '{"audio": "good.wav", "text": "a7"}',
        Raised("unknown_characters", r"'7' \(in 1 of 3 texts, first in row 2\)"),
    ),
    "no known character": (
        '{"audio": "good.wav", "text": "\\u4f60\\u597d"}',
        Raised("unknown_characters", r"2 characters are not in the vocabulary.*first in row 2"),
    ),
    "a special token": (
        '{"audio": "good.wav", "text": "a<pad>"}',
        Raised("special_tokens", r"row 2: text 'a<pad>' holds \['<pad>'\]"),
    ),
    "200,000 characters": (json.dumps({"audio": "good.wav", "text": "ab " * 66_667}), Fine()),
    "a line separator in a text": ('{"audio": "good.wav", "text": "ab\u2028c"}', Fine()),
    "CRLF": (GOOD + "\r", Fine()),
    "blanks around": ("  " + GOOD + "\t ", Fine()),
    "a column too many": ('{"audio": "good.wav", "text": "ab", "labels": [1], "other": {"a": [1, "x"]}}', Fine()),
}


def rows(good: str) -> bytes:
    return f"{good}\n{good}\n{good}\n".encode()


MANIFESTS: dict[str, tuple[str, bytes, Outcome]] = {
    "empty": ("list.jsonl", b"", Refused("list.jsonl: no rows")),
    "blank lines": ("list.jsonl", b"\n \n\r\n", Refused("list.jsonl: no rows")),
    "no line is a row": ("list.jsonl", rows("{"), Refused("list.jsonl")),
    "a column that no row has": (
        "list.jsonl",
        rows('{"path": "good.wav", "text": "ab"}'),
        Refused("no audio; it has"),
    ),
    "audio for a manifest": ("list.jsonl", wav(), Refused("list.jsonl")),
    "byte order mark": ("list.jsonl", b"\xef\xbb\xbf" + rows(GOOD), Fine()),
    "Windows line ends": ("list.jsonl", rows(GOOD).replace(b"\n", b"\r\n"), Fine()),
    "csv": ("metadata.csv", b"\xef\xbb\xbffile_name,text\r\ngood.wav,ab\r\ngood.wav,ab\r\ngood.wav,ab\r\n", Fine()),
    "csv with a header alone": ("metadata.csv", b"file_name,text\n", Refused("metadata.csv: no rows")),
    "csv with a column twice": (
        "metadata.csv",
        b"file_name,text,text\ngood.wav,ab,c\n",
        Refused("metadata.csv: its header names text twice"),
    ),
    "csv that is not UTF-8": (
        "metadata.csv",
        b"file_name,text\ngood.wav,\xe4\n",
        Refused("metadata.csv: not UTF-8 at byte 25"),
    ),
    "csv with a cell too many": (
        "metadata.csv",
        b"file_name,text\ngood.wav,ab\ngood.wav,a,b\ngood.wav,ab\n",
        Raised("not_a_row", "metadata.csv, line 3: the header names 2 columns, this line has others"),
    ),
    "csv with a cell too few": (
        "metadata.csv",
        b"file_name,text\ngood.wav,ab\ngood.wav\ngood.wav,ab\n",
        Raised("not_a_row", "metadata.csv, line 3: the header names 2 columns"),
    ),
    "csv with a cell of 200,000 characters": (
        "metadata.csv",
        b"file_name,text\ngood.wav,ab\ngood.wav," + b"a" * 200_000 + b"\ngood.wav,ab\n",
        Raised("not_a_row", "metadata.csv, after line 2: not CSV"),
    ),
}


def array(samples: Any, rate: Any = RATE) -> dict[str, Any]:
    return {"array": samples, "sampling_rate": rate}


ARRAYS: dict[str, tuple[Any, str, str]] = {
    "int64 out of range": (array([1, 40_000]), "bad_array", "samples of type int64"),
    "complex": (array(tone().astype(np.complex64)), "bad_array", "samples of type complex64"),
    "strings": (array(["a", "b"]), "bad_array", "samples of type"),
    "objects": (array(np.array([None, 1.0], dtype=object)), "bad_array", "samples of type object"),
    "booleans": (array([True, False]), "bad_array", "samples of type bool"),
    "three dimensions": (array(np.zeros((2, 3, 4), np.float32)), "bad_array", r"shape \(2, 3, 4\)"),
    "no dimension": (array(np.float32(0.5)), "bad_array", r"shape \(\)"),
    "samples by channels": (array(np.zeros((9, 2), np.float32)), "bad_array", r"shape \(9, 2\)"),
    "ragged lists": (array([[0.1, 0.2], [0.3]]), "bad_array", "lists of different lengths"),
    "float64 beyond float32": (array([1e300, 0.0]), "out_of_range", "samples of up to 1e[+]300"),
    "rate negative": (array([0.1], -16_000), "bad_rate", "a sampling rate of -16000 Hz"),
    "rate absent": ({"array": [0.1]}, "bad_rate", "needs its 'sampling_rate'"),
    "rate NaN": (array([0.1], math.nan), "bad_rate", "a sampling rate of nan"),
    "rate infinite": (array([0.1], math.inf), "bad_rate", "a sampling rate of inf"),
    "rate a half": (array([0.1], 0.5), "bad_rate", "a sampling rate of 0.5"),
    "rate a word": (array([0.1], "fast"), "bad_rate", "a sampling rate of 'fast'"),
    "nothing": ({"path": None, "bytes": None, "array": None}, "no_audio", "holds no 'array', 'bytes' or 'path'"),
    "null": (None, "no_audio", "audio of type NoneType"),
    "a list": ([0.1, 0.2], "no_audio", "audio of type list"),
    "bytes that are no audio": ({"bytes": b"\x00" * 99, "path": "x.wav"}, "unreadable", "x.wav: not readable"),
}


def columns(features: dict[str, Any], good: dict[str, Any], bad: dict[str, Any]) -> Dataset:
    return Dataset.from_list([good, bad, good], features=Features(features))


AUDIO = {"array": List(Value("float64")), "sampling_rate": Value("float64")}
SAVED: dict[str, tuple[dict[str, Any], dict[str, Any], Outcome]] = {
    "null audio": (
        {"audio": AUDIO, "text": Value("string")},
        {"audio": None, "text": "ab"},
        Raised("no_audio", "row 2: audio"),
    ),
    "null text": (
        {"audio": AUDIO, "text": Value("string")},
        {"audio": array(tone().tolist()), "text": None},
        Raised("no_text", "row 2: text is null"),
    ),
    "null samples": (
        {"audio": AUDIO, "text": Value("string")},
        {"audio": array([0.1, None]), "text": "ab"},
        Raised("not_finite", "row 2: audio array: 1 samples are NaN"),
    ),
    "rate NaN": (
        {"audio": AUDIO, "text": Value("string")},
        {"audio": array(tone().tolist(), math.nan), "text": "ab"},
        Raised("bad_rate", "row 2: audio array: a sampling rate of"),
    ),
    "no samples": (
        {"audio": AUDIO, "text": Value("string")},
        {"audio": array([]), "text": "ab"},
        Raised("no_samples", "row 2: audio array: no samples"),
    ),
}


TEXTS: dict[str, tuple[str, Outcome]] = {
    "empty text": ('{"text": "", "label": "pos"}', Raised("empty_text", "row 2: text is empty")),
    "white space": ('{"text": " \\u00a0 ", "label": "pos"}', Raised("empty_text", "row 2: text is empty")),
    "null text": ('{"text": null, "label": "pos"}', Raised("no_text", "row 2: text is null")),
    "a number as text": ('{"text": 1.5, "label": "pos"}', Raised("no_text", "row 2: text is 1.5, not a string")),
    "a lone surrogate": (
        '{"text": "\\udfff", "label": "pos"}',
        Raised("not_utf8", "row 2: text has a lone surrogate"),
    ),
    "no label column": ('{"text": "a"}', Raised("no_column", "row 2: no label; it has text")),
    "null label": ('{"text": "a", "label": null}', Raised("no_label", "row 2: the label is null")),
    "empty label": ('{"text": "a", "label": " "}', Raised("no_label", "row 2: the label is null or empty")),
    "float label": ('{"text": "a", "label": 0.5}', Raised("bad_label", "row 2: the label is 0.5")),
    "NaN label": ('{"text": "a", "label": NaN}', Raised("bad_label", "row 2: the label is nan")),
    "a list of labels": ('{"text": "a", "label": ["pos"]}', Raised("bad_label", r"row 2: the label is \['pos'\]")),
    "unknown label": (
        '{"text": "a", "label": "so-so"}',
        Raised("unknown_label", "row 2: the label 'so-so' is none"),
    ),
    "label outside the range": (
        '{"text": "a", "label": 7}',
        Raised("unknown_label", "row 2: the label '7' is none"),
    ),
    "negative label": ('{"text": "a", "label": -1}', Raised("unknown_label", "row 2: the label '-1' is none of")),
    "a lone surrogate as label": ('{"text": "a", "label": "\\ud800"}', Raised("not_utf8", "row 2: label has a lone")),
    "no known word": ('{"text": "\\u4f60\\u597d", "label": "pos"}', Fine()),
    "a special token": ('{"text": "[SEP] [PAD]", "label": "pos"}', Fine()),
    "a million characters": (json.dumps({"text": "good film " * 100_000, "label": "pos"}), Fine()),
    "a null character": ('{"text": "a\\u0000b", "label": "pos"}', Fine()),
}


WORDS: dict[str, tuple[str, Outcome]] = {
    "no words": ('{"tokens": [], "ner_tags": []}', Raised("no_text", r"row 2: tokens is \[\], not a list of words")),
    "null words": ('{"tokens": null, "ner_tags": []}', Raised("no_text", "row 2: tokens is None")),
    "a text for words": ('{"tokens": "a film", "ner_tags": ["O"]}', Raised("no_text", "row 2: tokens is 'a film'")),
    "an empty word": ('{"tokens": ["a", ""], "ner_tags": ["O", "O"]}', Raised("empty_word", "row 2: the word ''")),
    "a blank word": ('{"tokens": ["\\t"], "ner_tags": ["O"]}', Raised("empty_word", "row 2: the word")),
    "a null word": ('{"tokens": ["a", null], "ner_tags": ["O", "O"]}', Raised("empty_word", "row 2: the word None")),
    "a number for a word": ('{"tokens": ["a", 7], "ner_tags": ["O", "O"]}', Raised("empty_word", "row 2: the word 7")),
    "half a character": (
        '{"tokens": ["\\ud800"], "ner_tags": ["O"]}',
        Raised("not_utf8", "row 2: tokens has a lone surrogate"),
    ),
    "a tag too few": (
        '{"tokens": ["a", "film"], "ner_tags": ["O"]}',
        Raised("no_label", "row 2: 2 words, but 1 tags"),
    ),
    "null tags": ('{"tokens": ["a"], "ner_tags": null}', Raised("no_label", "row 2: 1 words, but None tags")),
    "no tag column": ('{"tokens": ["a"]}', Raised("no_column", "row 2: no ner_tags; it has tokens")),
}

PAIRS: dict[str, tuple[str, Outcome]] = {
    "empty source": ('{"source": "", "target": "b"}', Raised("empty_text", "row 2: source is empty")),
    "blank target": ('{"source": "a", "target": " "}', Raised("empty_text", "row 2: target is empty")),
    "null target": ('{"source": "a", "target": null}', Raised("no_text", "row 2: target is null")),
    "a list for a source": ('{"source": ["a"], "target": "b"}', Raised("no_text", r"row 2: source is \['a'\]")),
    "no target column": ('{"source": "a"}', Raised("no_column", "row 2: no target; it has source")),
    "half a character": ('{"source": "\\udc00", "target": "b"}', Raised("not_utf8", "row 2: source has a lone")),
    "an end in a target": (
        '{"source": "a", "target": "b</s>"}',
        Raised("special_tokens", r"row 2: text 'b</s>' holds \['</s>'\]"),
    ),
    "an unknown character": ('{"source": "\\u4f60", "target": "b"}', Fine()),
}
