"""A run that is killed goes on, and its folder ends byte for byte like that of one that was not."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, IterableDataset
from label_inputs import speech_rows

from hf_ema_scaling.labelling import Head, LabellingSummary, label_dataset, shards


class KilledError(BaseException):
    """In the place of a kill: nothing may catch it."""


class Killer:
    """Ends the process at the n-th thing that is done to the disk, before or after it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.left = -1
        self.after = False
        self.calls = 0
        for name in ("flush", "rename"):
            monkeypatch.setattr(shards, name, self.wrapped(getattr(shards, name)))
        monkeypatch.setattr(shards.pq, "write_table", self.wrapped(shards.pq.write_table, torn=True))

    def wrapped(self, function: Any, torn: bool = False) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            self.left -= 1
            if self.left == 0 and not self.after:
                if torn:
                    Path(args[1]).write_bytes(b"PAR1 torn")
                raise KilledError
            result = function(*args, **kwargs)
            if self.left == 0:
                raise KilledError
            return result

        return call


def content(folder: Path) -> dict[str, Any]:
    """All files; of the record what is not a time."""
    files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    record = json.loads(files.pop("labelling.json"))
    assert record.pop("time").keys() == {"started", "finished"}
    return {**files, "labelling.json": json.dumps(record)}


def run(head: Head, data: Dataset | IterableDataset, folder: Path, **changes: Any) -> LabellingSummary:
    options: dict[str, Any] = {"shard_rows": 3, "batch_size": 2.0, "min_confidence": 0.4, "on_bad_item": "skip"}
    return label_dataset(head, data, folder, **(options | changes))


@pytest.fixture(scope="module")
def rows() -> Dataset:
    rows = speech_rows(8)
    rows[4]["audio"]["sampling_rate"] = 0
    return Dataset.from_list(rows)


@pytest.mark.parametrize("after", [False, True])
def test_killed_at_every_moment(
    speech_head: Head, rows: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: bool
) -> None:
    killer = Killer(monkeypatch)
    expected = run(speech_head, rows, tmp_path / "through")
    moments, whole = killer.calls, content(tmp_path / "through")
    assert moments == 3 * 3 + 2 * 2 and len(whole) == 4
    for moment in range(1, moments + 1):
        folder = tmp_path / f"killed{moment}"
        killer.left, killer.after = moment, after
        with pytest.raises(KilledError):
            run(speech_head, rows, folder)
        killer.left = -1
        summary = run(speech_head, rows, folder)
        assert summary.rows == expected.rows and summary.sizes == pytest.approx(expected.sizes)
        assert content(folder) == whole


