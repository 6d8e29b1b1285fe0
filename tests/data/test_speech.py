from __future__ import annotations

import io
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from datasets import Audio, Dataset, Features, List, Value
from transformers import AutoProcessor, Wav2Vec2FeatureExtractor

from hf_ema_scaling.data.audio import AudioError, read_audio
from hf_ema_scaling.data.speech import SpecAugment, build_character_processor
from hf_ema_scaling.data.speech_rows import prepare_ctc
from hf_ema_scaling.data.wav import missing_bytes


def tone(seconds: float, rate: int = 16_000, hertz: float = 440.0) -> np.ndarray:
    noise = np.random.default_rng(int(hertz)).standard_normal(round(seconds * rate)) * 1e-3
    return (0.4 * np.sin(2 * np.pi * hertz * np.arange(len(noise)) / rate) + noise).astype(np.float32)


@pytest.fixture
def wav(tmp_path: Path) -> Path:
    soundfile.write(tmp_path / "a.wav", tone(0.5), 16_000, subtype="FLOAT")
    return tmp_path / "a.wav"


def test_every_kind_of_source_gives_the_same_samples(wav: Path) -> None:
    expected, content = tone(0.5), wav.read_bytes()
    sources = [
        wav,
        str(wav),
        content,
        {"path": str(wav), "bytes": None},
        {"path": "gone.wav", "bytes": content},
        {"array": expected, "sampling_rate": 16_000},
        {"array": expected.tolist(), "sampling_rate": 16_000},
        {"array": np.stack([expected, expected]), "sampling_rate": 16_000},
    ]
    for source in sources:
        waveform = read_audio(source)
        assert waveform.dtype == np.float32
        np.testing.assert_array_equal(waveform, expected)


def test_channels_are_averaged_and_int16_is_scaled(tmp_path: Path) -> None:
    left, right = tone(0.2, hertz=300), tone(0.2, hertz=500)
    soundfile.write(tmp_path / "stereo.wav", np.stack([left, right], axis=1), 16_000, subtype="FLOAT")
    np.testing.assert_allclose(read_audio(tmp_path / "stereo.wav"), (left + right) / 2, atol=1e-7)
    samples = np.array([-32768, 0, 16384], dtype=np.int16)
    np.testing.assert_array_equal(read_audio({"array": samples, "sampling_rate": 16_000}), [-1.0, 0.0, 0.5])


def test_resampling_keeps_a_tone() -> None:
    resampled = read_audio({"array": tone(0.5, rate=22_050), "sampling_rate": 22_050})
    assert len(resampled) == 8_000
    np.testing.assert_allclose(resampled[500:-500], tone(0.5)[500:-500], atol=0.01)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nowhere/a.wav", "nowhere/a.wav: no such file"),
        (b"RIFF, but not audio", "19 bytes: not readable as audio"),
        ({"path": "b.mp3", "bytes": b"junk"}, "b.mp3: not readable as audio"),
        ({"array": np.zeros(0, np.float32), "sampling_rate": 16_000}, "no samples"),
        ({"path": "c", "array": [0.0, float("nan")], "sampling_rate": 16_000}, "c: 1 samples are NaN or infinite"),
        ({"array": [0.0, 0.1]}, "needs its 'sampling_rate'"),
        ({"array": np.zeros((9, 3), np.float32), "sampling_rate": 16_000}, r"shape \(9, 3\)"),
        ({"array": [1, 40_000], "sampling_rate": 16_000}, "samples of type int64"),
        ({"array": np.array([1], np.int32), "sampling_rate": 16_000}, "samples of type int32"),
        ({"array": [0.1], "sampling_rate": 0}, "a sampling rate of 0 Hz"),
        ({"path": None, "bytes": None}, "holds no 'array', 'bytes' or 'path'"),
        (3, "audio of type int"),
    ],
)
def test_unusable_audio_says_what_and_why(source: Any, message: str) -> None:
    with pytest.raises(AudioError, match=message):
        read_audio(source)


@pytest.mark.parametrize("kept", [20, 0.5, 0.99])
@pytest.mark.parametrize("kind", ["WAV", "FLAC"])
def test_a_file_cut_short_is_not_taken_for_audio(wav: Path, kind: str, kept: float) -> None:
    whole = io.BytesIO()
    soundfile.write(whole, tone(0.5), 16_000, format=kind)
    content = whole.getvalue()
    broken = wav.with_name(f"broken.{kind.lower()}")
    broken.write_bytes(content[: kept if isinstance(kept, int) else int(kept * len(content))])
    with pytest.raises(AudioError, match=r"broken\."):
        read_audio(broken)
    with pytest.raises(AudioError):
        read_audio({"bytes": broken.read_bytes(), "path": None})


