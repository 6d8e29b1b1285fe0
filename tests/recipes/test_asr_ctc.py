from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import yaml
from transformers import (
    AutoModelForCTC,
    AutoProcessor,
    Wav2Vec2Config,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2ForCTC,
)
from typer.testing import CliRunner

from hf_ema_scaling.cli import main
from hf_ema_scaling.data.speech import SpecAugment
from hf_ema_scaling.data.speech_views import AdditiveNoise, SpeedPerturbation
from hf_ema_scaling.data.views import Chain
from hf_ema_scaling.recipe import ASR_CTC, build_asr_ctc, parse, results_table, run
from hf_ema_scaling.training import EMATrainer, PseudoLabelTrainer
from hf_ema_scaling.training.mixin import EMATrainerMixin

SCRIPT = Path(__file__).parents[2] / "recipes" / "asr_ctc.py"


def build(config: Path, output: Path, *argv: str) -> EMATrainerMixin:
    return build_asr_ctc(*parse(ASR_CTC, ["--config", str(config), "--output_dir", str(output), *argv]))


@pytest.mark.parametrize("unlabelled", [True, False])
def test_two_steps_from_yaml_to_the_saved_models(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], unlabelled: bool
) -> None:
    trainer = build(config, tmp_path, *(() if unlabelled else ("--unlabelled", "null")))
    assert type(trainer) is (PseudoLabelTrainer if unlabelled else EMATrainer)
    metrics = run(trainer)
    printed = capsys.readouterr().out
    assert printed.index("2 optimizer steps for 2 reference steps") < printed.index("WER")
    saved = json.loads((tmp_path / "metrics.json").read_text())
    assert saved["optimizer_steps"] == 2 and saved["eval_ema_cer"] == metrics["eval_ema_cer"]
    plan = json.loads((tmp_path / "scaling_plan.json").read_text())
    assert plan["recipe"]["pl_start"] == (1 if unlabelled else None) and plan["steps"] == 2
    student, average = (
        AutoModelForCTC.from_pretrained(folder).state_dict() for folder in (tmp_path, tmp_path / "ema")
    )
    assert all(torch.equal(value, student[name]) for name, value in trainer.model.state_dict().items())
    with trainer.average.swapped(trainer.model):
        assert all(torch.equal(value, average[name]) for name, value in trainer.model.state_dict().items())
    assert any(not torch.equal(student[name], average[name]) for name in student)
    for folder in (tmp_path, tmp_path / "ema"):
        assert AutoProcessor.from_pretrained(folder).tokenizer("ab c").input_ids == [3, 4, 1, 5]


def test_a_resumed_run_ends_on_the_same_bits(config: Path, tmp_path: Path) -> None:
    length = ("--max_steps", "4", "--pl_start", "2", "--save_strategy", "steps", "--save_steps", "2")
    run(build(config, tmp_path / "through", *length))
    checkpoint = tmp_path / "through" / "checkpoint-2"
    resumed = build(config, tmp_path / "resumed", *length, "--resume_from_checkpoint", str(checkpoint))
    assert run(resumed)["optimizer_steps"] == 4
    for folder in ("", "ema"):
        files = [tmp_path / name / folder / "model.safetensors" for name in ("through", "resumed")]
        assert files[0].read_bytes() == files[1].read_bytes()


def test_resume_true_takes_the_last_checkpoint(config: Path, tmp_path: Path) -> None:
    run(build(config, tmp_path, "--save_strategy", "steps", "--save_steps", "2"))
    longer = ("--max_steps", "3", "--resume_from_checkpoint", "true", "--evaluation", "null")
    trainer = build(config, tmp_path, *longer)
    assert run(trainer)["reference_steps"] == 3
    assert trainer.plan.done_steps == 2
    with pytest.raises(ValueError, match="no checkpoint to resume from"):
        run(build(config, tmp_path / "empty", "--resume_from_checkpoint", "true"))


def test_texts_evaluation_sets_and_limits(config: Path, tmp_path: Path, manifest: Callable[..., Path]) -> None:
    upper = manifest(tmp_path / "upper.jsonl", 4, seed=3, text="A b, C.")
    sets = json.dumps({"one": str(upper), "two": str(upper)})
    trainer = build(
        config,
        tmp_path,
        *("--labelled", str(upper), "--evaluation", sets, "--text_case", "lower", "--remove_characters", ".,"),
        *("--max_labelled", "3", "--max_evaluation", "2", "--max_unlabelled", "5"),
    )
    assert len(trainer.train_dataset) == 3
    assert {name: len(rows) for name, rows in trainer.eval_dataset.items()} == {"one": 2, "two": 2}
    assert len(trainer.unlabelled_data()[0]) == 5
    assert "labels" not in trainer.unlabelled_data()[0].column_names
    assert trainer.train_dataset[0]["labels"].tolist() == [3, 1, 4, 1, 5]
    durations = trainer.eval_dataset["one"]["duration"][:]
    assert list(durations) == sorted(durations, reverse=True)


