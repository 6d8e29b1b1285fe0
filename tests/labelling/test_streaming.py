"""A stream is read one window ahead, and only its needed columns."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, IterableDataset, load_dataset
from label_inputs import speech_rows

from hf_ema_scaling.labelling import Head, label_dataset
from hf_ema_scaling.labelling.sources import open_data


def test_memory_holds_one_window(speech_head: Head, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given, done, ahead = [0], [0], []
    row = speech_rows(1)[0]

    def rows() -> Iterator[dict[str, Any]]:
        for number in range(60):
            given[0] += 1
            yield {**row, "id": f"u{number}", "ballast": b"x" * 1000}

    label = speech_head.labeler.label

    def watched(model: Any, batch: Any) -> Any:
        ahead.append(given[0] - done[0])
        found = label(model, batch)
        done[0] += len(found)
        return found

    monkeypatch.setattr(speech_head.labeler, "label", watched)
    stream = IterableDataset.from_generator(rows)
    summary = label_dataset(speech_head, stream, tmp_path / "out", keep=["id"], shard_rows=5)
    assert summary.rows == {"kept": 60} and given[0] == 60
    assert max(ahead) <= 6  # a window of 5, and what `datasets` reads ahead
    found = load_dataset(str(tmp_path / "out"), split="train")
    assert found["id"][:] == [f"u{number}" for number in range(60)]
    assert "ballast" not in found.column_names


def test_a_window_is_closed_by_its_seconds(speech_head: Head, speech_data: Dataset, tmp_path: Path) -> None:
    label_dataset(speech_head, speech_data, tmp_path / "out", shard_size=1.5)
    sizes: list[list[float]] = []
    for path in sorted((tmp_path / "out" / "data").iterdir()):
        sizes.append(load_dataset("parquet", data_files=str(path), split="train")["seconds"][:])
    assert len(sizes) > 2
    for seconds in sizes[:-1]:
        assert sum(seconds) >= 1.5 > sum(seconds[:-1])


def test_streamed_and_loaded_are_labelled_alike(speech_head: Head, speech_data: Dataset, tmp_path: Path) -> None:
    speech_data.to_parquet(tmp_path / "files" / "train.parquet")
    stream = open_data(str(tmp_path / "files"), "speech", streaming=True)
    assert isinstance(stream, IterableDataset)
    label_dataset(speech_head, stream, tmp_path / "streamed", shard_rows=4)
    label_dataset(speech_head, speech_data, tmp_path / "loaded", shard_rows=4)
    for number in range(3):
        name = f"data/train-0000{number}.parquet"
        assert (tmp_path / "streamed" / name).read_bytes() == (tmp_path / "loaded" / name).read_bytes()


@pytest.mark.parametrize(
    ("source", "message"),
    [("owner/name", "owner/name:split"), ("nowhere/x:train", "cannot be streamed")],
)
def test_streams_that_cannot_be(source: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        open_data(source, "speech", streaming=True)
