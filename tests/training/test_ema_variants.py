"""Momentum schedules, rarer updates and the path correction, through a trainer."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers
from torch import Tensor, nn
from transformers import TrainerCallback
from transformers.modeling_outputs import SequenceClassifierOutput

from hf_ema_scaling.training.run_state import read_run_state


def run(folder: Path, train: bool = True, **changes: Any) -> Any:
    more = {key: changes.pop(key) for key in ("example_loss", "callbacks") if key in changes}
    model = changes.pop("model", None) or tiny.bert()
    values = {"max_steps": 12, "learning_rate": 3e-2, "ema_momentum": 0.9, "max_example_loss": None}
    made = tiny.trainer(model, tiny.arguments(folder, **(values | changes)), tiny.sentences(30), **more)
    if train:
        made.train()
    return made


def recursion(made: Any, due: Callable[[int], bool], skipped: int | None = None) -> list[dict[str, Tensor]]:
    """The averages after every step, in float64, from the recorded weights and a log-momentum summed between updates.

    Args:
        due: whether optimizer step t, from 0, ends with an update.
        skipped: an optimizer step that was not taken.
    """
    names = made.recorder.initial
    average = {name: made.recorder.initial[name].double() for name in names}
    averages, pending = [], 0.0
    for t, weights in enumerate(made.recorder.weights):
        step = made.sampler.step(t)
        if t != skipped:
            pending += made.plan.log_momentum(step.start, step.end)
            if due(t):
                share, pending = math.exp(pending), 0.0
                average = {name: share * average[name] + (1 - share) * weights[name].double() for name in names}
        averages.append(average)
    return averages


def assert_averages(made: Any, expected: list[dict[str, Tensor]]) -> None:
    assert len(made.recorder.averages) == len(expected) > 0
    for found, wanted in zip(made.recorder.averages, expected, strict=True):
        assert tiny.difference(wanted, {name: found[name] for name in wanted}) < 1e-6
    last = made.recorder.initial
    assert tiny.difference(last, {name: made.recorder.averages[-1][name] for name in last}) > 1e-2


# ---- Momentum schedule


@pytest.mark.parametrize("kappa", [1.0, 2.5])
def test_a_cosine_momentum_step_by_step(tmp_path: Path, kappa: float) -> None:
    made = run(
        tmp_path,
        kappa=kappa,
        small_batch_until=3,
        ema_momentum=0.7,
        ema_momentum_schedule="cosine",
        logging_strategy="steps",
        logging_steps=1,
    )
    logs = [entry for entry in made.state.log_history if "ema/momentum" in entry]
    assert len(logs) == len(made.plan) == made.state.global_step

    def log_rho(position: float) -> float:
        return math.log(1 - 0.3 * (math.cos(math.pi * math.floor(position) / 12) + 1) / 2)

    for t, entry in enumerate(logs):
        start, end = made.plan.borders[t], made.plan.borders[t + 1]
        # Halves of reference steps are the smallest pieces here.
        pieces = [start + i / 2 for i in range(round(2 * (end - start)))]
        assert entry["ema/momentum"] == pytest.approx(math.exp(sum(map(log_rho, pieces)) / 2), rel=1e-12)
        assert entry["ema/momentum"] == made.plan.step(t).momentum
    assert_averages(made, recursion(made, lambda t: True))


# ---- Updates every n steps


@pytest.mark.parametrize("kappa", [1.0, 2.0])
def test_an_update_every_three_steps_has_the_momentum_of_three(tmp_path: Path, kappa: float) -> None:
    made = run(tmp_path, max_steps=int(8 * kappa), kappa=kappa, ema_update_every=3)
    due = {2, 5, 7}
    assert made.state.global_step == 8 and made.average.num_updates == 3
    assert_averages(made, recursion(made, lambda t: t in due))
    averages = made.recorder.averages
    for t in range(1, 8):
        assert tiny.same_bits(averages[t], averages[t - 1]) == (t not in due)
    # rho**n by itself: the first update, from the weights alone.
    share = 0.9 ** (3 * kappa)
    start, third = made.recorder.initial, made.recorder.weights[2]
    expected = {name: share * start[name].double() + (1 - share) * third[name].double() for name in start}
    assert tiny.difference(expected, {name: averages[2][name] for name in start}) < 1e-6


def test_the_sum_spans_a_stage_end(tmp_path: Path) -> None:
    made = run(tmp_path, kappa=4.0, small_batch_until=4, ema_update_every=3)
    assert made.plan.borders.tolist() == [0, 1, 2, 3, 4, 8, 12]
    assert_averages(made, recursion(made, lambda t: t in (2, 5)))


def test_before_ema_start_the_average_is_the_student_at_every_step(tmp_path: Path) -> None:
    made = run(tmp_path, max_steps=9, ema_start=4, ema_update_every=3)
    recorder = made.recorder
    for t in range(9):
        same = tiny.same_bits({name: recorder.averages[t][name] for name in recorder.initial}, recorder.weights[t])
        assert same == (t < 4)
    # Steps 4 and 5 are the first update's, though it is the third of three steps.
    share = 0.9**2
    expected = {
        name: share * recorder.weights[3][name].double() + (1 - share) * recorder.weights[5][name].double()
        for name in recorder.initial
    }
    assert tiny.difference(expected, {name: recorder.averages[5][name] for name in expected}) < 1e-6


def poisoned(step: int) -> Any:
    """Cross-entropy, not a number in one optimizer step (one micro-batch each)."""
    calls: list[int] = []

    def loss(model: nn.Module, inputs: Any, logits: Tensor, labels: Tensor) -> Tensor:
        calls.append(len(calls))
        losses = nn.functional.cross_entropy(logits, labels, reduction="none")
        return losses * math.nan if calls[-1] == step else losses

    return loss


@pytest.mark.parametrize(("skipped", "due"), [(1, {2, 5, 7}), (2, {5, 7}), (7, {2, 5})])
def test_a_skipped_step_is_not_caught_up(tmp_path: Path, skipped: int, due: set[int]) -> None:
    """Its own share is dropped; where it is the one that is due, the shares before it go to the next update."""
    made = run(tmp_path, max_steps=8, ema_update_every=3, on_nonfinite="skip", example_loss=poisoned(skipped))
    assert made.state.global_step == 8 and made.average.num_updates == len(due)
    assert_averages(made, recursion(made, lambda t: t in due, skipped))


class StopAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.step:
            control.should_training_stop = True
            self.step = -1


def test_a_second_run_does_not_take_over_what_the_first_left_pending(tmp_path: Path) -> None:
    made = run(tmp_path, max_steps=6, ema_update_every=3, callbacks=[StopAt(5)])
    assert made.state.global_step == 5 and made.average.num_updates == 1
    before = tiny.average(made)
    made.train()
    third, after = made.recorder.weights[7], made.recorder.averages[7]
    expected = {name: 0.9**3 * before[name].double() + (1 - 0.9**3) * third[name].double() for name in third}
    assert tiny.difference(expected, {name: after[name] for name in third}) < 1e-6


# ---- Resume


VARIANTS: dict[str, dict[str, Any]] = {
    "every": {"ema_update_every": 3},
    "every, cosine": {"ema_update_every": 4, "ema_momentum_schedule": "cosine", "ema_momentum": 0.8371},
    "path": {"ema_correction": "path"},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_resuming_changes_no_bit(tmp_path: Path, variant: str) -> None:
    values = {"kappa": 1.5, "small_batch_until": 3, "save_strategy": "steps", "save_steps": 1} | VARIANTS[variant]
    whole = run(tmp_path / "whole", **values)
    assert whole.state.global_step == 9
    for stop in (2, 4, 5):
        checkpoint = tmp_path / "whole" / f"checkpoint-{stop}"
        pending = read_run_state(checkpoint).counters["pending_log_momentum"]
        assert (pending < 0) == (whole.plan.ema_update_every > 1 and stop % whole.plan.ema_update_every > 0)
        made = run(tmp_path / f"{stop}", train=False, **values, model=tiny.bert(seed=7))
        made.train(resume_from_checkpoint=str(checkpoint))
        assert tiny.same_bits(tiny.average(made), tiny.average(whole))
        assert tiny.same_bits(made.recorder.averages, whole.recorder.averages[stop:])
        assert made.average.num_updates == whole.average.num_updates


# ---- Path correction


class Slope(nn.Module):
    """A loss that is linear in the weights, so that every gradient is the same."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([1.0, -2.0, 0.5]))

    def forward(self, input_ids: Tensor) -> SequenceClassifierOutput:
        return SequenceClassifierOutput(logits=self.weight.expand(len(input_ids), 3))


