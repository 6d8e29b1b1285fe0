"""Weight norm and spectral norm: what is averaged is what is stored, and the averaged module computes with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from hf_ema_scaling.ema import EMATeacher, WeightAverage, load_average, save_average


def shake_(model: nn.Module, scale: float = 0.1) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=scale)


def weight_normed(kind: str) -> nn.Linear:
    layer = nn.Linear(5, 4)
    made: Any = parametrizations.weight_norm(layer) if kind == "parametrization" else nn.utils.weight_norm(layer)
    return made


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("parametrization", ("parametrizations.weight.original0", "parametrizations.weight.original1")),
        ("hook", ("weight_g", "weight_v")),
    ],
)
def test_weight_norm_averages_length_and_direction(kind: str, names: tuple[str, str]) -> None:
    model = weight_normed(kind)
    average = WeightAverage(model)
    teacher = EMATeacher(model, average, factory=lambda: weight_normed(kind))
    assert set(average.tensors()) == {"bias", *names}
    expected = {name: average.tensors()[name].double() for name in names}
    for _ in range(5):
        shake_(model)
        average.update(model, 0.8)
        expected = {name: 0.8 * t + 0.2 * model.get_parameter(name).detach().double() for name, t in expected.items()}
    length, direction = expected.values()
    weight = length * direction / direction.norm(dim=1, keepdim=True)
    x = torch.randn(3, 5)
    result = (x.double() @ weight.T + average.tensors()["bias"].double()).float()
    torch.testing.assert_close(teacher(x), result, rtol=1e-5, atol=1e-6)
    own = model(x).detach().clone()
    with average.swapped(model):
        torch.testing.assert_close(model(x).detach(), result, rtol=1e-5, atol=1e-6)
    assert torch.equal(model(x).detach(), own)


def test_the_positional_convolution_of_wav2vec2(tmp_path: Path) -> None:
    model = tiny.wav2vec2().eval()
    average = WeightAverage(model)
    names = [name for name in average.tensors() if "pos_conv_embed" in name and "weight" in name]
    assert len(names) == 2 and all(".parametrizations." in name for name in names)
    for _ in range(3):
        shake_(model)
        average.update(model, 0.8)
    inputs = {"input_values": torch.randn(1, 320)}
    with torch.no_grad(), average.swapped(model):
        expected = model(**inputs).logits.clone()
    torch.testing.assert_close(EMATeacher(model, average)(**inputs).logits, expected)
    save_average(tmp_path, model, average, state={})
    loaded = type(model).from_pretrained(tmp_path).eval()
    torch.testing.assert_close(loaded(**inputs).logits.detach(), expected)
    other = WeightAverage(model)
    load_average(tmp_path, model, other)
    assert tiny.same_bits(dict(other.tensors()), dict(average.tensors()))


def spectral_normed(kind: str) -> nn.Linear:
    torch.manual_seed(4)
    layer = nn.Linear(6, 5)
    made: Any = parametrizations.spectral_norm(layer) if kind == "parametrization" else nn.utils.spectral_norm(layer)
    return made


SPECTRAL = {
    "parametrization": (
        "parametrizations.weight.original",
        "parametrizations.weight.0._u",
        "parametrizations.weight.0._v",
    ),
    "hook": ("weight_orig", "weight_u", "weight_v"),
}


@pytest.mark.parametrize("kind", SPECTRAL)
@pytest.mark.parametrize("buffers", ["average", "copy"])
def test_spectral_norm_divides_the_averaged_weight_by_its_own_largest_singular_value(kind: str, buffers: str) -> None:
    model = spectral_normed(kind)
    average = WeightAverage(model, buffers=buffers)  # type: ignore[arg-type]
    teacher = EMATeacher(model, average, factory=lambda: spectral_normed(kind))
    weight, u, v = SPECTRAL[kind]
    for _ in range(60):
        shake_(model, 0.005)
        model.train()(torch.randn(2, 6))  # one step of the power iteration
        average.update(model, 0.9)
    held = average.tensors()
    for name in (u, v):
        assert torch.equal(held[name], model.get_buffer(name))
        assert float(held[name].norm()) == pytest.approx(1.0, abs=1e-6)
    assert not torch.equal(held[weight], model.get_parameter(weight))
    mean = held[weight].double()
    sigma = float(torch.linalg.matrix_norm(mean, 2))
    x = torch.eye(6)
    computed: Tensor = (teacher(x) - held["bias"]).T.double()
    torch.testing.assert_close(computed, mean / sigma, rtol=0, atol=1e-3)
    model.eval()
    with average.swapped(model):
        torch.testing.assert_close(model(x).detach(), teacher(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", SPECTRAL)
def test_singular_vectors_that_turn_round_do_not_spoil_the_norm(kind: str) -> None:
    """u and -u are the same singular vector; their mean, which an averaged buffer would hold, is zero."""
    model = spectral_normed(kind)
    _, u, v = SPECTRAL[kind]
    model.train()
    for _ in range(50):
        model(torch.randn(2, 6))
    average = WeightAverage(model)
    teacher = EMATeacher(model, average, factory=lambda: spectral_normed(kind))
    with torch.no_grad():
        for name in (u, v):
            model.get_buffer(name).neg_()
    average.update(model, 0.5)
    model.eval()
    x = torch.randn(3, 6)
    torch.testing.assert_close(teacher(x), model(x).detach(), rtol=1e-4, atol=1e-5)
