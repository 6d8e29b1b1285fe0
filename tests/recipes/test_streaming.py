"""`streaming: true`: the rows that a prepared recipe trains on, computed as they are read."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hf_ema_scaling.data.streaming import StreamError
from hf_ema_scaling.recipe import ASR_CTC, build_asr_ctc, parse, run
from hf_ema_scaling.training.mixin import EMATrainerMixin


def build(config: Path, output: Path, *argv: str) -> EMATrainerMixin:
    return build_asr_ctc(*parse(ASR_CTC, ["--config", str(config), "--output_dir", str(output), *argv]))


STREAM = ("--streaming", "true", "--shuffle_buffer", "0")


def test_rows_are_those_of_the_prepared_recipe(config: Path, tmp_path: Path) -> None:
    prepared, streamed = build(config, tmp_path), build(config, tmp_path, *STREAM)
    for stored, stream in (
        (prepared.train_dataset, streamed.train_dataset),
        (prepared.unlabelled_data()[0], streamed.unlabelled_data()[0]),
    ):
        rows: list[Any] = list(stream)
        assert len(rows) == len(stored) == 8
        for row, expected in zip(rows, stored, strict=True):
            assert row.keys() == expected.keys()
            for name, value in expected.items():
                # In the cache durations have 32 bits.
                assert np.array_equal(np.asarray(row[name], dtype=value.dtype), value)
    assert len(list(build(config, tmp_path, *STREAM, "--max_unlabelled", "3").unlabelled_data()[0])) == 3


def test_a_streamed_recipe_runs_and_resumes_on_the_same_bits(config: Path, tmp_path: Path) -> None:
    more = ("--streaming", "true", "--shuffle_buffer", "3", "--max_steps", "4", "--pl_start", "2")
    more = (*more, "--save_strategy", "steps", "--save_steps", "2")
    metrics = run(build(config, tmp_path / "through", *more))
    assert metrics["optimizer_steps"] == 4 and np.isfinite(metrics["eval_ema_cer"])
    checkpoint = str(tmp_path / "through" / "checkpoint-2")
    run(build(config, tmp_path / "resumed", *more, "--resume_from_checkpoint", checkpoint))
    for folder in ("", "ema"):
        files = [tmp_path / name / folder / "model.safetensors" for name in ("through", "resumed")]
        assert files[0].read_bytes() == files[1].read_bytes()


def test_texts_are_normalised_and_rows_left_out(
    config: Path, tmp_path: Path, manifest: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    upper = manifest(tmp_path / "upper.jsonl", 4, seed=3, text="A b, C.")
    normalised = ("--labelled", str(upper), "--text_case", "lower", "--remove_characters", ".,")
    first = next(iter(build(config, tmp_path, *STREAM, *normalised).train_dataset))  # type: ignore[arg-type]
    assert list(first["labels"]) == [3, 1, 4, 1, 5]
    long = manifest(tmp_path / "long.jsonl", 3, seed=3, text="ab" * 80)
    with caplog.at_level(logging.WARNING, "hf_ema_scaling.recipe.speech_streams"):
        assert list(build(config, tmp_path, *STREAM, "--labelled", str(long)).train_dataset) == []
        assert list(build(config, tmp_path, *STREAM, "--max_seconds", "0.1").train_dataset) == []
    found = [record.getMessage() for record in caplog.records]
    assert len(found) == 2 and "labels_need_more_frames" in found[0] and "too_long" in found[1]


def test_what_streaming_needs(config: Path, tmp_path: Path, manifest: Callable[..., Path]) -> None:
    with pytest.raises(ValueError, match="give the characters by alphabet"):
        build(config, tmp_path, *STREAM, "--alphabet", "null")
    with pytest.raises(ValueError, match="num_proc=2 prepares features before the run"):
        build(config, tmp_path, *STREAM, "--num_proc", "2")
    with pytest.raises(ValueError, match="batch_unit=seconds needs the size of every row"):
        build(config, tmp_path, *STREAM, "--batch_unit", "seconds")
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        build(config, tmp_path, *STREAM, "--labelled", "absent.jsonl")
    unknown = manifest(tmp_path / "unknown.jsonl", 4, seed=3, text="ab x")
    with pytest.raises(
        StreamError, match=r"train_dataset: row 0 \(from 0\) of pass 1 cannot be read .*not in the vocabulary: 'x'"
    ):
        build(config, tmp_path, *STREAM, "--labelled", str(unknown)).train()
