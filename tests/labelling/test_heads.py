"""Every kind of head labels a data set as it labels each row alone, goes on after a kill, and reads a stream."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ctc_models
import pytest
import torch
from datasets import Dataset, IterableDataset, load_dataset
from label_inputs import speech_rows
from labelled_heads import CASES, Case, Row, any_ctc, heard

from hf_ema_scaling.labelling import Head, label_dataset, run, shards
from hf_ema_scaling.labelling.inputs import batches
from hf_ema_scaling.labels import LabelsByPosition, PseudoLabel
from hf_ema_scaling.spans import spans

SMALL: dict[str, Any] = {"shard_rows": 3, "batch_size": 60.0}
"""Several batches and shards: at most some rows together in either."""


def single(case: Case, head: Head, row: Row, number: int) -> PseudoLabel:
    """The label that the labeler gives the row alone."""
    labeler = head.labeler.at([number]) if isinstance(head.labeler, LabelsByPosition) else head.labeler
    with torch.no_grad():
        [label] = labeler.label(head.model, case.alone(head, row))
    return label


def rows_of(folder: Path) -> Any:
    return load_dataset(str(folder), split="train")


@pytest.mark.parametrize("name", CASES)
def test_every_row_has_the_label_it_has_alone(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES[name]
    head, rows = case.make(), case.rows()
    sizes: list[int] = []

    def watched(*arguments: Any) -> Iterator[list[int]]:
        for batch in batches(*arguments):
            sizes.append(len(batch))
            yield batch

    monkeypatch.setattr(run, "batches", watched)
    label_dataset(head, Dataset.from_list(rows), tmp_path / "out", **SMALL)
    found = rows_of(tmp_path / "out")
    assert found["row"][:] == list(range(len(rows)))
    expected = [single(case, head, row, number) for number, row in enumerate(rows)]
    for one, other in zip(found, expected, strict=True):
        assert one["label_ids"] == list(other.ids)
        assert one["reason"] == other.reason
        assert one["confidence"] == pytest.approx(other.confidence, rel=1e-4)
        assert one["label_values"] == pytest.approx(list(other.values), rel=1e-4, abs=1e-6)
        assert json.loads(one["scores"]) == pytest.approx(dict(other.scores), rel=1e-3, abs=1e-5)
    assert len({(*label.ids, *label.values) for label in expected}) >= 3
    assert any(label.kept for label in expected)
    # Rows of different lengths did share batches, so it could have gone wrong.
    assert max(sizes) > 1


@pytest.mark.parametrize("name", ctc_models.MODELS)
def test_every_ctc_head_labels_rows_as_it_labels_them_alone(name: str, tmp_path: Path) -> None:
    """Those that see padding, too (`sees_padding`)."""
    head, rows = any_ctc(name), speech_rows(4)
    label_dataset(head, Dataset.from_list(rows), tmp_path / "out")
    found = rows_of(tmp_path / "out")
    expected = [head.labeler.label(head.model, heard(head, row))[0] for row in rows]
    assert [row["label_ids"] for row in found] == [list(label.ids) for label in expected]
    assert found["confidence"][:] == pytest.approx([label.confidence for label in expected], rel=1e-3)
    assert [row["reason"] for row in found] == [label.reason for label in expected]
    assert len({label.ids for label in expected}) > 1


@pytest.mark.parametrize("name", CASES)
def test_a_run_killed_at_the_border_of_a_shard_ends_on_the_same_bytes(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = CASES[name]
    data = Dataset.from_list(case.rows())
    label_dataset(case.make(), data, tmp_path / "through", **SMALL)
    write = shards.Shards.write

    class KilledError(BaseException):
        """In the place of a kill."""

    def killed(self: shards.Shards, number: int, rows: Dataset, note: Any) -> None:
        write(self, number, rows, note)
        if number == 0:
            raise KilledError

    with monkeypatch.context() as patch:
        patch.setattr(shards.Shards, "write", killed)
        with pytest.raises(KilledError):
            label_dataset(case.make(), data, tmp_path / "killed", **SMALL)
    assert len(list((tmp_path / "killed" / "data").iterdir())) == 1
    label_dataset(case.make(), data, tmp_path / "killed", **SMALL)
    through, again = (sorted((tmp_path / part / "data").iterdir()) for part in ("through", "killed"))
    assert [path.name for path in through] == [path.name for path in again] and len(through) >= 2
    assert all(one.read_bytes() == other.read_bytes() for one, other in zip(through, again, strict=True))


@pytest.mark.parametrize("name", CASES)
def test_of_a_stream_memory_holds_one_window_of_the_needed_columns(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = CASES[name]
    rows = case.rows()
    label_dataset(case.make(), Dataset.from_list(rows), tmp_path / "loaded", **SMALL)
    given, ahead, seen = [0], [], set()

    def generate() -> Iterator[Row]:
        for row in rows:
            given[0] += 1
            yield {**row, "ballast": b"x" * 1000}

    write, windows = shards.Shards.write, run.windows

    def watched(self: shards.Shards, number: int, kept: Dataset, note: Any) -> None:
        ahead.append(given[0] - number * SMALL["shard_rows"])
        write(self, number, kept, note)

    def looked(source: Any, *arguments: Any) -> Any:
        return windows((seen.update(row) or row for row in source), *arguments)

    monkeypatch.setattr(shards.Shards, "write", watched)
    monkeypatch.setattr(run, "windows", looked)
    label_dataset(case.make(), IterableDataset.from_generator(generate), tmp_path / "streamed", **SMALL)
    # A window, and what `datasets` reads ahead.
    assert len(ahead) >= 2 and max(ahead) <= SMALL["shard_rows"] + 1
    assert "ballast" not in seen and len(seen) == 1
    loaded, streamed = (rows_of(tmp_path / part) for part in ("loaded", "streamed"))
    assert loaded.to_list() == streamed.to_list()


def test_texts_of_labels(tmp_path: Path) -> None:
    """By hand, from the ids."""

    def written(name: str) -> Any:
        label_dataset(CASES[name].make(), Dataset.from_list(CASES[name].rows()), tmp_path / name)
        return rows_of(tmp_path / name)

    alphabet = {11 + place: letter for place, letter in enumerate("abcdefghijklm")} | {10: " "}
    for name in ("whisper", "t5", "gpt2", "mbart-50"):
        # Ends, padding, languages and the unknown token; `<3>` is a token like others to this tokenizer.
        special = {5, 6, 7} | {"t5": {0, 1}, "mbart-50": {1, 2}}.get(name, {2})
        for row in written(name):
            text = "".join(alphabet.get(i, f"<{i}>") for i in row["label_ids"] if i not in special)
            assert row["label"] == (text if name == "gpt2" else text.strip())
    several = written("several-classes")
    assert all(json.loads(row["label"]) == row["classes"] for row in several)
    for row in several:
        assert row["classes"] == [("neg", "pos", "none")[i] for i, p in enumerate(row["label_values"]) if p >= 0.5]
    assert len({tuple(row["classes"]) for row in several}) >= 3
    for row in written("regression"):
        assert [float(number) for number in row["label"].split()] == pytest.approx(row["label_values"], rel=1e-7)
        assert row["label_ids"] == [] and row["reason"] is None
    for row in written("words"):
        tags = row["tags"]
        assert row["label"] == " ".join(tags) and len(tags) == len(row["tokens"])
        assert [(one["type"], one["start"], one["end"]) for one in row["spans"]] == spans(tags)
    assert any(row["spans"] for row in rows_of(tmp_path / "words"))
