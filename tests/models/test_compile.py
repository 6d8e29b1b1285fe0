"""`torch.compile`: names without its prefix, values written in place, and no graph compiled a second time."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn
from torch._dynamo.testing import CompileCounter
from transformers import BertForSequenceClassification

from hf_ema_scaling.ema import EMATeacher, WeightAverage, load_average, save_average

INPUTS = {"input_ids": torch.tensor([[1, 2, 3, 4]]), "attention_mask": torch.ones(1, 4, dtype=torch.long)}


@pytest.fixture(autouse=True)
def _no_graph_is_compiled_twice() -> Iterator[None]:
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield
    torch._dynamo.reset()


def compiled_bert() -> tuple[BertForSequenceClassification, Any, CompileCounter]:
    model, counter = tiny.bert().eval(), CompileCounter()
    return model, torch.compile(model, backend=counter), counter


def shake_(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)


def test_updates_swaps_and_copies_compile_nothing_again() -> None:
    model, compiled, counter = compiled_bert()
    average = WeightAverage(compiled)
    assert set(average.tensors()) == {name for name, _ in model.named_parameters()}
    outputs = [compiled(**INPUTS).logits.detach().clone()]
    graphs = counter.frame_count
    assert graphs >= 1
    for _ in range(3):
        shake_(model)
        average.update(compiled, 0.5)
        outputs.append(compiled(**INPUTS).logits.detach().clone())
        with average.swapped(compiled):
            averaged = compiled(**INPUTS).logits.detach().clone()
            torch.testing.assert_close(averaged, model(**INPUTS).logits.detach())
        assert not torch.equal(averaged, outputs[-1])
        assert torch.equal(compiled(**INPUTS).logits, outputs[-1])
    average.copy_to(compiled)
    torch.testing.assert_close(compiled(**INPUTS).logits.detach(), averaged)
    assert counter.frame_count == graphs
    assert all(not torch.equal(a, b) for a, b in pairwise(outputs))


def test_a_compiled_teacher_sees_every_update() -> None:
    model, compiled, _ = compiled_bert()
    average = WeightAverage(compiled)
    teacher, counter = EMATeacher(compiled, average), CompileCounter()
    fast = torch.compile(teacher.module, backend=counter)
    with torch.no_grad():
        previous = fast(**INPUTS).logits
        graphs = counter.frame_count
        for _ in range(3):
            shake_(model)
            average.update(compiled, 0.5)
            labels = fast(**INPUTS).logits
            torch.testing.assert_close(labels, teacher(**INPUTS).logits)
            assert not torch.equal(labels, previous)
            previous = labels
    assert counter.frame_count == graphs >= 1


def test_blocks_that_are_compiled_one_by_one(tmp_path: Path) -> None:
    """As accelerate does it: the prefix is inside the names."""
    model, counter = tiny.bert().eval(), CompileCounter()
    plain = {name for name, _ in model.named_parameters()}
    layers: Any = model.bert.encoder.layer
    layers[0] = torch.compile(layers[0], backend=counter)
    assert any("layer.0._orig_mod." in name for name, _ in model.named_parameters())
    average = WeightAverage(model)
    assert set(average.tensors()) == plain
    teacher = EMATeacher(model, average)
    model(**INPUTS)
    graphs = counter.frame_count
    shake_(model)
    average.update(model, 0.5)
    with average.swapped(model):
        torch.testing.assert_close(teacher(**INPUTS).logits, model(**INPUTS).logits.detach())
    assert counter.frame_count == graphs >= 1
    save_average(tmp_path, model, average, state={})
    loaded = BertForSequenceClassification.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(loaded(**INPUTS).logits.detach(), teacher(**INPUTS).logits)
    other = WeightAverage(model)
    load_average(tmp_path, model, other)
    assert tiny.same_bits(dict(other.tensors()), dict(average.tensors()))


@pytest.mark.slow
@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++"))), reason="inductor needs a C++ compiler")
def test_generated_code_trains_and_labels_as_plain_code_does() -> None:
    """Inductor, which reads weights where they lay when it was called: updates and swaps must stay in place."""

    def run(compile_: Any) -> tuple[dict[str, torch.Tensor], list[torch.Tensor]]:
        torch.manual_seed(0)
        model = tiny.bert().eval()  # no dropout: both versions draw alike
        student = compile_(model)
        average = WeightAverage(student)
        teacher = EMATeacher(student, average)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        outputs = []
        for _ in range(5):
            student(**INPUTS, labels=torch.tensor([1])).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            average.update(student, 0.8)
            with torch.no_grad(), average.swapped(student):
                outputs.append(student(**INPUTS).logits.clone())
            with torch.no_grad():
                outputs.append(student(**INPUTS).logits.clone())
                outputs.append(teacher(**INPUTS).logits.clone())
        return {name: tensor.clone() for name, tensor in average.tensors().items()}, outputs

    # With gradients and without are two graphs of their own, for training and for evaluation.
    with torch._dynamo.config.patch(error_on_recompile=False):
        weights, outputs = run(torch.compile)
        assert torch._dynamo.utils.counters["inductor"]
    expected_weights, expected = run(lambda model: model)
    assert weights.keys() == expected_weights.keys()
    for name, tensor in weights.items():
        torch.testing.assert_close(tensor, expected_weights[name], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(outputs, expected, rtol=1e-4, atol=1e-5)
    for averaged, student, labels in zip(outputs[0::3], outputs[1::3], outputs[2::3], strict=True):
        torch.testing.assert_close(averaged, labels, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(averaged, student, rtol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("pseudo", [False, True])
def test_a_compiled_run_is_the_plain_one(tmp_path: Path, pseudo: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Backend `eager` computes the same operations, so every bit agrees."""
    for name in ("BACKEND", "MODE"):  # the arguments set them for the whole process
        monkeypatch.setenv(f"ACCELERATE_DYNAMO_{name}", "no" if name == "BACKEND" else "default")

    def run(folder: Path, compiled: bool) -> Any:
        AcceleratorState._reset_state(reset_partial_state=True)
        values: dict[str, Any] = {"max_steps": 4, "evaluate_weights": "both"}
        if compiled:
            values |= {"torch_compile": True, "torch_compile_backend": "eager"}
        args = tiny.arguments(folder, **values)
        if not pseudo:
            return tiny.trainer(tiny.bert(), args, tiny.sentences(16), eval_dataset=tiny.sentences(4, 1))
        more = {"unlabeled_dataset": tiny.speech(8, 1, labels=False), "pseudo_label_args": tiny.pseudo(pl_start=1)}
        return tiny.trainer(tiny.wav2vec2(), args, tiny.speech(8), eval_dataset=tiny.speech(2, 2), **more)

    # Inputs of other shapes, and the change between training and evaluation, do compile again.
    with torch._dynamo.config.patch(error_on_recompile=False):
        plain = run(tmp_path / "plain", False)
        plain.train()
        expected = plain.evaluate()
        fast = run(tmp_path / "compiled", True)
        torch._dynamo.utils.counters.clear()
        fast.train()
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
        assert isinstance(fast.model_wrapped, torch._dynamo.OptimizedModule)
        scores = fast.evaluate()
    AcceleratorState._reset_state(reset_partial_state=True)
    Accelerator(cpu=True)
    assert tiny.same_bits(tiny.average(plain), tiny.average(fast))
    students = [{k.replace("_orig_mod.", ""): v for k, v in tiny.parameters(m.model).items()} for m in (plain, fast)]
    assert tiny.same_bits(*students)
    assert not fast.average.equals(fast.model)
    assert scores["eval_ema_loss"] == expected["eval_ema_loss"] != expected["eval_loss"]