@pytest.mark.parametrize("size", [0, 0xFFFF_FFFF])
def test_a_wav_written_to_a_pipe_does_not_know_its_length_and_is_read_to_its_end(size: int) -> None:
    whole = io.BytesIO()
    soundfile.write(whole, tone(0.5), 16_000, format="WAV")
    content = bytearray(whole.getvalue())
    place = content.index(b"data") + 4
    expected = read_audio(bytes(content))
    content[place : place + 4] = size.to_bytes(4, "little")
    assert missing_bytes(io.BytesIO(bytes(content))) == 0
    if size:
        np.testing.assert_array_equal(read_audio(bytes(content)), expected)


def test_what_is_missing_is_counted_past_other_chunks() -> None:
    body = b"LIST" + (3).to_bytes(4, "little") + b"abc\0" + b"data" + (100).to_bytes(4, "little") + bytes(60)
    file = io.BytesIO(b"RIFF" + (4 + len(body)).to_bytes(4, "little") + b"WAVE" + body)
    assert missing_bytes(file) == 40
    assert file.tell() == 0
    assert missing_bytes(io.BytesIO(b"fLaC" + bytes(40))) == 0


def test_the_processor_survives_its_folder(tmp_path: Path) -> None:
    processor = build_character_processor(["hello wörld", "it's"], num_mel_bins=24)
    assert processor.tokenizer.get_vocab() == {
        token: i for i, token in enumerate(["<pad>", "|", "<unk>", *sorted(set("hellowörldit's"))])
    }
    assert processor.tokenizer.pad_token_id == 0
    processor.save_pretrained(tmp_path)
    again = AutoProcessor.from_pretrained(tmp_path)
    assert type(again) is type(processor)
    ids = again.tokenizer("hello it's").input_ids
    assert ids == processor.tokenizer("hello it's").input_ids
    assert again.tokenizer.decode(ids, group_tokens=False) == "hello it's"
    one, two = (p(tone(0.3), sampling_rate=16_000).input_features[0] for p in (processor, again))
    assert one.shape == (28, 24)
    np.testing.assert_array_equal(one, two)
    np.testing.assert_allclose(one.mean(0), 0, atol=1e-2)
    written = "".join(file.read_text() for file in tmp_path.iterdir())
    assert "vocab_file" not in written


def test_an_alphabet_is_enough_and_no_characters_are_refused() -> None:
    assert len(build_character_processor("abc").tokenizer) == 6
    with pytest.raises(ValueError, match="no characters"):
        build_character_processor([" ", ""])


def rows(*texts: str, seconds: float = 0.3) -> Dataset:
    audio = [{"array": tone(seconds, hertz=200 + 50 * i), "sampling_rate": 16_000} for i in range(len(texts))]
    features = Features(
        {
            "audio": {"array": List(Value("float32")), "sampling_rate": Value("int64")},
            "text": Value("string"),
            "speaker": Value("string"),
        }
    )
    return Dataset.from_dict({"audio": audio, "text": list(texts), "speaker": ["s"] * len(texts)}, features=features)


def test_prepared_rows_are_the_processors_output() -> None:
    processor = build_character_processor("abc ", num_mel_bins=24)
    prepared = prepare_ctc(rows("ab c", " cc  a "), processor)
    assert sorted(prepared.column_names) == ["duration", "input_features", "labels"]
    for i, text in enumerate(["ab c", "cc a"]):
        expected = processor(tone(0.3, hertz=200 + 50 * i), sampling_rate=16_000).input_features[0]
        assert prepared[i]["input_features"].dtype == np.float32
        np.testing.assert_array_equal(prepared[i]["input_features"], expected)
        assert prepared[i]["labels"].tolist() == processor.tokenizer(text).input_ids
        assert prepared[i]["duration"] == pytest.approx(0.3)


def test_unlabelled_rows_hold_no_labels_and_raw_models_get_samples() -> None:
    extractor = Wav2Vec2FeatureExtractor(do_normalize=False)
    prepared = prepare_ctc(rows("a", "b"), extractor, text_column=None)
    assert sorted(prepared.column_names) == ["duration", "input_values"]
    np.testing.assert_array_equal(prepared[1]["input_values"], tone(0.3, hertz=250))


def test_16_bit_columns_are_scaled_like_files() -> None:
    samples = (tone(0.3) * 32767).round().astype(np.int16)
    features = Features({"audio": {"array": List(Value("int16")), "sampling_rate": Value("int64")}})
    dataset = Dataset.from_dict({"audio": [{"array": samples, "sampling_rate": 16_000}]}, features=features)
    prepared = prepare_ctc(dataset, Wav2Vec2FeatureExtractor(do_normalize=False), text_column=None)
    np.testing.assert_array_equal(prepared[0]["input_values"], samples.astype(np.float32) / 32768)


