"""A finished run, labels, and a Hub to push them to."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import tiny
import transformers.utils.hub
from hub.loopback import TOKEN, Hub, loopback
from transformers.utils.hub import HfApi

from hf_ema_scaling.data.speech import build_character_processor


def speech_trainer(folder: Path, **changes: Any) -> Any:
    """A tiny CTC trainer with a processor and an evaluation set."""
    processor = build_character_processor(["abcdef"], num_mel_bins=8)
    assert len(processor.tokenizer) == tiny.VOCABULARY
    values = {"max_steps": 4, "kappa": 2, "small_batch_until": 2, "learning_rate": 3e-2} | changes
    args = tiny.arguments(folder, **values)
    more = {"eval_dataset": tiny.speech(3, 5, features=8), "processing_class": processor}
    return tiny.trainer(tiny.parakeet(), args, tiny.speech(12, features=8), **more)


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run; not to be changed."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    made = speech_trainer(folder)
    made.train()
    made.evaluate()
    made.save_model()
    (folder / "run.json").unlink()
    (folder / "curve.png").write_bytes(b"\x89PNG figure")
    (folder / "checkpoint-4").mkdir()
    (folder / "checkpoint-4" / "optimizer.pt").write_bytes(b"not for the Hub")
    (folder / "training_args.bin").write_bytes(b"not for the Hub")
    return folder


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy of the run's folder."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A Hub that this process talks to, with a token."""
    with loopback() as server:
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.url)
        monkeypatch.setattr(transformers.utils.hub, "_hf_api", HfApi(endpoint=server.url))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield server


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that would have been waited, ours and the client's."""
    waited: list[float] = []
    monkeypatch.setattr("time.sleep", waited.append)
    return waited


def content(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below a folder, and its folders."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        for path in folder.rglob("*")
    }


@pytest.fixture
def labels(tmp_path: Path) -> Path:
    """A folder as `hf-ema-scaling label` writes it."""
    return write_labels(tmp_path / "labels")


def write_labels(folder: Path, change: Callable[[dict[str, Any]], None] = lambda record: None) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    (folder / "data").mkdir(parents=True)
    for shard in range(2):
        rows = range(3 * shard, 3 * shard + 3)
        columns = {
            "text": [f"text {row}" for row in rows],
            "row": list(rows),
            "label": ["positive", "negative", ""],
            "label_ids": [[1], [0], []],
            "confidence": pa.array([0.9, 0.75, 0.0], pa.float32()),
            "reason": pa.array([None, None, "empty_text"], pa.string()),
            "scores": ['{"agreement": 1.0}', "{}", "{}"],
            "tokens": pa.array([2.0, 2.0, 0.0], pa.float32()),
        }
        pq.write_table(pa.table(columns), folder / "data" / f"train-{shard:05d}.parquet")
    record: dict[str, Any] = {
        "format_version": 1,
        "model": {
            "name": "run/ema",
            "class": "BertForSequenceClassification",
            "dtype": "float32",
            "weights_sha256": "ab" * 32,
            "average": {"num_updates": 17, "state": {}},
        },
        "data": {"name": "reviews.jsonl", "fingerprint": "f00", "rows": 6},
        "arguments": {"column": "text", "min_confidence": 0.5, "max_length": None},
        "on_bad_item": "skip",
        "versions": {"hf-ema-scaling": "0.1.0", "torch": "2.14"},
        "time": {"started": "2026-01-01T00:00:00+00:00", "finished": "2026-01-01T00:01:00+00:00"},
        "complete": True,
        "summary": {
            "unit": "tokens",
            "reasons": {"kept": {"rows": 4, "tokens": 8.0}, "empty_text": {"rows": 2, "tokens": 0.0}},
        },
    }
    change(record)
    (folder / "labelling.json").write_text(json.dumps(record, indent=1), encoding="utf-8")
    return folder
