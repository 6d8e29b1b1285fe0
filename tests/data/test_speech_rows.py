from __future__ import annotations

import logging

import numpy as np
import pytest
import tiny_whisper
import torch
from datasets import Dataset
from transformers import Speech2TextFeatureExtractor

from hf_ema_scaling.data.bad_items import BadItemError
from hf_ema_scaling.data.collator import WindowCollator
from hf_ema_scaling.data.speech import SpecAugment
from hf_ema_scaling.data.speech_rows import prepare_seq2seq, window_frames

RATE = 16_000


def speech(*seconds: float, scale: float = 0.3) -> Dataset:
    generator = np.random.default_rng(0)
    audio = [scale * generator.standard_normal(int(length * RATE)).astype(np.float32) for length in seconds]
    return Dataset.from_dict(
        {
            "audio": [{"array": samples, "sampling_rate": RATE} for samples in audio],
            "text": ["ab"] * len(seconds),
        }
    )


def letters(text: str) -> list[int]:
    return [9, *(ord(letter) for letter in text.strip()), 2] if text.strip() else []


@pytest.mark.parametrize("scale", [0.3, 1e-4])  # loud and so quiet that the floor of the logarithm is the padding
def test_windows_filled_again_are_the_extractors_own(scale: float) -> None:
    extractor = tiny_whisper.extractor()
    # Lengths on and beside the borders of frames, up to the whole window.
    lengths = [0.5, 0.50005, 0.5125, 1.0, 1.97, 1.985, 1.99, 2.0]
    dataset = speech(*lengths, scale=scale)
    prepared = prepare_seq2seq(dataset, extractor, letters)
    assert sorted(prepared.column_names) == ["duration", "input_features", "labels"]
    batch = WindowCollator(window_frames(extractor)[0] or 0)([dict(row) for row in prepared])
    waves = [np.asarray(row["audio"]["array"], dtype=np.float32) for row in dataset]
    expected = [extractor(wave, sampling_rate=RATE).input_features[0] for wave in waves]
    assert batch["input_features"].shape == (8, 4, 200)
    np.testing.assert_array_equal(batch["input_features"].numpy(), np.stack(expected))
    assert len(prepared[0]["input_features"]) == 53 and len(prepared[7]["input_features"]) == 200
    assert batch["labels"].tolist() == [[9, 97, 98, 2]] * 8


def test_rows_that_do_not_fit_are_counted(caplog: pytest.LogCaptureFixture) -> None:
    dataset = speech(0.5, 0.5, 2.1, 0.5, 0.5, 0.01)
    dataset = dataset.remove_columns("text").add_column("text", ["a", " ", "a", "abcdef", "a", "a"])
    audio = dataset["audio"][:]
    audio[4]["array"] = [0.0] * 8000
    dataset = dataset.remove_columns("audio").add_column("audio", audio)
    with caplog.at_level(logging.WARNING):
        prepared = prepare_seq2seq(dataset, tiny_whisper.extractor(), letters, max_tokens=7, max_seconds=2.0)
    assert [row.tolist() for row in prepared["labels"]] == [[9, 97, 2]]
    assert "dropped 5 of 6 rows: 1 empty_text, 1 no_features, 1 silent, 1 too_long, 1 too_many_tokens" in caplog.text
    assert "; first: row 2: text is empty; row 3: 2.100 s of audio, at most 2 s are wanted; row 4: text" in caplog.text
    with pytest.raises(BadItemError, match=r"row 3: 2.100 s of audio, and the model hears 2 s at once, without times"):
        prepare_seq2seq(dataset, tiny_whisper.extractor(), letters, max_tokens=7)
    prepare_seq2seq(dataset, tiny_whisper.extractor(), letters, max_tokens=7, on_bad_item="skip")
    assert "dropped 5 of 6 rows: 1 beyond_window, 1 empty_text, 1 no_features" in caplog.text
    with pytest.raises(ValueError, match="no column 'words' in the data set"):
        prepare_seq2seq(dataset, tiny_whisper.extractor(), letters, text_column="words")


def test_extractors_without_a_window_pad_nothing() -> None:
    extractor = Speech2TextFeatureExtractor(feature_size=8, num_mel_bins=8)
    prepared = prepare_seq2seq(speech(0.5, 3.0), extractor, letters, text_column=None)
    assert window_frames(extractor) == (None, float("inf"))
    assert "labels" not in prepared.column_names
    assert [row.shape for row in prepared["input_features"]] == [(48, 8), (298, 8)]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"input_values": [0.0]}, "needs 'input_features'"),
        ({"input_features": np.zeros((11, 4))}, "has 11 frames, of at most 10"),
        ({"input_features": np.zeros((0, 4))}, "has 0 frames"),
        ({"input_features": np.full((2, 4), np.nan)}, "not finite"),
    ],
)
def test_a_window_refuses(row: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        WindowCollator(10)([row])


def test_specaugment_of_windows_is_that_of_frames_turned() -> None:
    features = torch.rand(3, 24, 60) + 1
    turned = SpecAugment(freq_width=8)({"input_features": features.transpose(1, 2)}, [1, 2, 3])["input_features"]
    found = SpecAugment(freq_width=8, bins_first=True)({"input_features": features}, [1, 2, 3])["input_features"]
    assert torch.equal(found, turned.transpose(1, 2))
    assert not torch.equal(found, features)


def refusing(text: str) -> list[int]:
    if "<" in text:
        raise BadItemError(f"text {text!r} holds a mark", "special_tokens")
    return letters(text)


def test_broken_rows_are_errors_or_skipped(caplog: pytest.LogCaptureFixture) -> None:
    dataset = speech(*[0.5] * 5).remove_columns("text").add_column("text", ["a", "<", None, "b", "abcdef"])
    audio = dataset["audio"][:]
    audio[3]["sampling_rate"] = 0
    dataset = dataset.remove_columns("audio").add_column("audio", audio)

    def prepare(rows: Dataset, choice: str) -> Dataset:
        return prepare_seq2seq(rows, tiny_whisper.extractor(), refusing, max_tokens=7, on_bad_item=choice)

    for row, message in ((1, "row 2: text '<' holds a mark"), (2, "row 2: text is null"), (3, "row 2: audio array")):
        with pytest.raises(BadItemError, match=message):
            prepare(dataset.select([0, row]), "raise")
    with caplog.at_level(logging.WARNING):
        prepared = prepare(dataset, "skip")
    assert [row.tolist() for row in prepared["labels"]] == [[9, 97, 2]]
    assert "dropped 4 of 5 rows: 1 bad_rate, 1 no_text, 1 special_tokens, 1 too_many_tokens; first: row 2" in (
        caplog.text
    )
    # Too many tokens are no damage: dropped whatever on_bad_item says.
    assert len(prepare(dataset.select([0, 4]), "raise")) == 1
    with pytest.raises(ValueError, match="on_bad_item must be raise or skip, got 'drop'"):
        prepare(dataset, "drop")
