"""Models that change while they are averaged: what is followed, and what is refused by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import tiny
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from hf_ema_scaling.ema import EMATeacher, WeightAverage

ADVICE = "An average is of the tensors that the model had when it was built.*or build a new average"


def shake_(model: nn.Module, scale: float = 0.3) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=scale)


# ---- What is refused


def resize_embeddings(model: Any) -> None:
    model.resize_token_embeddings(25, mean_resizing=False)


def add_a_layer(model: Any) -> None:
    model.extra = nn.Linear(2, 2)


def remove_the_head(model: Any) -> None:
    del model.classifier


def tie(model: Any) -> None:
    attention = model.bert.encoder.layer[0].attention.self
    attention.query.weight = attention.key.weight


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (resize_embeddings, r"'bert\.embeddings\.word_embeddings\.weight' has shape \(25, 8\), the average has \(20,"),
        (add_a_layer, r"unexpected: extra\.bias, extra\.weight"),
        (remove_the_head, r"Missing in BertForSequenceClassification: classifier\.bias, classifier\.weight"),
        (tie, r"Tied weights changed since the average was built: '.*\.query\.weight'"),
    ],
)  # fmt: skip
def test_another_model_than_the_one_averaged_is_refused_by_name(
    change: Callable[[Any], None], message: str, dtype: torch.dtype
) -> None:
    """transformers resizes embeddings inside the parameter, which stays the same object."""
    model = tiny.bert().to(dtype)
    average = WeightAverage(model)
    average.update(model, 0.9)
    change(model)
    for use in (lambda: average.update(model, 0.9), lambda: average.distance(model)):
        with pytest.raises(ValueError, match=f"{message}.*{ADVICE}"):
            use()
    assert average.num_updates == 1


def test_a_module_that_is_changed_in_the_middle_of_a_run_stops_it_by_name(tmp_path: Any) -> None:
    """Without moments, which would be of the old shape: PyTorch's fused AdamW writes beyond their end."""
    made = tiny.trainer(tiny.bert(), tiny.arguments(tmp_path, max_steps=4, optim="sgd"), tiny.sentences(16))
    step = made.training_step

    def growing(model: Any, *args: Any, **kwargs: Any) -> Any:
        if made.state.global_step == 2:
            resize_embeddings(model)
        return step(model, *args, **kwargs)

    made.training_step = growing
    with pytest.raises(ValueError, match=r"word_embeddings\.weight' has shape \(25, 8\)"):
        made.train()


def test_what_could_never_be_updated_is_refused() -> None:
    with torch.inference_mode(), pytest.raises(RuntimeError, match=r"inference_mode\(\).*Use torch\.no_grad"):
        WeightAverage(nn.Linear(2, 2).requires_grad_(True))
    with torch.inference_mode():
        made = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"'weight' was made in torch\.inference_mode\(\)"):
        WeightAverage(made)
    scripted = nn.Sequential(nn.Linear(2, 2), torch.jit.script(nn.Sequential(nn.ReLU(), nn.BatchNorm1d(2))))
    with pytest.raises(TypeError, match=r"^1\.1 was scripted or traced by torch\.jit"):
        WeightAverage(scripted)


# ---- What is followed


def test_scripted_parts_without_tensors_are_left_alone() -> None:
    model = nn.Sequential(nn.Linear(2, 2), torch.jit.script(nn.Sequential(nn.GELU(), nn.Dropout(0.5))))
    average = WeightAverage(model)
    expected = {name: value.lerp(torch.ones(()), 0.5) for name, value in average.tensors().items()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1.0)
    average.update(model, 0.5)
    assert all(torch.equal(value, expected[name]) for name, value in average.tensors().items())
    with average.swapped(model):
        assert torch.equal(model[0].weight, expected["0.weight"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("first", [True, False])
def test_tensors_without_elements(dtype: torch.dtype, first: bool) -> None:
    """A process may have no rows of a sharded weight; alone, or before all others, there is nothing to cast."""
    model: Any = nn.Module()
    model.empty = nn.Parameter(torch.zeros(0, 3, dtype=dtype))
    if first:
        model.weight = nn.Parameter(torch.ones(2, dtype=dtype))
    average = WeightAverage(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0)
    average.update(model, 0.75)
    assert average.tensors()["empty"].shape == (0, 3)
    if first:
        assert torch.equal(average.tensors()["weight"], torch.full((2,), 1.5))
    with average.swapped(model):
        assert not first or torch.equal(model.weight, torch.full((2,), 1.5, dtype=dtype))


def llama(kind: str) -> LlamaForCausalLM:
    rope: dict[str, Any] = {"rope_type": kind, "factor": 2.0, "rope_theta": 10000.0}
    if kind == "longrope":
        rope |= {"short_factor": [1.0, 1.0], "long_factor": [2.0, 3.0], "original_max_position_embeddings": 4}
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8,
        num_key_value_heads=1, max_position_embeddings=4, initializer_range=0.5, rope_parameters=rope,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_rotary_embeddings_that_follow_the_length(kind: str) -> None:
    """A dynamic one makes its two buffers one object after a long sequence, and keeps the length in an attribute: the
    teacher labels short sequences as a new model with the average does, whatever the student has seen last.
    """
    model = llama(kind)
    average = WeightAverage(model)
    teacher = EMATeacher(model, average)
    buffers = []
    for seen, labelled in ((9, 3), (3, 3), (12, 2), (2, 12), (7, 7)):
        shake_(model)
        with torch.no_grad():
            model(input_ids=torch.arange(seen)[None])
        average.update(model, 0.9)
        rotary: Any = model.model.rotary_emb
        buffers.append(
            (rotary.inv_freq is rotary.original_inv_freq, torch.equal(rotary.inv_freq, rotary.original_inv_freq))
        )
        fresh = llama(kind)
        fresh.load_state_dict(average.state_dict(model))
        ids = torch.arange(labelled)[None]
        with torch.no_grad():
            expected = fresh(input_ids=ids).logits
        torch.testing.assert_close(teacher(input_ids=ids).logits, expected, rtol=1e-5, atol=1e-6)
        with average.swapped(model):
            pass
    assert not buffers[0][1]  # scaled for nine tokens
    if kind == "dynamic":
        assert buffers[1] == (True, True)


def test_buffers_that_are_one_object_for_a_while() -> None:
    model: Any = nn.Linear(2, 2)
    model.register_buffer("a", torch.zeros(2), persistent=False)
    model.register_buffer("b", torch.ones(2), persistent=False)
    own = model.a, model.b
    average = WeightAverage(model)
    teacher = EMATeacher(model, average, factory=lambda: _with_buffers())
    for a, b in ((own[0], own[0]), own, (own[1], own[1]), (own[1], own[0]), own):
        model.a, model.b = a, b
        average.update(model, 0.9)
        module: Any = teacher.module
        assert torch.equal(module.a, a) and torch.equal(module.b, b)
        assert module.a is not a and module.b is not b
    del model.a
    average.update(model, 0.9)
    assert torch.equal(teacher.module.b, own[1])  # type: ignore[arg-type]


def _with_buffers() -> nn.Module:
    module = nn.Linear(2, 2)
    for name in "ab":
        module.register_buffer(name, torch.full((2,), 7.0), persistent=False)
    return module