def test_texts_of_a_saved_data_set_are_normalised(config: Path, tmp_path: Path, manifest: Callable[..., Path]) -> None:
    """As the Hub's are: tables on disk, to which `datasets` adds columns in memory."""
    manifest(tmp_path / "upper.jsonl", 4, seed=3)
    paths = [str(tmp_path / f"wav/upper{row}.wav") for row in range(4)]
    columns = {"audio": paths, "text": ["A b, C."] * 4, "labels": [[9]] * 4}
    datasets.Dataset.from_dict(columns).cast_column("audio", datasets.Audio()).save_to_disk(tmp_path / "saved")
    more = ("--labelled", str(tmp_path / "saved"), "--text_case", "lower", "--remove_characters", ".,")
    trainer = build(config, tmp_path / "out", *more, "--max_labelled", "3")
    assert [list(row["labels"]) for row in trainer.train_dataset] == [[3, 1, 4, 1, 5]] * 3
    assert trainer.train_dataset.column_names == ["input_features", "duration", "labels"]


def test_features_come_from_the_cache(config: Path, tmp_path: Path) -> None:
    first, second = (build(config, tmp_path).train_dataset.cache_files for _ in range(2))
    assert first == second and first[0]["filename"].endswith(".arrow")


def test_a_pretrained_model_with_a_new_vocabulary(config: Path, corpus: Path, tmp_path: Path) -> None:
    size: dict[str, Any] = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    convolutions = {"conv_dim": (8, 8), "conv_stride": (16, 20), "conv_kernel": (16, 20), "vocab_size": 12}
    positions = {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}
    Wav2Vec2ForCTC(Wav2Vec2Config(**size, **convolutions, **positions)).save_pretrained(tmp_path / "base")
    Wav2Vec2FeatureExtractor().save_pretrained(tmp_path / "base")
    text = re.sub(r"model_config:\n( .*\n)+", "", config.read_text())
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(text + f"model_name_or_path: {tmp_path / 'base'}\nnew_vocabulary: true\n")
    with pytest.raises(ValueError, match="spec_augment masks log-mel features"):
        build(recipe, tmp_path)
    trainer = build(recipe, tmp_path, "--spec_augment", "false")
    assert trainer.model.lm_head.out_features == len(trainer.processing_class.tokenizer) == 6
    assert (trainer.model.config.pad_token_id, trainer.model.dtype) == (0, torch.float32)
    assert trainer.train_dataset.column_names == ["input_values", "duration", "labels"]


def test_views_of_speech(config: Path, tmp_path: Path) -> None:
    views = ("--speeds", "0.9", "1.1", "--noise", "0.5", "--noise_snr_min", "5")
    trainer = build(config, tmp_path, *views)
    assert isinstance(trainer.augmentation, Chain)
    speed, noise, masks = trainer.augmentation.augmentations
    assert isinstance(speed, SpeedPerturbation) and [float(s) for s in speed.speeds] == [0.9, 1.1]
    assert isinstance(noise, AdditiveNoise) and (noise.probability, noise.snr) == (0.5, (5.0, 30.0))
    assert isinstance(masks, SpecAugment)
    assert run(trainer)["optimizer_steps"] == 2
    only = build(config, tmp_path / "only", "--spec_augment", "false", "--noise", "1").augmentation
    assert isinstance(only, AdditiveNoise)
    assert build(config, tmp_path / "none", "--spec_augment", "false").augmentation is None


