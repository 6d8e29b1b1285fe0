"""Labelled data sets: recognised, pushed with confidence and provenance, with a card of their own."""

from __future__ import annotations

import io
import wave
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Audio, Features, Value
from hub.conftest import content, write_labels
from hub.loopback import Fault, Hub
from hub.test_markdown import HOSTILE, one_line, seen
from huggingface_hub import DatasetCard

from hf_ema_scaling.hub import CardDetails, PushError, push, stage
from hf_ema_scaling.hub.run_folder import RunFolderError

NAME = "tester/labels"


def card_of(folder: Path, target: Path, **details: Any) -> DatasetCard:
    return DatasetCard(stage(folder, target, repo_id=NAME, details=CardDetails(**details)).read_text(encoding="utf-8"))


def test_what_is_pushed(hub: Hub, labels: Path) -> None:
    before = content(labels)
    push(labels, NAME)
    files = hub.files(NAME, "dataset")
    assert set(files) - {"README.md"} == {name for name, digest in before.items() if digest}
    for name in ("data/train-00000.parquet", "data/train-00001.parquet", "labelling.json"):
        assert files[name] == (labels / name).read_bytes()
    assert content(labels) == before and hub.titles(NAME, "dataset") == ["Labels"]
    (labels / "data" / "train-00001.parquet").unlink()
    push(labels, NAME)
    assert "data/train-00001.parquet" not in hub.files(NAME, "dataset")
    push(labels, NAME)
    assert len(hub.titles(NAME, "dataset")) == 2


def test_a_failure_leaves_the_labels(hub: Hub, labels: Path) -> None:
    before = content(labels)
    hub.faults = [Fault("POST", "/commit/", 403)]
    with pytest.raises(PushError, match=f"To push it again: hf-ema-scaling push {labels} --repo_id {NAME}$"):
        push(labels, NAME)
    assert content(labels) == before and hub.files(NAME, "dataset") == {}


def test_card(labels: Path, tmp_path: Path) -> None:
    card = card_of(labels, tmp_path / "staged", license="cc-by-4.0", language=("en",), datasets=("owner/reviews",))
    assert card.data.to_dict() == {
        "language": ["en"],
        "license": "cc-by-4.0",
        "annotations_creators": ["machine-generated"],
        "source_datasets": ["owner/reviews"],
        "task_categories": ["text-classification"],
        "size_categories": ["n<1K"],
        "pretty_name": "labels",
        "tags": ["ema", "ema-scaling", "hf-ema-scaling", "pseudo-labels"],
        "configs": [{"config_name": "default", "data_files": [{"split": "train", "path": "data/*.parquet"}]}],
    }
    text = card.text
    assert "| kept | 4 | 8 | 66.7% |" in text and "| empty\\_text | 2 | 0 | 33.3% |" in text
    assert "4 rows have a label to train on" in text
    for told in (
        "- confidence: what the model gave the label, in \\[0, 1\\]",
        "- text: as in the data set that was labelled",
        f"SHA-256 of its weights: {'ab' * 32}",
        "moving average after 17 updates",
        "- Fingerprint of the data set: f00",
        "- min\\_confidence: 0.5",
        "hf-ema-scaling 0.1.0, torch 2.14, finished 2026-01-01T00:01:00+00:00",
        f'load_dataset("{NAME}", split="train")',
        "\n\n`labelling.json` holds",
    ):
        assert told in text, told
    assert "max\\_length" not in text


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_names(tmp_path: Path, text: str) -> None:
    def card(name: str, folder: str) -> str:
        def change(record: dict[str, Any]) -> None:
            record["model"] |= {"name": name, "class": name}
            record["data"] |= {"name": name, "fingerprint": name}
            record["arguments"] = {name: name}
            record["versions"] = {name: name}
            record["summary"]["reasons"] = {name: {"rows": 1, "tokens": 1.0}}

        labels = write_labels(tmp_path / folder, change)
        return card_of(labels, tmp_path / f"{folder}-staged", title=name, limits=name, tags=(name,)).content

    harmless, hostile = DatasetCard(card("harmless", "a")), DatasetCard(card(text, "b"))
    (before, elements), (after, found) = seen(harmless.text), seen(hostile.text)
    assert found == elements and after.count(one_line(text)) >= before.count("harmless")
    assert hostile.data.pretty_name == one_line(text) and hostile.data.tags[-1] == one_line(text)


def sound(seconds: float) -> bytes:
    stream = io.BytesIO()
    with wave.open(stream, "wb") as out:
        out.setnchannels(1)
        out.setsampwidth(2)
        out.setframerate(16000)
        out.writeframes(b"\1\0" * int(16000 * seconds))
    return stream.getvalue()


def test_audio_goes_along(labels: Path, tmp_path: Path) -> None:
    """Shards that name audio files of this machine are pushed with what is in these files."""
    path = tmp_path / "speech.wav"
    path.write_bytes(sound(0.1))
    features = Features({"audio": Audio(decode=False), "label": Value("string")})
    rows = {"audio": [{"bytes": None, "path": str(path)}, {"bytes": sound(0.2), "path": "b.wav"}], "label": ["a", "b"]}
    shard = labels / "data" / "train-00000.parquet"
    table = pa.Table.from_pydict(rows, schema=features.arrow_schema)
    pq.write_table(table, shard)
    (labels / "data" / "train-00001.parquet").unlink()
    before = content(labels)
    stage(labels, tmp_path / "staged")
    staged = pq.read_table(tmp_path / "staged" / "data" / "train-00000.parquet")
    audio = staged["audio"].to_pylist()
    assert [item["bytes"] for item in audio] == [sound(0.1), sound(0.2)]
    assert [item["path"] for item in audio] == ["speech.wav", "b.wav"]
    assert staged.schema.metadata == table.schema.metadata and staged["label"].to_pylist() == ["a", "b"]
    assert content(labels) == before


def test_labels_that_are_not_complete(tmp_path: Path) -> None:
    unfinished = write_labels(tmp_path / "a", lambda record: record.update(complete=False))
    with pytest.raises(RunFolderError, match="not all rows are labelled yet"):
        stage(unfinished, tmp_path / "staged")
    strange = write_labels(tmp_path / "b", lambda record: record.pop("versions"))
    with pytest.raises(RunFolderError, match="has no versions: it was not written by"):
        stage(strange, tmp_path / "staged")
    empty = write_labels(tmp_path / "c")
    for shard in (empty / "data").iterdir():
        shard.unlink()
    with pytest.raises(RunFolderError, match=r"holds no data/\*\.parquet"):
        stage(empty, tmp_path / "staged")
