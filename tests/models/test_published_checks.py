"""Checks that other libraries state for averages, with their literal values, and that a dead average fails ours."""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import BertForSequenceClassification, Trainer, TrainerCallback, TrainingArguments

from hf_ema_scaling import EMACallback
from hf_ema_scaling.ema import WeightAverage
from hf_ema_scaling.training import mixin

TESTS = Path(__file__).parents[1]


class Uphill(nn.Module):
    """One weight that starts at 0 and whose gradient is -1 on any batch: at learning rate 1 it counts the steps."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"loss": -(self.w * x).mean()}


class Ones(Dataset[dict[str, Tensor]]):
    def __len__(self) -> int:
        return 48

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {"x": torch.ones(1)}


class Values(TrainerCallback):
    def __init__(self, average: EMACallback) -> None:
        self.average, self.values = average, list[float]()

    def on_optimizer_step(self, *_: Any, **__: Any) -> None:
        self.values.append(self.average.average.tensors()["w"].item())


@pytest.mark.parametrize("accumulation", [1, 2, 4])
def test_keras_with_any_accumulation(tmp_path: Path, accumulation: int) -> None:
    """1, 1.1, 1.29 where the first update copies; an update per micro-batch gives 1.5095 at 4."""
    average = EMACallback(momentum=0.9, reference_batch_size=4 * accumulation, ema_start=1)
    values, model = Values(average), Uphill()
    args = TrainingArguments(
        str(tmp_path), max_steps=3, per_device_train_batch_size=4, gradient_accumulation_steps=accumulation,
        learning_rate=1.0, lr_scheduler_type="constant", max_grad_norm=0, use_cpu=True, disable_tqdm=True,
        report_to="none", save_strategy="no",
    )  # fmt: skip
    optimizers = (torch.optim.SGD(model.parameters(), lr=1.0), None)
    Trainer(model, args, train_dataset=Ones(), callbacks=[average, values], optimizers=optimizers).train()
    assert values.values == pytest.approx([1.0, 1.1, 1.29], rel=1e-6)
    assert average.average.num_updates == average.global_step == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("updates", [1, 5])
def test_a_student_that_stands_still_is_its_average_bit_for_bit(dtype: torch.dtype, updates: int) -> None:
    model = nn.Linear(7, 5).to(dtype)
    average = WeightAverage(model)
    for _ in range(updates):
        average.update(model, 0.9999)
    assert average.equals(model) and average.distance(model) == 0.0
    assert all(torch.equal(t, model.get_parameter(name).float()) for name, t in average.tensors().items())


@pytest.mark.slow
def test_drift_from_float64_over_a_hundred_thousand_updates() -> None:
    """A walk of small steps at momentum 0.999: the average stays within 1e-6 of its float64 twin."""
    model = nn.Linear(4, 4, bias=False)
    average = WeightAverage(model)
    exact, weight = model.weight.detach().double().clone(), 1 - 0.999
    noise = torch.randn(1000, 4, 4) * 1e-3
    with torch.no_grad():
        for number in range(100_000):
            model.weight.add_(noise[number % 1000])
            average.blend(model, weight)
            exact.lerp_(model.weight.double(), weight)
    assert float((exact - average.tensors()["weight"]).abs().max() / exact.abs().max()) < 1e-6
    assert average.num_updates == 100_000 and not average.equals(model)


@pytest.mark.parametrize(("every", "expected"), [(2, [2, 4, 6, 8]), (3, [3, 6, 8])])
def test_steps_at_which_the_average_moves(tmp_path: Path, every: int, expected: list[int]) -> None:
    """Every n-th optimizer step counted from 1, and the last of the run."""
    args = tiny.arguments(tmp_path, max_steps=8, ema_update_every=every)
    made = tiny.trainer(tiny.bert(), args, tiny.sentences(32))
    made.train()
    states = [{n: t for n, t in made.recorder.initial.items()}, *made.recorder.averages]
    moved = [step for step in range(1, 9) if not tiny.same_bits(states[step], states[step - 1])]
    assert moved == expected


def test_what_is_pushed_of_a_checkpoint_has_the_average(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, Any]] = []

    def push(trainer: Any, checkpoint_folder: str) -> None:
        loaded = BertForSequenceClassification.from_pretrained(Path(checkpoint_folder) / "ema")
        seen.append((trainer.state.global_step, tiny.parameters(loaded)))

    monkeypatch.setattr(mixin, "push_checkpoint", push)
    args = tiny.arguments(tmp_path, max_steps=4, save_strategy="steps", save_steps=2)
    made = tiny.trainer(tiny.bert(), args, tiny.sentences(16))
    made.args.push_to_hub = True
    made.train()
    assert [step for step, _ in seen] == [2, 4]
    for step, weights in seen:
        assert tiny.same_bits(weights, made.recorder.averages[step - 1])


# ---- The mutant: an average whose update does nothing


def no_move(average: WeightAverage, model: nn.Module, weight: float, **_: Any) -> None:
    """`WeightAverage.blend` that forgets to write."""
    average.num_updates += 1


def module_of(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"mutated_{Path(name).stem}", TESTS / name)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


CORE: list[tuple[str, str, tuple[Any, ...]]] = [
    ("ema/test_average.py", "test_keras_sequence", ()),
    ("ema/test_average.py", "test_ignite_sequence", ()),
    ("ema/test_average.py", "test_tied_weight_moves_once", ()),
    ("ema/test_average.py", "test_float64_stays_float64", ()),
    ("ema/test_average.py", "test_kappa_partitions_agree", (0.9, [4.0])),
    ("ema/test_average.py", "test_random_steps_follow_the_closed_form", (torch.float32,)),
    ("ema/test_average.py", "test_random_steps_follow_the_closed_form", (torch.bfloat16,)),
    ("ema/test_average.py", "test_buffer_policy", ("average", 0.1)),
    ("ema/test_average.py", "test_frozen_parameters_are_copied", ()),
    ("ema/test_average.py", "test_names_decide_and_not_order", ()),
    ("ema/test_average.py", "test_wrappers_are_seen_through", (["module"],)),
    ("ema/test_average.py", "test_copy_to_is_permanent_and_casts", ()),
    ("ema/test_teacher.py", "test_average_must_move_and_differ_from_the_student", ()),
    ("models/test_state.py", "test_a_module_registered_twice_moves_once", ()),
    ("models/test_parametrizations.py", "test_weight_norm_averages_length_and_direction", None),
]  # fmt: skip


@contextmanager
def mutated() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(WeightAverage, "blend", no_move)
        yield


@pytest.mark.parametrize(("file", "name", "arguments"), CORE)
def test_an_average_that_does_nothing_fails(file: str, name: str, arguments: tuple[Any, ...] | None) -> None:
    test: Callable[..., None] = getattr(module_of(file), name)
    if arguments is None:
        arguments = ("hook", ("weight_g", "weight_v"))
    assert len(inspect.signature(test).parameters) == len(arguments)
    torch.manual_seed(0)
    test(*arguments)
    with mutated(), pytest.raises(BaseException):  # noqa: B017 - whatever a test fails with
        torch.manual_seed(0)
        test(*arguments)
