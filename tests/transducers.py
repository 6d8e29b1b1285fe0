"""Tiny transducers."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    ParakeetEncoderConfig,
    ParakeetForRNNT,
    ParakeetForTDT,
    ParakeetRNNTConfig,
    ParakeetTDTConfig,
)

BLANK, PAD, SIZE = 7, 2, 8
HEADS = {"rnnt": (ParakeetForRNNT, ParakeetRNNTConfig), "tdt": (ParakeetForTDT, ParakeetTDTConfig)}


def build(head: str, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    model, config = HEADS[head]
    encoder = ParakeetEncoderConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        num_mel_bins=8,
        subsampling_factor=4,
        subsampling_conv_channels=4,
        conv_kernel_size=3,
    )
    sizes = {"vocab_size": SIZE, "decoder_hidden_size": 12, "num_decoder_layers": 1, "max_symbols_per_step": 3}
    made: Any = model(config(encoder_config=encoder, blank_token_id=BLANK, pad_token_id=PAD, **sizes))
    with torch.no_grad():
        # So that it says something, and something else at every frame.
        for name, parameter in made.named_parameters():
            if name.startswith(("encoder_projector", "decoder", "joint")) and parameter.ndim > 1:
                parameter.mul_(2.5 / parameter.std())
        made.joint.head.bias[BLANK] = 3.0
    return made.eval()
