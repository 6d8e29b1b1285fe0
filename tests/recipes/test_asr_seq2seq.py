from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import tiny_generation
import tiny_whisper
import torch
import yaml
from transformers import AutoModelForSpeechSeq2Seq, AutoProcessor, Wav2Vec2FeatureExtractor
from typer.testing import CliRunner

from hf_ema_scaling.cli import main
from hf_ema_scaling.data.speech_views import AdditiveNoise
from hf_ema_scaling.data.stream import UNLABELLED
from hf_ema_scaling.recipe import ASR_SEQ2SEQ, build_asr_seq2seq, parse, run
from hf_ema_scaling.recipe.asr_seq2seq import shorten_window, shortest_seconds
from hf_ema_scaling.training.seq2seq import EMASeq2SeqTrainer, PseudoLabelSeq2SeqTrainer


@pytest.fixture(scope="module")
def whisper(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_whisper.save(tmp_path_factory.mktemp("whisper"))


@pytest.fixture(scope="module")
def recipe(corpus: Path, whisper: Path) -> Path:
    values = {
        "recipe": "asr_seq2seq",
        "labelled": str(corpus / "labelled.jsonl"),
        "unlabelled": str(corpus / "unlabelled.jsonl"),
        "evaluation": str(corpus / "evaluation.jsonl"),
        "model_name_or_path": str(whisper),
        "language": "en",
        "max_label_tokens": 8,
        "generation_max_length": 8,
        "freq_width": 2,
        "reference_batch_size": 4,
        "per_device_train_batch_size": 2,
        "max_steps": 2,
        "pl_start": 1,
        "learning_rate": 1e-3,
        "ema_momentum": 0.5,
        "save_strategy": "no",
        "logging_steps": 1,
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    path = whisper / "recipe.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


def build(recipe: Path, output: Path, *argv: str) -> Any:
    return build_asr_seq2seq(*parse(ASR_SEQ2SEQ, ["--config", str(recipe), "--output_dir", str(output), *argv]))


@pytest.mark.parametrize("unlabelled", [True, False])
def test_two_steps_from_yaml_to_the_saved_models(recipe: Path, tmp_path: Path, unlabelled: bool) -> None:
    trainer = build(recipe, tmp_path, *(() if unlabelled else ("--unlabelled", "null")))
    assert type(trainer) is (PseudoLabelSeq2SeqTrainer if unlabelled else EMASeq2SeqTrainer)
    # <en> <transcribe> <notimestamps>, the text behind a space, the end.
    first = trainer.train_dataset[0]["labels"].tolist()
    assert first[:4] == [4, 6, 23, 10] and first[-1] == 2 and 3 not in first
    metrics = run(trainer)
    saved = json.loads((tmp_path / "metrics.json").read_text())
    assert saved["optimizer_steps"] == 2
    for weights in ("eval", "eval_ema"):
        for rate in ("wer", "cer"):
            assert saved[f"{weights}_{rate}"] == metrics[f"{weights}_{rate}"] >= 0
    student, average = (
        AutoModelForSpeechSeq2Seq.from_pretrained(folder).state_dict() for folder in (tmp_path, tmp_path / "ema")
    )
    assert all(torch.equal(value, student[name]) for name, value in trainer.model.state_dict().items())
    assert any(not torch.equal(student[name], average[name]) for name in student)
    generation = json.loads((tmp_path / "ema" / "generation_config.json").read_text())
    assert (generation["language"], generation["task"]) == ("en", "transcribe")
    assert AutoProcessor.from_pretrained(tmp_path / "ema").feature_extractor.chunk_length == tiny_whisper.WINDOW


def test_error_rates_are_of_normalised_texts_on_both_sides(recipe: Path, tmp_path: Path) -> None:
    def texts(trainer: Any) -> list[str]:
        batch = trainer.data_collator([dict(row) for row in trainer.eval_dataset])
        given = {"language": "en", "task": "transcribe", "max_length": 8, "use_cache": False}
        with torch.no_grad():
            ids = trainer.model.eval().generate(batch["input_features"], **given)
        return [trainer.processing_class.tokenizer.decode(row, skip_special_tokens=True) for row in ids]

    plain = build(recipe, tmp_path)
    # A letter that the model writes, and "b", which is in the texts.
    letters = "b" + sorted(set("".join(texts(plain))) - set("b "))[0]
    trainer = build(recipe, tmp_path, "--remove_characters", letters)
    table = str.maketrans("", "", letters)
    wanted = [
        plain.processing_class.tokenizer.decode(row, skip_special_tokens=True) for row in plain.eval_dataset["labels"]
    ]
    references, found = ([text.translate(table).split() for text in side] for side in (wanted, texts(plain)))
    errors = sum(_edits(one, other) for one, other in zip(references, found, strict=True))
    assert trainer.evaluate()["eval_wer"] == pytest.approx(errors / sum(map(len, references)))
    raw = [text.split() for text in texts(plain)]
    assert raw != found and any("b" in text for text in wanted)


def _edits(one: list[str], other: list[str]) -> int:
    line = list(range(len(other) + 1))
    for i, a in enumerate(one, 1):
        line, before = [i], line
        for j, b in enumerate(other, 1):
            line.append(min(line[-1] + 1, before[j] + 1, before[j - 1] + (a != b)))
    return line[-1]


def test_a_resumed_run_ends_on_the_same_bits(recipe: Path, tmp_path: Path) -> None:
    length = ("--max_steps", "4", "--pl_start", "2", "--save_strategy", "steps", "--save_steps", "2")
    quiet = ("--evaluation", "null")
    run(build(recipe, tmp_path / "through", *length, *quiet))
    checkpoint = tmp_path / "through" / "checkpoint-2"
    resumed = build(recipe, tmp_path / "resumed", *length, *quiet, "--resume_from_checkpoint", str(checkpoint))
    assert run(resumed)["optimizer_steps"] == 4
    for folder in ("", "ema"):
        files = [tmp_path / name / folder / "model.safetensors" for name in ("through", "resumed")]
        assert files[0].read_bytes() == files[1].read_bytes()


def test_check_and_plan(recipe: Path) -> None:
    done = CliRunner().invoke(main, ["check", str(recipe), "--ema_momentum", "0.01"])
    assert done.exit_code == 0, done.output
    found = {line.split()[0]: line.split()[1] for line in done.stdout.splitlines() if line.split()[1:]}
    assert {name: found[name] for name in ("recipe", "data", "split", "teacher")} == dict.fromkeys(
        ("recipe", "data", "split", "teacher"), "passed"
    )
    assert CliRunner().invoke(main, ["plan", str(recipe)]).exit_code == 0


def test_a_shorter_window_is_that_of_a_model_built_with_it(recipe: Path, whisper: Path, tmp_path: Path) -> None:
    short = build(recipe, tmp_path, "--window_seconds", "1", "--evaluation", "null", "--max_seconds", "0.8")
    assert float(short.train_dataset["duration"][:].max()) < 0.81
    batch = short.data_collator([dict(short.train_dataset[0])])
    assert batch["input_features"].shape == (1, 4, 100)
    reference = AutoModelForSpeechSeq2Seq.from_pretrained(
        tiny_whisper.save(tmp_path / "reference", max_source_positions=50)
    ).eval()
    weights = AutoModelForSpeechSeq2Seq.from_pretrained(whisper).state_dict()
    name = "model.encoder.embed_positions.weight"
    reference.load_state_dict({**weights, name: weights[name][:50]})
    given = {"input_features": batch["input_features"], "decoder_input_ids": torch.tensor([[3, 4, 6, 23]])}
    with torch.no_grad():
        assert torch.equal(short.model.eval()(**given).logits, reference(**given).logits)
    run(short)
    loaded = AutoModelForSpeechSeq2Seq.from_pretrained(tmp_path)
    assert loaded.config.max_source_positions == 50
    assert AutoProcessor.from_pretrained(tmp_path).feature_extractor.nb_max_frames == 100


def test_the_shortest_audio_that_moonshine_hears(whisper: Path) -> None:
    extractor = Wav2Vec2FeatureExtractor(return_attention_mask=True)
    network = tiny_generation.moonshine()
    shortest = round(shortest_seconds(network, extractor) * extractor.sampling_rate)
    decoded = {"decoder_input_ids": torch.ones(1, 1, dtype=torch.long)}
    with torch.no_grad():
        assert torch.isfinite(network(input_values=torch.randn(1, shortest), **decoded).logits).all()
        with pytest.raises(RuntimeError):
            network(input_values=torch.randn(1, shortest - 64), **decoded)
    assert 127 < shortest < 1600
    loaded = AutoModelForSpeechSeq2Seq.from_pretrained(whisper)
    assert shortest_seconds(loaded, AutoProcessor.from_pretrained(whisper).feature_extractor) == 0.0


def test_windows_that_cannot_be(whisper: Path) -> None:
    network = AutoModelForSpeechSeq2Seq.from_pretrained(whisper)
    extractor = AutoProcessor.from_pretrained(whisper).feature_extractor
    for seconds in (0, 2, 30):
        with pytest.raises(ValueError, match=f"above 0 and below 2, the window of the model, got {seconds}"):
            shorten_window(network, extractor, seconds)
    network.config.model_type = "moonshine"
    with pytest.raises(ValueError, match="window_seconds=1 is for Whisper"):
        shorten_window(network, extractor, 1)


def test_speech_longer_than_the_window_is_an_error_or_skipped(
    recipe: Path, tmp_path: Path, manifest: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    path = manifest(tmp_path / "set.jsonl", 3, seed=5)
    soundfile.write(tmp_path / "wav" / "set1.wav", np.random.default_rng(0).standard_normal(33_000) / 10, 16_000)
    sources = [word for name in ("labelled", "unlabelled", "evaluation") for word in (f"--{name}", str(path))]
    with pytest.raises(ValueError, match=r"set.jsonl: row 2: 2.062 s of audio, and the model hears 2 s at once"):
        build(recipe, tmp_path, *sources)
    trainer = build(recipe, tmp_path, *sources, "--on_bad_item", "skip")
    for rows in (trainer.eval_dataset, trainer.train_dataset, trainer.unlabeled_dataset):
        assert len(rows) == 2
    assert caplog.text.count("dropped 1 of 3 rows: 1 beyond_window") == 3
    # What is said not to be wanted is no error: in training, where max_seconds counts.
    trainer = build(recipe, tmp_path, *sources[:4], "--max_seconds", "2")
    assert len(trainer.train_dataset) == len(trainer.unlabeled_dataset) == 2
    assert caplog.text.count("dropped 1 of 3 rows: 1 too_long") == 2


def test_views_by_name_are_those_of_the_flags(recipe: Path, tmp_path: Path) -> None:
    """Noise, then SpecAugment; and a second view with which the teacher's labels are compared."""
    flags = ("--noise", "1.0", "--noise_snr_max", "20")
    views = '{"noise": {"probability": 1.0, "snr": [10, 20]}, "spec_augment": {"freq_width": 2}}'
    short = ("--max_label_tokens", "8", "--evaluation", "null")
    runs = [build(recipe, tmp_path, *short, *argv) for argv in (flags, ("--views", views))]
    for trainer in runs:
        run(trainer)
    one, two = (trainer.model.state_dict() for trainer in runs)
    assert all(torch.equal(value, two[name]) for name, value in one.items())
    second = ("--second_view", '{"noise": {"probability": 1.0, "snr": [0, 0]}}', "--filters", '{"disagree": {}}')
    compared = build(recipe, tmp_path, *short, *second)
    run(compared)
    assert compared.judge.chain.reasons == ("disagree",)
    assert isinstance(compared.labeler.view.augmentation, AdditiveNoise)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--language", "null"), "writes many languages: set language"),
        (("--language", "xx"), "language 'xx' is not known to this Whisper"),
        (("--max_seconds", "0.1"), "labelled.jsonl: all 8 rows were dropped: 8 too_long"),
        (("--task", "sing"), "task must be one of transcribe, translate"),
        (("--views", '{"speed": {}}'), "the view speed changes how long speech is"),
        (("--views", '{"echo": {}}'), "no view is called 'echo'.*there are token_masking, word_dropout, speed, noise"),
        (("--views", '{"noise": {}}', "--noise", "0.5"), "leave noise out, or views"),
        (("--second_view", '{"token_masking": {"share": 0.1}}'), "is one of texts, and this model hears speech"),
    ],
)
def test_refused(recipe: Path, tmp_path: Path, argv: tuple[str, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(recipe, tmp_path, *argv)


def test_texts_of_unlabelled_speech_are_never_read(recipe: Path, corpus: Path, tmp_path: Path) -> None:
    trainer = build(recipe, tmp_path, "--unlabelled", str(corpus / "labelled.jsonl"))
    assert trainer.unlabeled_dataset.column_names == ["input_features", "duration"]
    draws = [draw for draw in trainer.sampler.draws(1, 0) if draw.source == UNLABELLED]
    assert draws and all("labels" not in trainer.run_dataset()[draw][1] for draw in draws)


STREAM = ("--streaming", "true", "--shuffle_buffer", "0")


def test_streamed_rows_are_the_prepared_ones(recipe: Path, tmp_path: Path) -> None:
    short = ("--window_seconds", "1", "--max_label_tokens", "8")
    prepared, streamed = build(recipe, tmp_path, *short), build(recipe, tmp_path, *short, *STREAM)
    for stored, stream in (
        (prepared.train_dataset, streamed.train_dataset),
        (prepared.unlabelled_data()[0], streamed.unlabelled_data()[0]),
    ):
        rows: list[Any] = list(stream)
        assert 0 < len(rows) == len(stored)
        for row, expected in zip(rows, stored, strict=True):
            assert row.keys() == expected.keys()
            for name, value in expected.items():
                # In the cache durations have 32 bits.
                assert np.array_equal(np.asarray(row[name], dtype=value.dtype), value)


def test_a_streamed_run_resumes_on_the_same_bits(recipe: Path, tmp_path: Path) -> None:
    more = (*STREAM, "--max_steps", "4", "--pl_start", "2", "--save_strategy", "steps", "--save_steps", "2")
    more = (*more, "--evaluation", "null")
    run(build(recipe, tmp_path / "through", *more))
    checkpoint = str(tmp_path / "through" / "checkpoint-2")
    assert run(build(recipe, tmp_path / "resumed", *more, "--resume_from_checkpoint", checkpoint))
    for folder in ("", "ema"):
        files = [tmp_path / name / folder / "model.safetensors" for name in ("through", "resumed")]
        assert files[0].read_bytes() == files[1].read_bytes()


def test_views_of_windows(recipe: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"speeds=\[0.9\] change how long speech is"):
        build(recipe, tmp_path, "--speeds", "0.9")
    trainer = build(recipe, tmp_path, "--noise", "1", "--evaluation", "null")
    batch = trainer.data_collator([dict(trainer.train_dataset[0])])
    seen = trainer.augmentation({"input_features": batch["input_features"]}, [5])["input_features"]
    assert seen.shape == batch["input_features"].shape == (1, 4, 200)
    assert (seen != batch["input_features"]).all()
    # Some bins of all frames, or all bins of some frames, are masked.
    masked = seen[0] == 0
    assert masked.any() and torch.equal(masked, masked.all(0)[None] | masked.all(1)[:, None])


def test_broken_rows_are_skipped_where_the_recipe_says_so(
    recipe: Path, tmp_path: Path, manifest: Any, caplog: pytest.LogCaptureFixture
) -> None:
    path = manifest(tmp_path / "labelled.jsonl", 4, seed=4)
    (tmp_path / "wav/labelled2.wav").write_bytes(b"RIFF")
    path.write_text(path.read_text() + "not JSON\n")
    source = ("--labelled", str(path), "--evaluation", "null")
    with pytest.raises(ValueError, match=r"labelled.jsonl, line 5: not JSON"):
        build(recipe, tmp_path / "out", *source)
    with caplog.at_level("WARNING"):
        trainer = build(recipe, tmp_path / "out", *source, "--on_bad_item", "skip")
    assert len(trainer.train_dataset) == 3
    assert "1 not_a_row" in caplog.text and "1 unreadable" in caplog.text
