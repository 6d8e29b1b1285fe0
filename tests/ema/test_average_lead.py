"""Updates of two moves, `lead` before the optimizer step and `blend` after it."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from hf_ema_scaling.ema import WeightAverage
from hf_ema_scaling.scaling import path_correction


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 4)
        self.frozen = nn.Linear(3, 4).requires_grad_(False)
        self.norm = nn.BatchNorm1d(4)


def shake_(tensors: list[Tensor]) -> None:
    with torch.no_grad():
        for tensor in tensors:
            tensor.add_(torch.randn_like(tensor)) if tensor.is_floating_point() else tensor.add_(1)


def shadow(average: WeightAverage) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in average.tensors().items()}


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("kappa", [0.25, 1.0, 2.5, 64.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_both_moves_together_are_the_path_corrected_update(kappa: float, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = Net().to(dtype)
    average = WeightAverage(model)
    shake_(list(model.parameters()))
    # Forward passes have entered the running statistics before the optimizer steps.
    shake_(list(model.buffers()))
    zeta, theta = shadow(average), state(model)
    log_momentum = kappa * math.log(0.97)
    r, (before, after) = math.exp(log_momentum), path_correction(log_momentum, kappa)
    average.lead(model, before)
    assert average.num_updates == 0
    led = shadow(average)
    assert torch.equal(led["linear.weight"], zeta["linear.weight"]) == (kappa == 1)
    for name in set(zeta) - {"linear.weight", "linear.bias", "norm.weight", "norm.bias"}:
        assert torch.equal(led[name], zeta[name]), name
    shake_([model.linear.weight, model.linear.bias, model.norm.weight, model.norm.bias])
    average.blend(model, after, buffer_weight=1 - r)
    assert average.num_updates == 1
    w = 1 - 0.97 * (1 - r) / (kappa * 0.03)
    now = state(model)
    for name, value in shadow(average).items():
        old, new, avg = theta[name].double(), now[name].double(), zeta[name].double()
        if name in ("linear.weight", "linear.bias", "norm.weight", "norm.bias"):
            expected = r * avg + (1 - r) * old + w * (new - old)
        elif name in ("norm.running_mean", "norm.running_var"):
            expected = r * avg + (1 - r) * new
        else:
            expected = new
        torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=2e-6)


def test_copied_buffers_stay_copied() -> None:
    model = Net()
    average = WeightAverage(model, buffers="copy")
    shake_(list(model.buffers()))
    average.lead(model, 0.3)
    average.blend(model, 0.2, buffer_weight=0.4)
    for name in ("norm.running_mean", "norm.running_var", "norm.num_batches_tracked"):
        assert torch.equal(average.tensors()[name], model.state_dict()[name])


def test_lead_refuses_what_blend_refuses_but_weights_below_zero() -> None:
    model = Net()
    average = WeightAverage(model)
    zeta = shadow(average)
    shake_(list(model.parameters()))
    for weight in (1.0000001, -math.inf, math.nan):
        with pytest.raises(ValueError, match="between 0 and 1"):
            average.lead(model, weight)
    with pytest.raises(ValueError, match="between 0 and 1"):
        average.blend(model, -0.1)
    with average.swapped(model), pytest.raises(RuntimeError, match="swapped-in weights"):
        average.lead(model, 0.5)
    average.lead(model, -0.5)
    expected = 1.5 * zeta["linear.weight"] - 0.5 * model.linear.weight.detach()
    torch.testing.assert_close(average.tensors()["linear.weight"], expected)
    average.lead(model, 1.0)
    assert torch.equal(average.tensors()["linear.weight"], model.linear.weight)
