"""Models whose forward was replaced on the instance: labels must come from the teacher's own weights."""

from __future__ import annotations

import functools
import types
from typing import Any

import pytest
import tiny
import torch
from accelerate import Accelerator
from accelerate.hooks import ModelHook, add_hook_to_module
from accelerate.state import AcceleratorState
from torch import Tensor, nn

from hf_ema_scaling.ema import EMATeacher, WeightAverage

INPUTS = {"input_ids": torch.tensor([[1, 2, 3, 4]])}


def doubled(self: Any, x: Tensor) -> Tensor:
    """Another function of a linear layer's own weights."""
    return 2.0 * nn.functional.linear(x, self.weight, self.bias)


def follow(model: nn.Module) -> tuple[Tensor, Tensor, Tensor]:
    """The teacher's logits, those of the student with the average swapped in, and the student's own."""
    average = WeightAverage(model)
    teacher = EMATeacher(model, average)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.5)
        average.update(model, 0.7)
        student = model(**INPUTS).logits.clone()
        with average.swapped(model):
            averaged = model(**INPUTS).logits.clone()
    return teacher(**INPUTS).logits, averaged, student


def test_a_method_bound_to_its_module_computes_with_the_teachers_weights() -> None:
    model = tiny.bert().eval()
    before = model(**INPUTS).logits.detach()
    model.classifier.forward = types.MethodType(doubled, model.classifier)  # type: ignore[method-assign]
    torch.testing.assert_close(model(**INPUTS).logits.detach(), 2 * before)
    labels, averaged, student = follow(model)
    torch.testing.assert_close(labels, averaged)
    assert float((labels - student).abs().max()) > 1e-2


def test_so_does_a_method_of_the_whole_model() -> None:
    model = tiny.bert().eval()
    inner = type(model).forward

    @functools.wraps(inner)
    def tripled(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = inner(self, *args, **kwargs)
        output.logits = 3.0 * output.logits
        return output

    model.forward = types.MethodType(tripled, model)  # type: ignore[method-assign]
    labels, averaged, student = follow(model)
    torch.testing.assert_close(labels, averaged)
    assert float((labels - student).abs().max()) > 1e-2


@pytest.mark.parametrize("kind", ["closure", "partial", "of another module"])
def test_what_holds_the_students_weights_is_refused(kind: str) -> None:
    model = tiny.bert().eval()
    original = model.classifier.forward
    replaced = {
        "closure": lambda x: 2.0 * original(x),
        "partial": functools.partial(doubled, model.classifier),
        "of another module": types.MethodType(doubled, nn.Linear(8, 3)),
    }[kind]
    model.classifier.forward = replaced  # type: ignore[method-assign]
    average = WeightAverage(model)
    with pytest.raises(TypeError, match=r"forward was replaced on classifier \(Linear\).*student's weights.*factory="):
        EMATeacher(model, average)

    def factory() -> nn.Module:
        made = tiny.bert()
        own = made.classifier.forward
        made.classifier.forward = lambda x: 2.0 * own(x)  # type: ignore[method-assign]
        return made

    teacher = EMATeacher(model, average, factory=factory)
    torch.testing.assert_close(teacher(**INPUTS).logits[0, 0], teacher.module(**INPUTS).logits[0, 0])


def test_what_accelerate_puts_around_a_forward_is_looked_through() -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    model = tiny.bert().eval()
    prepared: Any = accelerator.prepare_model(model)
    assert "forward" in vars(model) and "_original_forward" in vars(model)
    labels, averaged, _ = follow(prepared)
    torch.testing.assert_close(labels, averaged, rtol=0.02, atol=0.05)  # the student computes in bfloat16
    accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)  # as Trainer does when it saves
    assert "forward" in vars(model) and "_original_forward" not in vars(model)
    labels, averaged, student = follow(model)
    torch.testing.assert_close(labels, averaged)
    assert float((labels - student).abs().max()) > 1e-2
    AcceleratorState._reset_state(reset_partial_state=True)
    Accelerator(cpu=True)

    hooked = tiny.bert().eval()
    add_hook_to_module(hooked.classifier, ModelHook())
    labels, averaged, _ = follow(hooked)
    torch.testing.assert_close(labels, averaged)
