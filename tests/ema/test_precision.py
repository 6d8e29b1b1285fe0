"""What an update costs, what it notices, and averages in float64."""

from __future__ import annotations

import math

import pytest
import torch
from operations import Operations
from torch import Tensor, nn

from hf_ema_scaling.ema import WeightAverage


class Scalar(nn.Module):
    def __init__(self, value: float) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([value]))


class Net(nn.Module):
    """Linear layer, BatchNorm, an integer buffer and a non-persistent buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 4)
        self.norm = nn.BatchNorm1d(4)
        self.register_buffer("ids", torch.arange(7))
        self.register_buffer("table", torch.randn(5), persistent=False)


def set_(tensor: Tensor, value: float | Tensor) -> None:
    with torch.no_grad():
        tensor.copy_(torch.as_tensor(value))


def shake_(model: nn.Module) -> None:
    """An arbitrary training step: every floating tensor gets noise, every integer counter goes up."""
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point():
                tensor.add_(torch.randn_like(tensor))
            else:
                tensor.add_(1)


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {n: t.detach().clone() for n, t in (*model.named_parameters(), *model.named_buffers())}


def assert_same_bits(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]), name


def value(average: WeightAverage) -> float:
    return average.tensors()["w"].item()


def test_a_replaced_submodule_is_noticed() -> None:
    model = Net()
    average = WeightAverage(model)
    model.linear = nn.Linear(3, 4)  # as many children, parameters and buffers as before
    set_(model.linear.bias, torch.ones(4))
    set_(average.tensors()["linear.bias"], torch.zeros(4))
    average.update(model, 0.9)
    assert average.tensors()["linear.bias"].tolist() == pytest.approx([0.1] * 4)


def test_requires_grad_is_noticed_both_ways() -> None:
    model = Scalar(0.0)
    average = WeightAverage(model)
    expected = 0.0
    for step, trained in enumerate([True, False, True], start=1):
        model.w.requires_grad_(trained)
        set_(model.w, float(step))
        average.update(model, 0.9)
        expected = 0.9 * expected + 0.1 * step if trained else float(step)
        assert value(average) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    "change", ["half", "double", "device", "requires_grad", "parameter", "buffer", "child", "none"]
)
def test_a_binding_holds_only_while_nothing_changed(change: str) -> None:
    model = nn.Sequential(Net(), Net())
    average = WeightAverage(model)
    binding = average._binding
    assert binding is not None and binding.holds_for(model) and not binding.holds_for(model[0])
    if change in ("half", "double"):
        getattr(model[1].linear, change)()
    elif change == "device":
        other = nn.Parameter(torch.empty(4, 3, device="meta"))
        torch.utils.swap_tensors(model[1].linear.weight, other)  # the same object elsewhere, as `.to()` makes it
    elif change == "requires_grad":
        model[1].linear.bias.requires_grad_(False)
    elif change == "parameter":
        model[0].register_parameter("late", nn.Parameter(torch.ones(1)))
    elif change == "buffer":
        model[0].norm.running_mean = torch.ones(4)
    elif change == "child":
        model[1] = Net()
    assert binding.holds_for(model) == (change == "none")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_update_allocates_nothing_and_waits_for_nothing(dtype: torch.dtype) -> None:
    model = Net().to(dtype)
    average = WeightAverage(model)
    average.update(model, 0.9)
    with Operations() as seen:
        average.update(model, 0.9)
        average.lead(model, -0.5)
    assert seen.allocated == [] and seen.synchronising == [] and seen.names


def test_float64_goes_on_where_float32_stands_still() -> None:
    # Half a unit in the last place of 1.0 is 6e-8; an update moves it by 1e-6 * 0.01 = 1e-8.
    model, weight, steps = Scalar(1.0), 1e-6, 20_000
    stalled, exact = WeightAverage(model), WeightAverage(model, dtype=torch.float64)
    set_(model.w, 1.01)
    target = model.w.item()
    for _ in range(steps):
        stalled.blend(model, weight)
        exact.blend(model, weight)
    expected = target + (1.0 - target) * math.exp(steps * math.log1p(-weight))
    assert expected - 1.0 == pytest.approx(1.98e-4, rel=1e-2)
    assert value(stalled) == 1.0
    assert exact.tensors()["w"].dtype == torch.float64 and value(exact) == pytest.approx(expected, rel=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_float64_average_follows_the_closed_form(dtype: torch.dtype) -> None:
    model = Net().to(dtype)
    average = WeightAverage(model, dtype=torch.float64)
    expected = {name: tensor.double() for name, tensor in snapshot(model).items()}
    for _ in range(20):
        shake_(model)
        average.update(model, 0.97)
        expected = {name: 0.97 * expected[name] + 0.03 * t.double() for name, t in snapshot(model).items()}
    for name, tensor in average.tensors().items():
        if tensor.is_floating_point():
            assert tensor.dtype == torch.float64
            torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-13)
    assert average.tensors()["norm.num_batches_tracked"].item() == 20
    assert average._shadow["table"].dtype == torch.float32  # not saved and not averaged: a copy, as ever
    before = snapshot(model)
    with average.swapped(model):
        torch.testing.assert_close(model.linear.weight, average.tensors()["linear.weight"].to(dtype), rtol=0, atol=0)
    assert_same_bits(snapshot(model), before)
    assert 0 < average.distance(model) < math.inf and len(average.fingerprint()) == 4


def test_an_average_in_half_precision_is_refused() -> None:
    with pytest.raises(ValueError, match=r"float32 or torch.float64, got torch.bfloat16"):
        WeightAverage(Scalar(0.0), dtype=torch.bfloat16)
