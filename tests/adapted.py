"""Tiny models with PEFT adapters, by `get_peft_model` or by transformers' `add_adapter`."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from torch import Tensor, nn

peft = pytest.importorskip("peft")
KINDS = ("get_peft_model", "add_adapter")


def config(**changes: Any) -> Any:
    values = {"r": 2, "target_modules": ["query", "value"], "modules_to_save": ["classifier"]}
    return peft.LoraConfig(**(values | changes))


def adapt(base: nn.Module, kind: str, *, seed: int = 1, **changes: Any) -> Any:
    torch.manual_seed(seed)
    if kind == "get_peft_model":
        return peft.get_peft_model(base, config(**changes))
    with pytest.MonkeyPatch.context() as patch:
        # The newest transformers asks for a PEFT that is not published yet.
        patch.setattr("transformers.integrations.peft.check_peft_version", lambda **_: None)
        base.add_adapter(config(**changes), "lora")  # type: ignore[operator]
    return base


def lora_bert(kind: str = "get_peft_model", *, seed: int = 1, **changes: Any) -> Any:
    return adapt(tiny.bert(), kind, seed=seed, **changes)


def lora_wav2vec2(kind: str = "get_peft_model", *, seed: int = 1) -> Any:
    return adapt(tiny.wav2vec2(), kind, seed=seed, target_modules=["q_proj", "v_proj"], modules_to_save=None)


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def shake_(model: nn.Module, scale: float = 0.1) -> None:
    """Stands for an optimizer step."""
    with torch.no_grad():
        for parameter in trained(model).values():
            parameter.add_(torch.randn_like(parameter), alpha=scale)


def delta(tensors: dict[str, Tensor], layer: str = "query") -> Tensor:
    """B A of one layer, float64 (out, in)."""
    (a,) = (t for name, t in tensors.items() if f"{layer}.lora_A" in name)
    (b,) = (t for name, t in tensors.items() if f"{layer}.lora_B" in name)
    return b.detach().double() @ a.detach().double()
