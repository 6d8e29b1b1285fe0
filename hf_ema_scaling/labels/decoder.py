"""What the decoder of an encoder-decoder reads: the labels shifted by the model's own rule."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hf_ema_scaling.ema import unwrap
from hf_ema_scaling.ema.adapters import base_of
from hf_ema_scaling.ema.sharding import class_of

TRANSDUCERS = frozenset({"ParakeetForRNNT", "ParakeetForTDT"})
"""Classes of transformers whose decoder reads the label so far, and whose loss is over a lattice."""


def bare(model: Any) -> Any:
    """The transformers model inside wrappers and adapters."""
    return base_of(unwrap(model))


def is_encoder_decoder(model: nn.Module) -> bool:
    """Whether the model has a decoder that needs inputs of its own."""
    return bool(getattr(getattr(bare(model), "config", None), "is_encoder_decoder", False))


def is_transducer(model: nn.Module) -> bool:
    """Whether the model is a transducer, whose decoder reads the label so far."""
    return class_of(bare(model)).__name__ in TRANSDUCERS


def decoder_start(model: nn.Module) -> int:
    """The id with which the model's decoder begins, in training and in generation.

    Raises:
        ValueError: when it has none, or the two differ.
    """
    model = bare(model)
    training: int | None = getattr(model.config, "decoder_start_token_id", None)
    generation: int | None = getattr(getattr(model, "generation_config", None), "decoder_start_token_id", None)
    chosen = training if generation is None else generation
    if chosen is None:
        raise ValueError(
            f"{type(model.config).__name__}.decoder_start_token_id is None, so nobody knows how its decoder begins: "
            "set it in model.config and in model.generation_config"
        )
    if training is not None and generation is not None and training != generation and not wraps_last_token(model):
        raise ValueError(
            f"the decoder begins with id {training} in training (model.config.decoder_start_token_id) and with "
            f"{generation} in generation (model.generation_config): labels would be learned from another start than "
            "they were made from. Set both to one id"
        )
    return chosen


def wraps_last_token(model: nn.Module) -> bool:
    """Whether the decoder begins with the last label token, as mBART's and PLBART's does, and not with a fixed id."""
    shift = _module_shift(bare(model))
    return shift is not None and len(inspect.signature(shift).parameters) == 2


def decoder_input_ids(model: nn.Module, labels: Tensor) -> Tensor:
    """The decoder's input for labels, by the rule that the model's own forward applies to them.

    Args:
        model: an encoder-decoder of transformers, wrapped or not.
        labels: int64 `(rows, tokens)`, padded with -100 on the right. A row of nothing else is a dropped label: its
            decoder reads something whose output nobody looks at.

    Returns:
        int64 `(rows, tokens)`.

    Raises:
        TypeError: when no rule is known for the model's class.
    """
    plain = bare(model)
    filler = getattr(plain.config, "eos_token_id", None)
    filler = filler[0] if isinstance(filler, list) else filler
    # The rules look for a row's last token, so every row has one.
    first = torch.where((labels < 0).all(-1), 0 if filler is None else filler, labels[:, 0])
    labels = torch.cat([first[:, None], labels[:, 1:]], dim=1)
    own = getattr(plain, "prepare_decoder_input_ids_from_labels", None)
    if own is not None:
        return own(labels=labels)
    shift = _module_shift(plain)
    if shift is None or wraps_last_token(plain):
        raise TypeError(
            f"no rule is known by which {type(plain).__name__} shifts labels into decoder inputs: let the data "
            "collator add decoder_input_ids, or give the model a method prepare_decoder_input_ids_from_labels(labels)"
        )
    start = getattr(plain.config, "decoder_start_token_id", None)
    start = decoder_start(model) if start is None else start
    padding = getattr(plain.config, "pad_token_id", None)
    # Padding lies behind the label and is read by no position that enters the loss, so any id will do (Moonshine).
    return shift(labels, start if padding is None else padding, start)


def decoder_inputs(labels: Tensor, blank: int) -> Tensor:
    """What the decoder of a transducer reads for these labels: the blank, then the label; int64 `(rows, tokens + 1)`.

    Args:
        labels: int64 `(rows, tokens)`, padded with -100, which is never read: losses stop at the label's length.
        blank: id of the blank.
    """
    return torch.nn.functional.pad(labels.masked_fill(labels < 0, blank), (1, 0), value=blank)


def with_decoder_inputs(model: nn.Module, inputs: Mapping[str, Tensor], labels: Tensor) -> dict[str, Tensor]:
    """The inputs of a forward pass without labels: with `decoder_input_ids` made of them where there is a decoder.

    Decoder inputs that are already there stay, such as Whisper's previous text before the label.
    """
    if "decoder_input_ids" in inputs or "decoder_inputs_embeds" in inputs:
        return dict(inputs)
    if is_transducer(model):
        return {**inputs, "decoder_input_ids": decoder_inputs(labels, bare(model).config.blank_token_id)}
    if not is_encoder_decoder(model):
        return dict(inputs)
    return {**inputs, "decoder_input_ids": decoder_input_ids(model, labels)}


def with_decoder_start(model: nn.Module, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inputs for a forward pass that has no labels yet: the decoder of every row reads its first token alone."""
    rows = next(iter(inputs.values()))
    return with_decoder_inputs(model, inputs, torch.full((len(rows), 1), -100, device=rows.device))


def _module_shift(model: Any) -> Callable[..., Tensor] | None:
    """`shift_tokens_right` of the module in which the class, or one of its parents, is written."""
    for parent in class_of(model).__mro__:
        shift = getattr(sys.modules.get(parent.__module__), "shift_tokens_right", None)
        if shift is not None:
            return shift
    return None