def test_finished_shards_are_not_labelled_again(
    speech_head: Head, rows: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killer = Killer(monkeypatch)
    killer.left = 2 + 3 + 3  # the second shard is about to get its name
    with pytest.raises(KilledError):
        run(speech_head, rows, tmp_path / "out")
    labelled: list[int] = []
    label = speech_head.labeler.label

    def counting(model: Any, batch: Any) -> Any:
        found = label(model, batch)
        labelled.append(len(found))
        return found

    monkeypatch.setattr(speech_head.labeler, "label", counting)
    run(speech_head, rows, tmp_path / "out")
    assert sum(labelled) == 4  # of 8 rows 3 were done and 1 cannot be read
    run(speech_head, rows, tmp_path / "out")
    assert sum(labelled) == 4


def test_a_stream_goes_on_where_it_was(
    speech_head: Head, rows: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(speech_head, rows.to_iterable_dataset(), tmp_path / "through")
    killer = Killer(monkeypatch)
    killer.left = 2 + 3 + 2
    with pytest.raises(KilledError):
        run(speech_head, rows.to_iterable_dataset(), tmp_path / "killed")
    run(speech_head, rows.to_iterable_dataset(), tmp_path / "killed")
    assert content(tmp_path / "killed") == content(tmp_path / "through")


@pytest.mark.parametrize("change", ["order", "content", "length"])
def test_a_stream_that_has_changed_does_not_go_on(
    speech_head: Head, rows: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    """Else the folder would hold some rows twice and others not at all, or rows of two data sets."""
    killer = Killer(monkeypatch)
    killer.left = 2 + 3 + 2
    with pytest.raises(KilledError):
        run(speech_head, rows.to_iterable_dataset(), tmp_path / "out")
    killer.left = -1
    other = {
        "order": rows.to_iterable_dataset().shuffle(seed=2, buffer_size=8),
        "content": Dataset.from_list(speech_rows(8)[::-1]).to_iterable_dataset(),
        "length": rows.select([0, 1]).to_iterable_dataset(),
    }[change]
    found = "there is none" if change == "length" else "its content is another"
    with pytest.raises(ValueError, match=f"end with row 3 of a stream, and now {found}: the stream has changed"):
        run(speech_head, other, tmp_path / "out")
    run(speech_head, rows.to_iterable_dataset(), tmp_path / "out")
    run(speech_head, rows.to_iterable_dataset(), tmp_path / "through")
    assert content(tmp_path / "out") == content(tmp_path / "through")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"min_confidence": 0.5}, "arguments.min_confidence was 0.4, is 0.5"),
        ({"batch_size": 3.0}, "arguments.batch_size was 2.0, is 3.0"),
        ({"data_name": "other"}, "data.name was '', is 'other'"),
    ],
)
def test_other_arguments_do_not_go_on(
    speech_head: Head, rows: Dataset, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    run(speech_head, rows, tmp_path / "out")
    with pytest.raises(ValueError, match=message):
        run(speech_head, rows, tmp_path / "out", **changes)


def test_other_data_other_weights_and_other_folders_are_refused(
    speech_head: Head, rows: Dataset, tmp_path: Path
) -> None:
    run(speech_head, rows, tmp_path / "out")
    with pytest.raises(ValueError, match=r"data.fingerprint was .* data.rows was 8, is 2"):
        run(speech_head, rows.select([0, 1]), tmp_path / "out")
    record = tmp_path / "out" / "labelling.json"
    text = record.read_text()
    record.write_text(text.replace('"weights_sha256": "', '"weights_sha256": "0'))
    with pytest.raises(ValueError, match=r"model.weights_sha256 was '0"):
        run(speech_head, rows, tmp_path / "out")
    record.write_text(text[:40])
    with pytest.raises(ValueError, match=r"labelling.json cannot be read"):
        run(speech_head, rows, tmp_path / "out")
    record.unlink()
    with pytest.raises(FileExistsError, match=r"holds no labelling.json"):
        run(speech_head, rows, tmp_path / "out")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep me")
    with pytest.raises(FileExistsError, match="choose another output folder"):
        run(speech_head, rows, tmp_path / "mine")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["notes.txt"]


def test_a_damaged_shard_is_named(speech_head: Head, rows: Dataset, tmp_path: Path) -> None:
    run(speech_head, rows, tmp_path / "out")
    record = tmp_path / "out" / "labelling.json"
    record.write_text(record.read_text().replace('"complete": true', '"complete": false'))
    shard = tmp_path / "out" / "data" / "train-00001.parquet"
    shard.write_bytes(shard.read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"train-00001.parquet is damaged"):
        run(speech_head, rows, tmp_path / "out")


SCRIPT = """
import sys
from datasets import load_from_disk
from hf_ema_scaling.labelling import label_dataset
label_dataset(sys.argv[1], load_from_disk(sys.argv[2]), sys.argv[3], shard_rows=1, device="cpu")
"""


@pytest.mark.slow
def test_kill_9(average_folder: Path, tmp_path: Path) -> None:
    Dataset.from_list(speech_rows(60)).save_to_disk(tmp_path / "data")
    arguments = [sys.executable, "-c", SCRIPT, str(average_folder), str(tmp_path / "data")]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    subprocess.run([*arguments, str(tmp_path / "through")], env=environment, check=True, capture_output=True)
    killed = 0
    for goal in (3, 30, 60):
        process = subprocess.Popen(
            [*arguments, str(tmp_path / "killed")],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        deadline = time.monotonic() + 60
        while len(list((tmp_path / "killed").glob("data/train-*.parquet"))) < goal and time.monotonic() < deadline:
            if process.poll() is not None:
                break
        if process.poll() is None and goal < 60:
            process.send_signal(signal.SIGKILL)
            killed += 1
        process.wait(timeout=60)
    assert killed == 2
    assert content(tmp_path / "killed") == content(tmp_path / "through")
