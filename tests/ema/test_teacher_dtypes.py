"""Teachers that compute in another dtype than the average is kept in."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from operations import Operations
from tiny import bert, parakeet, wav2vec2
from torch import Tensor, nn

from hf_ema_scaling.ema import DeadTeacherError, EMATeacher, WeightAverage, check_liveness, check_parity

HALF = [torch.bfloat16, torch.float16]
INPUTS: list[tuple[Callable[[], Any], Callable[[], dict[str, Tensor]]]] = [
    (wav2vec2, lambda: {"input_values": torch.randn(2, 800, generator=torch.Generator().manual_seed(0))}),
    (parakeet, lambda: {"input_features": torch.randn(2, 64, 8, generator=torch.Generator().manual_seed(0))}),
    (bert, lambda: {"input_ids": torch.tensor([[1, 2, 3], [4, 5, 6]])}),
]


def step_(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape).to(parameter.dtype), alpha=0.1)


def far_from(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / a.double().norm())


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize(("make", "inputs_of"), INPUTS)
def test_a_copy_says_what_the_average_says(make: Any, inputs_of: Any, dtype: torch.dtype) -> None:
    model, inputs = make(), inputs_of()
    average = WeightAverage(model)
    teacher, full = EMATeacher(model, average, dtype=dtype), EMATeacher(model, average)
    assert teacher.dtype == dtype and teacher.config.dtype == dtype and full.dtype == torch.float32
    for _ in range(2):
        step_(model)
        average.update(model, 0.5)
        # Every weight is the average's, rounded once: the copy has followed.
        for name, parameter in teacher.module.named_parameters():
            key = average.resolve(name)
            assert key is not None and parameter.dtype == dtype and not parameter.requires_grad
            assert torch.equal(parameter, average.tensors()[key].to(dtype)), name
        assert teacher(**inputs).logits.dtype == dtype
        unit = torch.finfo(dtype).eps
        difference = check_parity(teacher, full, inputs)
        assert 0.01 * unit < difference < 16 * unit
        assert difference == pytest.approx(far_from(full(**inputs).logits, teacher(**inputs).logits), rel=1e-6)
    check_liveness(model, average, teacher, inputs)


@pytest.mark.parametrize("dtype", HALF)
def test_the_copy_is_made_once_per_update_and_only_when_used(dtype: torch.dtype) -> None:
    model = bert()
    average = WeightAverage(model)
    teacher = EMATeacher(model, average, dtype=dtype)

    def copies(use: Callable[[], Any]) -> int:
        with Operations() as seen:
            use()
        return sum(name == "_foreach_copy" or name == "_foreach_copy_" for name in seen.names)

    assert copies(lambda: teacher.module) == 1  # the first use
    for _ in range(3):
        step_(model)
        average.update(model, 0.5)
    assert copies(lambda: teacher.module) == 1 and copies(lambda: teacher.module) == 0
    name, tensor = next(iter(average.tensors().items()))
    average.load({**average.tensors(), name: tensor + 1.0})
    assert copies(lambda: teacher.module) == 1
    assert torch.equal(teacher.module.get_parameter(name), average.tensors()[name].to(dtype))


def test_a_teacher_over_a_float64_average_computes_in_float32() -> None:
    model, inputs = wav2vec2(), INPUTS[0][1]()
    average, plain = WeightAverage(model, dtype=torch.float64), WeightAverage(model)
    teacher, shared = EMATeacher(model, average), EMATeacher(model, plain)
    step_(model)
    for one in (average, plain):
        one.update(model, 0.5)
    assert {p.dtype for p in teacher.module.parameters()} == {torch.float32} and teacher.dtype == torch.float32
    torch.testing.assert_close(teacher(**inputs).logits, shared(**inputs).logits, rtol=1e-4, atol=1e-5)
    check_liveness(model, average, teacher, inputs)
    half = EMATeacher(model, average, dtype=torch.bfloat16)
    assert check_parity(half, teacher, inputs) < 0.125


def test_tied_weights_stay_one_object_in_a_copy() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(4, 3)
            self.head = nn.Linear(3, 4, bias=False)
            self.head.weight = self.embed.weight
            self.register_buffer("ids", torch.arange(3))

    model = Tied()
    average = WeightAverage(model)
    teacher = EMATeacher(model, average, factory=Tied, dtype=torch.bfloat16)
    assert teacher.module.head.weight is teacher.module.embed.weight
    assert teacher.module.ids.data_ptr() == average.tensors()["ids"].data_ptr()  # what needs no cast is shared


class KeepsNorm(nn.Module):
    _keep_in_fp32_modules = ("scale",)
    _keep_in_fp32_modules_strict = ("norm",)

    def __init__(self) -> None:
        super().__init__()
        self.line, self.scale, self.norm = nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2)


@pytest.mark.parametrize(("dtype", "kept"), [(torch.bfloat16, {"norm"}), (torch.float16, {"norm", "scale"})])
def test_what_a_class_keeps_in_float32_stays_so(dtype: torch.dtype, kept: set[str]) -> None:
    model = KeepsNorm()
    teacher = EMATeacher(model, WeightAverage(model), factory=KeepsNorm, dtype=dtype)
    full = {name.split(".")[0] for name, p in teacher.module.named_parameters() if p.dtype == torch.float32}
    assert full == kept


def test_parity_fails_where_half_precision_does() -> None:
    model = bert()
    with torch.no_grad():
        model.classifier.weight.mul_(1e6)  # fits into bfloat16, overflows in float16
    average, inputs = WeightAverage(model), INPUTS[2][1]()
    full = EMATeacher(model, average)
    assert check_parity(EMATeacher(model, average, dtype=torch.bfloat16), full, inputs) < 0.125
    with pytest.raises(DeadTeacherError, match=r"torch.float16 does not say .* differ by (nan|inf)"):
        check_parity(EMATeacher(model, average, dtype=torch.float16), full, inputs)
    with pytest.raises(DeadTeacherError, match=r"1e-05 is allowed"):
        check_parity(EMATeacher(model, average, dtype=torch.bfloat16), full, inputs, tolerance=1e-5)
    assert math.isclose(check_parity(full, full, inputs), 0.0)


def test_parity_catches_a_copy_that_does_not_follow(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = bert(), INPUTS[2][1]()
    average = WeightAverage(model)
    teacher, full = EMATeacher(model, average, dtype=torch.bfloat16), EMATeacher(model, average)
    monkeypatch.setattr(teacher._copies, "copy_changed_", lambda: None)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))
    average.update(model, 0.0)
    with pytest.raises(DeadTeacherError, match="does not say"):
        check_parity(teacher, full, inputs)
    with pytest.raises(DeadTeacherError, match="did not change"):
        check_liveness(model, average, teacher, inputs)


def test_an_outer_autocast_region_does_not_change_the_dtype() -> None:
    model, inputs = wav2vec2(), INPUTS[0][1]()
    teacher = EMATeacher(model, WeightAverage(model), dtype=torch.float16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = teacher(**inputs).logits
    assert inside.dtype == torch.float16 and torch.equal(inside, teacher(**inputs).logits)


def test_other_dtypes_are_refused() -> None:
    model = bert()
    with pytest.raises(ValueError, match=r"got torch.float64"):
        EMATeacher(model, WeightAverage(model), dtype=torch.float64)