GRADIENT = torch.tensor([1.0, -0.3, 2.0])


def slope_run(folder: Path, schedule: str | None = None, **changes: Any) -> Any:
    model = Slope()

    def loss(model: nn.Module, inputs: Any, logits: Tensor, labels: Tensor) -> Tensor:
        return logits @ GRADIENT

    args = tiny.arguments(
        folder, max_steps=20, max_example_loss=None, ema_momentum=0.95, batch_schedule=schedule, **changes
    )
    made = tiny.trainer(
        model,  # type: ignore[arg-type]
        args,
        tiny.sentences(30),
        example_loss=loss,
        data_collator=transformers.default_data_collator,
        optimizers=(torch.optim.SGD(model.parameters(), lr=0.02), None),
    )
    made.train()
    return made


SCHEDULES = {
    "growing": '[{"batch_size": 4, "until": 3}, {"batch_size": 10, "until": 10}, {"batch_size": 23}]',
    "shrinking": '[{"batch_size": 30, "until": 7.5}, {"batch_size": 3}]',
    "constant": '[{"batch_size": 80}]',
}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_path_correction_follows_the_reference_run_where_gradients_are_constant(
    tmp_path: Path, schedule: str
) -> None:
    theta, zeta = torch.tensor([1.0, -2.0, 0.5]).double(), torch.tensor([1.0, -2.0, 0.5]).double()
    positions = {}
    for k in range(1, 21):
        theta = theta - 0.02 * GRADIENT.double()
        zeta = 0.95 * zeta + 0.05 * theta
        positions[k] = zeta
    corrected = slope_run(tmp_path / "path", SCHEDULES[schedule], ema_correction="path")
    seen = 0
    for t, average in enumerate(corrected.recorder.averages):
        end = corrected.sampler.step(t).end
        if end in positions:
            torch.testing.assert_close(average["weight"].double(), positions[end], rtol=0, atol=1e-6)
            seen += 1
    assert seen >= 1 and corrected.sampler.step(len(corrected.recorder.averages) - 1).end == 20
    assert len({corrected.sampler.step(t).kappa for t in range(corrected.sampler.num_steps)}) >= len(
        corrected.plan.stages
    )
    ordinary = slope_run(tmp_path / "none", SCHEDULES[schedule])
    assert float((tiny.average(ordinary)["weight"] - positions[20]).abs().max()) > 1e-3