def test_an_audio_column_is_read_without_its_decoder(wav: Path) -> None:
    processor = build_character_processor("abc", num_mel_bins=24)
    buffer = io.BytesIO()
    soundfile.write(buffer, tone(0.5), 16_000, format="WAV", subtype="FLOAT")
    content = [{"path": str(wav), "bytes": None}, {"path": None, "bytes": buffer.getvalue()}]
    dataset = Dataset.from_dict({"audio": content, "text": ["a", "b"]}).cast_column("audio", Audio())
    prepared = prepare_ctc(dataset, processor)
    np.testing.assert_array_equal(prepared[0]["input_features"], prepared[1]["input_features"])


def test_dropped_rows_are_counted_and_named(caplog: pytest.LogCaptureFixture) -> None:
    processor = build_character_processor("abc", num_mel_bins=24)
    texts = ["a", " ", "b", "c", "a"]
    dataset = rows(*texts)
    lengths = [4800, 4800, 160, 32_000, 4800]
    audio = [{"array": tone(2.0)[:length] * (i != 4), "sampling_rate": 16_000} for i, length in enumerate(lengths)]
    dataset = dataset.remove_columns("audio").add_column("audio", audio)
    with caplog.at_level(logging.WARNING):
        prepared = prepare_ctc(dataset, processor, max_seconds=1.0)
    assert len(prepared) == 1
    assert "dropped 4 of 5 rows: 1 empty_text, 1 no_features, 1 silent, 1 too_long; first: row 2:" in caplog.text
    with pytest.raises(ValueError, match="all 5 rows were dropped: 1 empty_text, 4 too_short"):
        prepare_ctc(dataset.select([1, 0, 2, 4, 4]), processor, min_seconds=0.31)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.rename_column("text", "sentence"), "no column 'text' in the data set: it has audio, sentence"),
        (lambda d: d.select([]), "no rows"),
    ],
)
def test_data_sets_that_do_not_fit(change: Callable[[Dataset], Dataset], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        prepare_ctc(change(rows("a", "b")), build_character_processor("ab"))


def test_characters_outside_the_vocabulary_are_listed() -> None:
    processor = build_character_processor("abc")
    with pytest.raises(ValueError, match=r"2 characters .* '7' 'B' \(in 2 of 3 texts, first in row 2\)"):
        prepare_ctc(rows("ab", "aB", "7 B"), processor)
    processor = build_character_processor("abc<pad>")
    with pytest.raises(ValueError, match="special tokens and no CTC target"):
        prepare_ctc(rows("a<pad>b"), processor)


def test_broken_audio_stops_the_preparation() -> None:
    dataset = rows("a").map(lambda row: {"audio": {"array": [float("inf")] * 9, "sampling_rate": 16_000}})
    with pytest.raises(AudioError, match="9 samples are NaN or infinite"):
        prepare_ctc(dataset, build_character_processor("a"))


def batch() -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    features = torch.rand(4, 60, 24) + 1.0
    return features, torch.tensor([60, 41, 7, 50]), [11, 12, 13, 2**40]


def test_specaugment_depends_on_the_rows_seed_content_and_length_only() -> None:
    features, lengths, seeds = batch()
    augment = SpecAugment(freq_width=8).masked
    before, state = features.clone(), torch.get_rng_state()
    together = augment(features, lengths, seeds)
    assert torch.equal(features, before)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    assert torch.equal(augment(features, lengths, seeds), together)
    for row, length in enumerate(lengths.tolist()):
        alone = augment(features[row : row + 1, :length], [length], [seeds[row]])
        assert torch.equal(alone[0], together[row, :length])
        assert torch.equal(together[row, length:], features[row, length:])
    assert not torch.equal(augment(features, lengths, [1, 2, 3, 4]), together)


def test_masks_are_zero_and_within_their_limits() -> None:
    features = torch.ones(300, 50, 24)
    time_only = SpecAugment(0, 0, 1, 30, time_share=0.2).masked(features, [50] * 300, range(300))
    masked = (time_only == 0).all(-1)
    assert torch.equal(time_only == 0, masked[:, :, None].expand(-1, -1, 24))
    assert int(masked.sum(1).max()) == 9  # fewer than 20 % of 50 frames
    assert masked.any(1).float().mean() > 0.8
    freq_only = SpecAugment(1, 6, 0, 0).masked(features, [50] * 300, range(300))
    assert int((freq_only == 0).all(1).sum(1).max()) == 5
    assert torch.equal(SpecAugment(0, 15, 0, 20).masked(features, [50] * 300, range(300)), features)
    assert torch.equal(SpecAugment(0, 15, 2, 20, time_share=0.0).masked(features, [50] * 300, range(300)), features)


def test_specaugment_refuses_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match=r"time_share 1\.5"):
        SpecAugment(time_share=1.5)
    with pytest.raises(ValueError, match="need 4 lengths of at most 60 and 4 seeds"):
        SpecAugment().masked(torch.ones(4, 60, 24), [60] * 4, [1])
