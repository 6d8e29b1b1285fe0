"""A tiny CTC model that says something, and rows of sound for it."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from transformers import ParakeetCTCConfig, ParakeetEncoderConfig, ParakeetForCTC

from hf_ema_scaling.data.speech import build_character_processor

RATE = 16_000


def speech_model() -> tuple[ParakeetForCTC, Any]:
    """A model that says something: blanks are rare."""
    torch.manual_seed(0)
    processor = build_character_processor("abcdef", num_mel_bins=16)
    encoder = ParakeetEncoderConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        num_mel_bins=16,
        subsampling_factor=4,
        subsampling_conv_channels=4,
        conv_kernel_size=3,
        initializer_range=0.5,
    )
    model = ParakeetForCTC(
        ParakeetCTCConfig(vocab_size=len(processor.tokenizer), encoder_config=encoder, pad_token_id=0)
    )
    with torch.no_grad():
        model.ctc_head.bias[:3] = torch.tensor([-0.5, -1.0, -9.0])
    return model.eval(), processor


def waveform(seconds: float, seed: int) -> np.ndarray:
    """A tone that changes its pitch, in noise."""
    generator = np.random.default_rng(seed)
    samples = int(seconds * RATE)
    pitch = np.repeat(generator.uniform(100, 4000, samples // 1600 + 1), 1600)[:samples]
    sound = 0.3 * np.sin(2 * np.pi * np.cumsum(pitch) / RATE) + 0.01 * generator.standard_normal(samples)
    return sound.astype(np.float32)


def speech_rows(count: int = 9) -> list[dict[str, Any]]:
    """Rows of different lengths; with a reference that nobody may read."""
    return [
        {
            "audio": {"array": waveform(0.4 + 0.17 * (7 * row % 5), row).tolist(), "sampling_rate": RATE},
            "id": f"u{row}",
            "text": "hidden",
        }
        for row in range(count)
    ]