def test_at_kappa_one_it_is_the_ordinary_update_bit_for_bit(tmp_path: Path) -> None:
    path, none = run(tmp_path / "a", ema_correction="path"), run(tmp_path / "b")
    assert tiny.same_bits(path.recorder.averages, none.recorder.averages)
    assert path.average.num_updates == none.average.num_updates == 12


def test_the_corrected_update_of_a_real_model(tmp_path: Path) -> None:
    made = run(tmp_path, kappa=4.0, small_batch_until=2, ema_correction="path")
    recorder = made.recorder
    average, weights = ({name: v.double() for name, v in recorder.initial.items()} for _ in range(2))
    for t in range(made.state.global_step):
        kappa = made.sampler.step(t).kappa
        r = 0.9**kappa
        w = 1 - 0.9 * (1 - r) / (kappa * 0.1)
        after = {name: value.double() for name, value in recorder.weights[t].items()}
        average = {
            name: r * average[name] + (1 - r - w) * weights[name] + w * after[name] for name in recorder.initial
        }
        weights = after
        assert tiny.difference(average, {name: recorder.averages[t][name] for name in average}) < 1e-6
    assert {made.sampler.step(t).kappa for t in range(made.state.global_step)} == {1, 4, 2}


@pytest.mark.parametrize("ema_start", [0, 4])
def test_a_skipped_step_leaves_the_average_untouched(tmp_path: Path, ema_start: int) -> None:
    made = run(
        tmp_path,
        kappa=2.0,
        small_batch_until=0,
        ema_start=ema_start,
        ema_correction="path",
        on_nonfinite="skip",
        example_loss=poisoned(3),
    )
    recorder = made.recorder
    assert made.average.num_updates == 5 and made.state.global_step == 6
    assert tiny.same_bits(recorder.averages[3], recorder.averages[2])
    assert not tiny.same_bits(recorder.averages[4], recorder.averages[3])
    same = tiny.same_bits({name: recorder.averages[1][name] for name in recorder.initial}, recorder.weights[1])
    assert same == (ema_start > 0)


def test_running_statistics_move_once(tmp_path: Path) -> None:
    args = tiny.arguments(tmp_path, kappa=2.0, small_batch_until=0, ema_correction="path", max_steps=6)
    made = tiny.trainer(tiny.parakeet(), args, tiny.speech(18, features=8))
    name = next(name for name, _ in made.model.named_buffers() if name.endswith("running_mean"))
    seen: list[tuple[Tensor, Tensor]] = []

    class Look(TrainerCallback):
        def on_optimizer_step(self, *_: Any, **__: Any) -> None:
            buffer = dict(made.model.named_buffers())[name]
            seen.append((made.average.tensors()[name].clone(), buffer.detach().clone()))

    made.add_callback(Look())
    expected = dict(made.model.named_buffers())[name].detach().clone()
    made.train()
    assert len(seen) == 3
    for average, buffer in seen:
        expected = 0.81 * expected + 0.19 * buffer
        torch.testing.assert_close(average, expected, rtol=1e-5, atol=1e-7)


# ---- Refused


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ema_correction": "path", "fp16": True}, "use bf16, or ema_correction='none'"),
        ({"ema_correction": "path", "ema_update_every": 2}, "does not go with ema_update_every=2"),
        ({"ema_correction": "path", "scale_ema": False}, "does not go with scale_ema=False"),
        ({"ema_correction": "full"}, "ema_correction must be one of none, path, got 'full'"),
        ({"ema_update_every": 0}, "ema_update_every must be a whole number"),
        ({"ema_momentum_schedule": "linear"}, "ema_momentum_schedule must be one of constant, cosine, got 'linear'"),
    ],
)
def test_what_does_not_go_together_is_refused_at_construction(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        run(tmp_path, train=False, **changes)


def test_a_loss_scaler_from_the_launcher_is_refused_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    create = transformers.Trainer.create_accelerator_and_postprocess

    def with_scaler(self: Any) -> None:
        create(self)
        self.accelerator.scaler = torch.amp.GradScaler("cpu")

    monkeypatch.setattr(transformers.Trainer, "create_accelerator_and_postprocess", with_scaler)
    with pytest.raises(ValueError, match="use bf16, or ema_correction='none'"):
        run(tmp_path, train=False, ema_correction="path")
