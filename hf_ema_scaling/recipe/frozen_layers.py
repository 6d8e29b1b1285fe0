"""Leaves the lower part of a pre-trained encoder as it is."""

from __future__ import annotations

from typing import Any

from torch import nn


def freeze_lower(network: Any, count: int) -> None:
    """Freezes the embeddings and the first layers of a transformers model; the average refers to them without a copy.

    Args:
        network: a model with `base_model`, whose layers are a `ModuleList` of `config.num_hidden_layers` modules.
        count: how many layers; with 0 nothing is frozen, the embeddings neither.

    Raises:
        ValueError: for a model whose layers are not found, or more of them than it has.
    """
    if count == 0:
        return
    base, depth = network.base_model, getattr(network.config, "num_hidden_layers", None)
    layers = next((m for m in base.modules() if isinstance(m, nn.ModuleList) and len(m) == depth), None)
    if layers is None:
        raise ValueError(
            f"frozen_layers={count}: no list of {depth} layers is found in {type(network).__name__}; set it to 0"
        )
    if count > len(layers):
        raise ValueError(f"frozen_layers={count}, and {type(network).__name__} has {len(layers)} layers")
    for module in (base.get_input_embeddings(), getattr(base, "embeddings", None), *layers[:count]):
        if module is not None:
            module.requires_grad_(False)
