"""Steps that fp16 loss scaling skips, with a gradient scaler on the CPU, at both doors of the library."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from tiny import same_bits
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_ema_scaling.ema.skipped import SkipWatch
from hf_ema_scaling.training.callback import EMACallback

SKIPPED = {1, 3}
OPTIMIZERS = ["adamw_torch_fused", "adamw_torch", "sgd"]


class Overflow(TrainerCallback):
    """Gradients of some optimizer steps are infinite, unseen by the gradient norm, which is taken before."""

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, *, model: nn.Module, **_: Any) -> None:
        if state.global_step in SKIPPED:
            parameter = next(p for p in model.parameters() if p.grad is not None)
            parameter.grad.view(-1)[0] = math.inf


def scaler() -> torch.amp.GradScaler:
    return torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1000)


def assert_skips_moved_nothing(students: list[Any], averages: list[Any], start: Any) -> None:
    for step, (student, average) in enumerate(zip(students, averages, strict=True)):
        before = (students[step - 1], averages[step - 1]) if step else start
        same = same_bits(student, before[0]), same_bits(average, before[1])
        assert same == ((True, True) if step in SKIPPED else (False, False)), step


@pytest.mark.parametrize("optim", OPTIMIZERS)
def test_the_trainer_moves_no_average_when_a_step_is_skipped(tmp_path: Path, optim: str) -> None:
    args = tiny.arguments(tmp_path, max_steps=6, optim=optim)
    made = tiny.trainer(tiny.bert(), args, tiny.sentences(30), callbacks=[Overflow()])
    made.accelerator.scaler = scaler()
    start = tiny.parameters(made.model)
    made.train()
    assert made.accelerator.scaler.get_scale() == 1024.0 / 2 ** len(SKIPPED)
    assert made.average.num_updates == 6 - len(SKIPPED)
    assert made._last_step.end == 6.0 and made.state.global_step == 6  # the clock goes on
    recorder = made.recorder
    averages = [{name: average[name] for name in start} for average in recorder.averages]
    assert_skips_moved_nothing(recorder.weights, averages, (start, start))


def test_a_scaler_that_never_finds_its_scale_ends_the_run(tmp_path: Path) -> None:
    args = tiny.arguments(tmp_path, max_steps=6, max_skipped_steps=1)
    made = tiny.trainer(tiny.bert(), args, tiny.sentences(30), callbacks=[Overflow()])
    made.accelerator.scaler = scaler()
    with pytest.raises(FloatingPointError, match=r"1 optimizer steps in .* step 2 .* overflow at loss scale 512\.0"):
        made.train()
    assert made.average.num_updates == 1


@pytest.mark.parametrize("optim", OPTIMIZERS)
def test_the_callback_moves_no_average_when_a_step_is_skipped(tmp_path: Path, optim: str) -> None:
    average, recorder = EMACallback(momentum=0.9, reference_batch_size=4), tiny.Recorder()
    args = TrainingArguments(
        str(tmp_path), max_steps=6, optim=optim, per_device_train_batch_size=4, learning_rate=1e-2, use_cpu=True,
        save_strategy="no", logging_strategy="no", report_to="none", disable_tqdm=True,
    )  # fmt: skip
    model = tiny.bert()
    run = Trainer(model, args, train_dataset=tiny.sentences(30), callbacks=[average, recorder, Overflow()])
    run.accelerator.scaler = scaler()
    run.model = model
    recorder.trainer = type("Made", (), {"model": model, "average": property(lambda self: average.average)})()
    start = tiny.parameters(model)
    run.train()
    assert average.average.num_updates == 6 - len(SKIPPED) and average.clock == 6.0
    averages = [{name: kept[name] for name in start} for kept in recorder.averages]
    assert_skips_moved_nothing(recorder.weights, averages, (start, start))


@pytest.mark.parametrize("on_nonfinite", ["raise", "skip"])
def test_under_a_scaler_the_scaler_decides(tmp_path: Path, on_nonfinite: str) -> None:
    """Finite gradients may have a norm that overflows: the scaler takes the step, so the average follows."""
    args = tiny.arguments(tmp_path, max_steps=3, on_nonfinite=on_nonfinite, max_grad_norm=0.0)
    made = tiny.trainer(tiny.bert(), args, tiny.sentences(30))
    made.accelerator.scaler = scaler()
    made.accelerator.clip_grad_norm_ = lambda *_, **__: torch.tensor(math.inf)
    made.train()
    assert made.average.num_updates == 3
    assert not same_bits(made.recorder.weights[0], made.recorder.weights[1])
    assert not same_bits(made.recorder.averages[0], made.recorder.averages[1])


@pytest.mark.parametrize("on_nonfinite", ["raise", "skip"])
def test_without_a_scaler_an_infinite_norm_stops_or_drops_the_step(tmp_path: Path, on_nonfinite: str) -> None:
    args = tiny.arguments(tmp_path, max_steps=3, on_nonfinite=on_nonfinite)
    made = tiny.trainer(tiny.bert(), args, tiny.sentences(30))
    made.accelerator.clip_grad_norm_ = lambda *_, **__: torch.tensor(math.inf)
    if on_nonfinite == "raise":
        with pytest.raises(FloatingPointError, match="gradient norm is inf"):
            made.train()
    else:
        made.train()
        assert same_bits(made.recorder.weights[0], made.recorder.weights[2])
    assert made.average.num_updates == 0


class Prepared:
    """Stands for a prepared optimizer."""

    def __init__(self, scale: float | None, flag: bool) -> None:
        self.step_was_skipped = flag
        self.scaler = None if scale is None else self
        self.scale = scale

    def is_enabled(self) -> bool:
        return True

    def get_scale(self) -> float | None:
        return self.scale


@pytest.mark.parametrize(
    ("before", "after", "flag", "skipped"),
    [(8.0, 4.0, False, True), (8.0, 8.0, False, False), (8.0, 16.0, False, False), (None, None, True, True),
     (None, None, False, False), (8.0, 8.0, True, True)],
)  # fmt: skip
def test_a_lower_scale_or_the_flag_means_skipped(
    before: float | None, after: float | None, flag: bool, skipped: bool
) -> None:
    watch = SkipWatch()
    watch.before_step(Prepared(before, False))
    assert watch.was_skipped(Prepared(after, flag)) is skipped
