"""Tensors that are no ordinary weights: integers, complex numbers, extra state, and modules registered in odd ways."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor, nn

from hf_ema_scaling.ema import EMATeacher, WeightAverage, load_average, save_average


class Quantized(nn.Module):
    """An int8 weight with a scale, as quantized layers hold them, and a trained bias."""

    def __init__(self) -> None:
        super().__init__()
        weight = torch.randint(-127, 128, (4, 3), dtype=torch.int8)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = nn.Parameter(torch.zeros(4))
        self.register_buffer("zero_point", torch.tensor([7], dtype=torch.int32))
        self.register_buffer("packed", torch.arange(6, dtype=torch.uint8))
        self.register_buffer("phases", torch.tensor([1 + 2j, 3 - 4j]))
        self.register_buffer("seen", torch.tensor(0))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, (self.weight - self.zero_point) / 127.0, self.bias)


def move_(model: Quantized) -> None:
    with torch.no_grad():
        model.bias.add_(1.0)
        model.zero_point.add_(1)
        model.packed.add_(3)
        model.phases.mul_(1j)
        model.seen.add_(1)


@pytest.mark.parametrize("buffers", ["average", "copy"])
def test_integers_and_complex_numbers_are_the_students_bit_for_bit(tmp_path: Path, buffers: str) -> None:
    model = Quantized()
    average = WeightAverage(model, buffers=buffers)  # type: ignore[arg-type]
    teacher = EMATeacher(model, average, factory=Quantized)
    for _ in range(3):
        move_(model)
        average.update(model, 0.9)
    held = average.tensors()
    for name in ("weight", "zero_point", "packed", "phases", "seen"):
        own = dict([*model.named_parameters(), *model.named_buffers()])[name].detach()
        assert held[name].dtype == own.dtype and torch.equal(held[name], own), name
    assert held["weight"].data_ptr() == model.weight.data_ptr()  # frozen: not copied either
    expected = 0.1 * (1 * 0.81 + 2 * 0.9 + 3)
    torch.testing.assert_close(held["bias"], torch.full((4,), expected))
    x = torch.randn(2, 3)
    torch.testing.assert_close(teacher(x), model(x).detach() - 3.0 + expected)
    save_average(tmp_path, model, average, state={})
    other = WeightAverage(model, buffers=buffers)  # type: ignore[arg-type]
    load_average(tmp_path, model, other)
    assert tiny.same_bits(dict(other.tensors()), dict(held))


class Coded(nn.Module):
    """A layer quantized to float8: codes with a scale, and a bias that is trained."""

    def __init__(self, *, frozen: bool = True) -> None:
        super().__init__()
        codes = torch.tensor([[1.5, -2.0, 448.0], [0.25, 3.0, -0.5]]).to(torch.float8_e4m3fn)
        self.weight = nn.Parameter(codes, requires_grad=not frozen)
        self.register_buffer("more", codes.clone())
        self.register_buffer("scale", torch.tensor(0.5))
        self.bias = nn.Parameter(torch.zeros(2))

    def forward(self, x: Tensor) -> Tensor:
        assert self.weight.dtype == self.more.dtype == torch.float8_e4m3fn
        return x @ (self.weight.to(x.dtype) * self.scale).T + self.bias.to(x.dtype)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("buffers", ["average", "copy"])
def test_float8_codes_are_the_students_bit_for_bit(tmp_path: Path, buffers: Any, dtype: Any) -> None:
    model = Coded()
    average = WeightAverage(model, buffers=buffers)
    teacher = EMATeacher(model, average, factory=Coded, dtype=dtype)
    with torch.no_grad():
        model.bias.add_(1.0)
        model.more.copy_(torch.full((2, 3), 7.0))
    average.update(model, 0.75)
    held = average.tensors()
    for name in ("weight", "more"):
        own = model.state_dict()[name]
        assert held[name].dtype == own.dtype and torch.equal(held[name].view(torch.uint8), own.view(torch.uint8)), name
    assert torch.equal(held["bias"], torch.full((2,), 0.25))
    x = torch.tensor([[1.0, 2.0, 0.0]])
    torch.testing.assert_close(teacher(x).float(), model(x).detach() - 0.75)
    save_average(tmp_path, model, average, state={})
    other = WeightAverage(Coded(), buffers=buffers)
    load_average(tmp_path, model, other)
    assert torch.equal(other.tensors()["more"].float(), torch.full((2, 3), 7.0))
    with pytest.raises(TypeError, match=r"'weight': a trainable parameter of dtype torch\.float8_e4m3fn"):
        WeightAverage(Coded(frozen=False))


def test_a_trained_tensor_that_has_no_average_is_refused() -> None:
    model = nn.Linear(1, 1)
    model.register_parameter("phase", nn.Parameter(torch.tensor([1 + 2j])))
    with pytest.raises(TypeError, match=r"'phase': a trainable parameter of dtype torch\.complex64"):
        WeightAverage(model)


class Extra(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Linear(2, 2)
        self.scale = 3.0

    def get_extra_state(self) -> Tensor:
        return torch.tensor([self.scale])

    def set_extra_state(self, state: Tensor) -> None:
        self.scale = float(state)

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * self.line(x)


def test_extra_state_is_no_tensor_of_the_average(tmp_path: Path) -> None:
    model = nn.Sequential(Extra())
    assert isinstance(model.state_dict()["0._extra_state"], Tensor)
    average = WeightAverage(model)
    assert set(average.state_dict(model)) == {"0.line.weight", "0.line.bias"}
    average.update(model, 0.9)
    save_average(tmp_path, model, average, state={})
    load_average(tmp_path, model, average)
    with average.swapped(model):
        assert model[0].scale == 3.0  # type: ignore[union-attr]


class Twice(nn.Module):
    """One module under two names, besides one weight tied between two modules."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.second = self.first
        self.third = nn.Linear(3, 3)
        self.third.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.third(self.second(self.first(x)))


