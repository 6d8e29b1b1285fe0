"""What is refused, with the reason and the way out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
import tiny
import torch
from transformers import TrainingArguments

from hf_ema_scaling.scaling import half_life_from_momentum
from hf_ema_scaling.training.arguments import EMATrainingArguments, PseudoLabelArguments
from hf_ema_scaling.training.trainer import EMATrainer


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"gradient_accumulation_steps": 4},
            "gradient_accumulation_steps=4: one dataloader batch is one optimizer step",
        ),
        ({"auto_find_batch_size": True}, "auto_find_batch_size would change the batch: lower per_device"),
        ({"ignore_data_skip": True}, "ignore_data_skip would resume at another position"),
        ({"kappa": 2.0, "batch_size": 8}, "at most one of kappa, batch_size, batch_schedule, got .*'kappa': 2.0"),
        ({"kappa": 2.0, "batch_schedule": "[]"}, "at most one of kappa, batch_size, batch_schedule"),
        ({"ema_half_life": 100.0}, "at most one of ema_momentum, ema_half_life, ema_epoch_weight"),
        ({"reference_batch_size": None}, "reference_batch_size .* is required and must be above 0, got None"),
        ({"reference_batch_size": 0}, "is required and must be above 0, got 0"),
        ({"reference_batch_size": 2.5}, "reference_batch_size counts samples, got 2.5"),
        ({"small_batch_until": 5.0}, "small_batch_until goes with kappa"),
        ({"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "epoch"}, "follows metrics, not data seen"),
        ({"lr_scheduler_type": "greedy", "eval_strategy": "epoch"}, "follows metrics, not data seen"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor is not supported"),
        ({"max_example_loss": 0.0}, "max_example_loss must be above 0 or None, got 0.0"),
        ({"batch_unit": "frames"}, "batch_unit must be one of samples, seconds, tokens, got 'frames'"),
        ({"batch_unit": "tokens", "reference_batch_size": 2.5}, "reference_batch_size counts tokens, got 2.5"),
        ({"evaluate_weights": "teacher"}, "evaluate_weights must be one of both, ema, student, got 'teacher'"),
        ({"ema_buffers": "keep"}, "ema_buffers must be one of average, copy, got 'keep'"),
        ({"max_skipped_steps": -1}, r"max_skipped_steps counts steps \(0 for no limit\), got -1"),
        ({"on_nonfinite": "ignore"}, "on_nonfinite must be one of raise, skip, got 'ignore'"),
    ],
)
def test_contradictory_arguments(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny.arguments(tmp_path, **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_schedule": "[{batch_size: 4}]"}, "must be a JSON list of objects"),
        ({"batch_schedule": "[]"}, "at least one stage"),
        ({"batch_schedule": '[{"batch_size": 4}, {"batch_size": 8}]'}, "stage 0 .* needs `until`"),
        ({"batch_schedule": '[{"batch": 4}]'}, r"stage 0 has unknown keys \['batch'\]"),
        ({"batch_schedule": '[{"batch_size": 4, "until": 9}, {"batch_size": 8}]'}, "at or after the end of the run"),
        ({"batch_schedule": '[{"batch_size": "4"}]'}, "values that are not numbers"),
        ({"optim": "adafactor"}, "no scaling rule for optimizer 'adafactor'"),
        ({"ema_momentum": 1.0}, r"ema_momentum must lie in \[0, 1\), got 1.0"),
        ({"kappa": -1.0}, "kappa must be a finite number above 0"),
        (
            {"batch_unit": "seconds"},
            r"batch_unit=seconds needs the column 'duration' .* it has \['input_ids', 'labels'\]",
        ),
        ({"bucket_window": 3}, "bucket_window=3 needs lengths"),
    ],
)
def test_runs_that_cannot_be_laid_out(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EMATrainer(tiny.bert(), tiny.arguments(tmp_path, **changes), train_dataset=tiny.sentences(8))


def test_an_optimizer_without_a_rule_may_run_unscaled(tmp_path: Path) -> None:
    made = tiny.trainer(
        tiny.bert(), tiny.arguments(tmp_path, optim="adafactor", scaling_rule="none", kappa=2.0), tiny.sentences(8)
    )
    made.train()
    assert [group[0]["lr"] for group in made.recorder.groups] == [1e-2, 1e-2]


def test_what_trainers_refuse(tmp_path: Path) -> None:
    model, data, args = tiny.bert(), tiny.sentences(8), tiny.arguments(tmp_path)
    with pytest.raises(TypeError, match="args must be EMATrainingArguments, got TrainingArguments"):
        EMATrainer(model, TrainingArguments(str(tmp_path), use_cpu=True), train_dataset=data)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="args must be EMATrainingArguments, got NoneType"):
        EMATrainer(model, train_dataset=data)
    with pytest.raises(ValueError, match="compute_loss_func is not used here: pass example_loss"):
        EMATrainer(model, args, train_dataset=data, compute_loss_func=lambda *_: None)
    optimizer = torch.optim.AdamW(model.parameters())
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer)
    with pytest.raises(ValueError, match="a scheduler cannot be passed: choose lr_scheduler_type"):
        EMATrainer(model, args, train_dataset=data, optimizers=(optimizer, scheduler))
    with pytest.raises(ValueError, match="no scaling rule for optimizer 'Adadelta'"):
        EMATrainer(model, args, train_dataset=data, optimizers=(torch.optim.Adadelta(model.parameters()), None))
    with pytest.raises(ValueError, match="train_dataset is empty"):
        EMATrainer(model, args, train_dataset=datasets.Dataset.from_dict({"input_ids": []}))
    with pytest.raises(ValueError, match="no run without a train_dataset"):
        EMATrainer(model, args).plan  # noqa: B018


def test_items_without_a_size_are_refused(tmp_path: Path) -> None:
    data = tiny.speech(4)
    silent = data.remove_columns("duration").add_column("duration", [1.0, 0.0, 2.0, float("nan")])
    args = tiny.arguments(tmp_path, batch_unit="seconds", reference_batch_size=2.5)
    with pytest.raises(
        ValueError, match=r"item 1 has size 0.0; every item needs a finite size above 0 \(2 of 4 do not\)"
    ):
        EMATrainer(tiny.wav2vec2(), args, train_dataset=silent, data_collator=tiny.CTCCollator())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pl_start": -1.0}, "pl_start must be at least 0, got -1.0"),
        ({"unlabeled_ratio": 0.0}, "unlabeled_ratio must be above 0, got 0.0"),
        ({"unlabeled_weight": -0.1}, "unlabeled_weight must be at least 0, got -0.1"),
        ({"min_confidence": 1.5}, r"min_confidence must lie in \[0, 1\], got 1.5"),
        ({"pl_start": float("nan")}, "pl_start must be at least 0, got nan"),
    ],
)
def test_pseudo_label_arguments(changes: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PseudoLabelArguments(**changes)


def test_schedules_come_as_text_or_from_a_file(tmp_path: Path) -> None:
    stages = [{"batch_size": 4, "until": 2}, {"batch_size": 8}]
    text = json.dumps(stages)
    (tmp_path / "schedule.json").write_text(text)
    from_text = tiny.arguments(tmp_path, batch_schedule=text)
    from_file = tiny.arguments(tmp_path, batch_schedule=str(tmp_path / "schedule.json"))
    assert from_text.schedule() == from_file.schedule() and from_text.schedule().to_json() == stages


def test_kappa_waits_for_small_batch_until() -> None:
    def stages(**changes: Any) -> list[dict[str, float]]:
        return tiny.arguments("out", **changes).schedule(small_batch_until=3.0).to_json()

    assert stages() == [{"batch_size": 4}]
    assert stages(kappa=1.0) == [{"batch_size": 4}]
    assert stages(kappa=2.5) == [{"batch_size": 4, "until": 3.0}, {"batch_size": 10}]
    assert stages(kappa=2.5, small_batch_until=0.0) == [{"batch_size": 10}]
    assert stages(kappa=2.5, small_batch_until=7.0) == [{"batch_size": 4, "until": 7.0}, {"batch_size": 10}]
    assert stages(batch_size=6) == [{"batch_size": 6}]


def test_the_momentum_by_half_life_and_by_epoch() -> None:
    by_half_life = tiny.arguments("out", ema_momentum=None, ema_half_life=40.0)
    assert by_half_life.momentum(5.0) == pytest.approx(0.5**0.1)
    assert by_half_life.half_life(5.0) == pytest.approx(40.0)
    by_epoch = tiny.arguments("out", ema_momentum=None, ema_epoch_weight=0.2)
    assert by_epoch.momentum(5.0) ** 5 == pytest.approx(0.2)
    assert tiny.arguments("out", ema_momentum=None).momentum(5.0) == 0.999
    assert tiny.arguments("out").half_life(5.0) == half_life_from_momentum(0.9, 4)
    with pytest.raises(ValueError, match="ema_half_life must be a finite number of units, got inf"):
        tiny.arguments("out", ema_momentum=None, ema_half_life=float("inf")).momentum(5.0)


def test_arguments_are_json(tmp_path: Path) -> None:
    args = tiny.arguments(tmp_path, batch_schedule='[{"batch_size": 8}]')
    again = json.loads(args.to_json_string())
    assert again["batch_schedule"] == '[{"batch_size": 8}]' and again["reference_batch_size"] == 4
    assert isinstance(args, EMATrainingArguments)


def test_epochs_are_passes_over_the_labelled_set(tmp_path: Path) -> None:
    """20 labelled items are 5 reference steps; after pl_start a pass takes (1 + ratio) times the clock."""
    args = tiny.arguments(tmp_path, max_steps=-1, num_train_epochs=2)
    assert EMATrainer(tiny.bert(), args, train_dataset=tiny.sentences(20)).plan.recipe.max_steps == 10
    made = tiny.trainer(
        tiny.wav2vec2(),
        args,
        tiny.speech(20),
        unlabeled_dataset=tiny.speech(7, 1, labels=False),
        pseudo_label_args=tiny.pseudo(pl_start=4.0, unlabeled_ratio=3.0),
    )
    # 4 reference steps of labelled items, the other 24 items at one of four.
    assert made.plan.recipe.max_steps == 4 + 24
    assert made.sampler.labelled_passes(made.sampler.num_steps) == 2.0