def test_views_by_name_in_their_order(config: Path, tmp_path: Path) -> None:
    """In a dry run: `hf-ema-scaling check` of a file with views and a second view."""
    written = {
        "views": {"spec_augment": {"time_masks": 1}, "speed": {"speeds": [0.9, 1.1]}, "noise": None},
        "second_view": {"noise": {"probability": 1.0}},
        "filters": {"disagree": {"maximum": 0.9}},
    }
    file = tmp_path / "views.yaml"
    file.write_text(config.read_text() + yaml.safe_dump(written, sort_keys=False))
    trainer = build(file, tmp_path)
    assert isinstance(trainer, PseudoLabelTrainer) and isinstance(trainer.augmentation, Chain)
    kinds = [type(view) for view in trainer.augmentation.augmentations]
    assert kinds == [SpecAugment, SpeedPerturbation, AdditiveNoise]
    assert trainer.augmentation.augmentations[0].num_time_masks == 1  # type: ignore[attr-defined]
    done = CliRunner().invoke(main, ["check", str(file), "--ema_momentum", "0.01"])
    assert done.exit_code == 0, done.output
    done = CliRunner().invoke(main, ["check", str(file), "--views", '{"sped": {}}'])
    assert done.exit_code == 1
    assert "no view is called 'sped'; did you mean speed?" in " ".join(done.output.split())


def test_broken_rows_are_skipped_where_the_recipe_says_so(
    config: Path, tmp_path: Path, manifest: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("labelled", "unlabelled"):
        path = manifest(tmp_path / f"{name}.jsonl", 6, seed=4, labelled=name == "labelled")
        (tmp_path / f"wav/{name}2.wav").write_bytes(b"RIFF")
        path.write_text(path.read_text() + "not JSON\n")
    sources = ("--labelled", str(tmp_path / "labelled.jsonl"), "--unlabelled", str(tmp_path / "unlabelled.jsonl"))
    with pytest.raises(ValueError, match=r"labelled.jsonl, line 7: not JSON"):
        build(config, tmp_path / "out", *sources)
    with caplog.at_level("WARNING"):
        trainer = build(config, tmp_path / "out", *sources, "--on_bad_item", "skip")
    assert len(trainer.train_dataset) == 5 and len(trainer.unlabelled_data()[0]) == 5
    assert caplog.text.count("1 not_a_row") == caplog.text.count("1 unreadable") == 2
    with pytest.raises(ValueError, match="on_bad_item must be raise or skip, got 'ignore'"):
        build(config, tmp_path / "out", "--on_bad_item", "ignore")


@pytest.mark.parametrize(
    ("argv", "error", "message"),
    [
        (("--pl_start", "0"), ValueError, "pl_start must be above 0"),
        (
            ("--model_config", '{"model_type": "parakeet_ctc", "encoder_config": {"hiden_size": 8}}'),
            ValueError,
            "model_config.encoder_config has no 'hiden_size': did you mean hidden_size",
        ),
        (("--model_config", '{"model_type": "parakete"}'), ValueError, "a model_type that transformers knows"),
        (("--model_config", '{"model_type": "wav2vec2"}'), NotImplementedError, "Wav2Vec2Config has no num_mel_bins"),
        (("--alphabet", "ab"), ValueError, "labelled.jsonl: 1 characters are not in the vocabulary: 'c'"),
        (("--max_seconds", "0.1"), ValueError, "labelled.jsonl: all 8 rows were dropped: 8 too_long"),
        (("--max_labelled", "0"), ValueError, "max_labelled must be at least 1, got 0"),
    ],
)
def test_refused(config: Path, tmp_path: Path, argv: tuple[str, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        build(config, tmp_path, *argv)


def test_the_table() -> None:
    metrics = {"eval_a_wer": 0.5, "eval_a_cer": 0.25, "eval_a_loss": 1.5, "eval_ema_a_wer": 0.4, "train_runtime": 3.4}
    lines = results_table({**metrics, "optimizer_steps": 7}).splitlines()
    assert [line.split() for line in lines[1:]] == [
        ["a", "student", "0.5000", "0.2500", "1.5000"],
        ["a", "average", "0.4000", "nan", "nan"],
        ["7", "optimizer", "steps,", "3", "s", "of", "training"],
    ]


@pytest.mark.distributed
def test_two_processes_take_the_steps_of_one(config: Path, tmp_path: Path, cache: Path) -> None:
    one = build(config, tmp_path / "one")
    run(one)
    options = "--cpu --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no --main_process_port 0"
    arguments = ["--config", str(config), "--output_dir", str(tmp_path / "two")]
    done = subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", *options.split(), str(SCRIPT), *arguments],
        env={**os.environ, "HF_DATASETS_CACHE": str(cache), "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("optimizer steps for 2 reference steps") == done.stdout.count("WER") == 1
    two = AutoModelForCTC.from_pretrained(tmp_path / "two")
    for name, parameter in one.model.named_parameters():
        torch.testing.assert_close(two.get_parameter(name), parameter.data, rtol=1e-3, atol=1e-5)
