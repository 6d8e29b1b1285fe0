"""Averages in float64 on disk."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForMaskedLM

from hf_ema_scaling.ema import AverageStateError, WeightAverage, load_average, save_average


def tied_bert() -> BertForMaskedLM:
    torch.manual_seed(0)
    return BertForMaskedLM(
        BertConfig(vocab_size=9, hidden_size=4, num_hidden_layers=1, num_attention_heads=1, intermediate_size=4)
    )


def shake_(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)


def test_a_float64_average_is_saved_exactly_and_read_by_from_pretrained_in_float32(tmp_path: Path) -> None:
    model = tied_bert()
    average = WeightAverage(model, dtype=torch.float64)
    for _ in range(3):
        shake_(model)
        average.update(model, 0.9)
    save_average(tmp_path / "ema", model, average, state={"clock": 3})
    exported = type(model).from_pretrained(tmp_path / "ema")
    assert exported.dtype == torch.float32
    for name, tensor in exported.state_dict().items():
        key = average.resolve(name)
        assert key is not None and torch.equal(tensor, average.tensors()[key].to(tensor.dtype)), name
    resumed = WeightAverage(tied_bert(), dtype=torch.float64)
    assert load_average(tmp_path / "ema", model, resumed) == {"clock": 3} and resumed.num_updates == 3
    assert resumed.tensors().keys() == average.tensors().keys()
    for name, tensor in average.tensors().items():
        assert torch.equal(resumed.tensors()[name], tensor) and resumed.tensors()[name].dtype == tensor.dtype, name
    rounded = average.tensors()["bert.embeddings.word_embeddings.weight"]
    assert not torch.equal(rounded.float().double(), rounded)  # there was something to lose


def test_float64_bits_must_be_there_and_belong_to_the_weights(tmp_path: Path) -> None:
    model = tied_bert()
    average = WeightAverage(model, dtype=torch.float64)
    shake_(model)
    average.update(model, 0.9)
    folder = tmp_path / "ema"
    save_average(folder, model, average, state={})
    with pytest.raises(AverageStateError, match=r"kept in float64 and this one is in float32.*ema_dtype='float64'"):
        load_average(folder, model, WeightAverage(model))
    exact = folder / "average_float64.safetensors"
    content = exact.read_bytes()
    exact.write_bytes(content[:-100])
    with pytest.raises(AverageStateError, match=r"average_float64.safetensors is not readable"):
        load_average(folder, model, average)
    exact.write_bytes(content[:-1] + bytes([content[-1] ^ 64]))
    with pytest.raises(AverageStateError, match="is not that of the weights beside it"):
        load_average(folder, model, average)
    exact.write_bytes(content[:-8] + bytes([content[-8] ^ 1]) + content[-7:])  # too small a change for float32
    with pytest.raises(AverageStateError, match="says"):
        load_average(folder, model, average)
    exact.unlink()
    with pytest.raises(AverageStateError, match=r"average_float64.safetensors is missing"):
        load_average(folder, model, average)


def test_a_float32_average_may_go_on_in_float64(tmp_path: Path) -> None:
    model = tied_bert()
    average = WeightAverage(model)
    shake_(model)
    average.update(model, 0.9)
    save_average(tmp_path / "ema", model, average, state={})
    wider = WeightAverage(model, dtype=torch.float64)
    load_average(tmp_path / "ema", model, wider)
    for name, tensor in average.tensors().items():
        assert torch.equal(wider.tensors()[name], tensor.to(wider.tensors()[name].dtype)), name