def test_a_module_registered_twice_moves_once() -> None:
    model = Twice()
    average = WeightAverage(model)
    assert list(average.tensors()) == ["first.weight", "first.bias", "third.bias"]
    before = model.first.weight.detach().clone()
    with torch.no_grad():
        model.first.weight.add_(1.0)
    average.update(model, 0.9)
    torch.testing.assert_close(average.tensors()["first.weight"], before + 0.1)
    assert set(average.state_dict(model)) == set(model.state_dict())
    teacher = EMATeacher(model, average, factory=Twice)
    x = torch.randn(2, 3)
    labels = teacher(x)
    with average.swapped(model):
        torch.testing.assert_close(labels, model(x).detach())
    assert teacher.module.second is teacher.module.first


def test_buffers_registered_later() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    average = WeightAverage(model)
    model[0].register_buffer("table", torch.arange(3.0), persistent=False)  # as rotary tables are made on first use
    average.update(model, 0.9)
    assert "0.table" not in average.tensors() and torch.equal(average._shadow["0.table"], torch.arange(3.0))
    model[0].register_buffer("table", torch.arange(9.0), persistent=False)
    average.update(model, 0.9)
    assert torch.equal(average._shadow["0.table"], torch.arange(9.0))
    model[0].register_buffer("statistic", torch.zeros(2))  # saved with the model: the average cannot know its past
    with pytest.raises(ValueError, match=r"unexpected: 0\.statistic"):
        average.update(model, 0.9)


def test_lazy_parameters_say_that_they_have_no_shape_yet() -> None:
    with pytest.raises(ValueError, match="uninitialized parameter"):
        WeightAverage(nn.LazyLinear(3))


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
@pytest.mark.parametrize("dtype", [torch.quint8, torch.qint8])
def test_tensors_quantized_by_torch_are_refused_by_name(dtype: torch.dtype) -> None:
    def model(*, persistent: bool) -> nn.Module:
        made = nn.Linear(2, 2)
        made.register_buffer("table", torch.quantize_per_tensor(torch.ones(3), 0.1, 2, dtype), persistent=persistent)
        return made

    with pytest.raises(TypeError, match=rf"'table' is quantized by torch \({dtype}\).*int_repr.*persistent=False"):
        WeightAverage(model(persistent=True))
    kept = model(persistent=False)
    average = WeightAverage(kept)
    kept.table = torch.quantize_per_tensor(torch.full((3,), 2.0), 0.1, 2, dtype)
    average.update(kept, 0.5)
    assert average._shadow["table"].dequantize().tolist() == pytest.approx([2.0] * 3)


def test_what_safetensors_cannot_store_is_refused_by_name(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    model.register_buffer("phases", torch.ones(2, dtype=torch.complex128))
    average = WeightAverage(model)
    average.update(model, 0.5)
    with pytest.raises(TypeError, match=r"'phases' is torch\.complex128.*complex64.*view_as_real"):
        save_average(tmp_path / "ema", model, average, state={})
    assert not (tmp_path / "ema").exists()
    model.register_buffer("graph", torch.eye(2).to_sparse())
    with pytest.raises(TypeError, match=r"'graph' is sparse \(torch\.sparse_coo\)"):
        WeightAverage(model)
