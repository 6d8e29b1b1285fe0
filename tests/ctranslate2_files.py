"""Whisper models in CTranslate2's format, written for tests."""

from __future__ import annotations

import struct

import numpy as np
import torch
from transformers import WhisperConfig, WhisperForConditionalGeneration


def whisper() -> WhisperForConditionalGeneration:
    torch.manual_seed(0)
    config = WhisperConfig(
        vocab_size=1600,
        num_mel_bins=8,
        d_model=64,
        encoder_layers=2,
        decoder_layers=1,
        encoder_attention_heads=1,
        decoder_attention_heads=1,
        encoder_ffn_dim=256,
        decoder_ffn_dim=256,
        max_source_positions=20,
        max_target_positions=12,
        pad_token_id=97,
        bos_token_id=97,
        eos_token_id=97,
        decoder_start_token_id=98,
    )
    model = WhisperForConditionalGeneration(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model


def variables_of(model: WhisperForConditionalGeneration) -> dict[str, np.ndarray]:
    """What CTranslate2 calls the weights, with projections of attention fused."""
    weights = {name: value.detach().numpy() for name, value in model.state_dict().items()}
    found: dict[str, np.ndarray] = {"decoder/embeddings/weight": weights["model.decoder.embed_tokens.weight"]}

    def fused(target: str, source: str, names: str) -> None:
        zeros = np.zeros(64, dtype=np.float32)
        found[f"{target}/weight"] = np.concatenate([weights[f"{source}.{name}_proj.weight"] for name in names])
        found[f"{target}/bias"] = np.concatenate(
            [zeros if name == "k" else weights[f"{source}.{name}_proj.bias"] for name in names]
        )

    def plain(target: str, source: str, parts: tuple[str, str] = ("weight", "bias")) -> None:
        for part, theirs in zip(("weight", "bias"), parts, strict=True):
            found[f"{target}/{theirs}"] = weights[f"{source}.{part}"]

    norm = ("gamma", "beta")
    plain("encoder/conv1", "model.encoder.conv1")
    plain("encoder/conv2", "model.encoder.conv2")
    for side, layers in (("encoder", 2), ("decoder", 1)):
        found[f"{side}/position_encodings/encodings"] = weights[f"model.{side}.embed_positions.weight"]
        plain(f"{side}/layer_norm", f"model.{side}.layer_norm", norm)
        for layer in range(layers):
            target, source = f"{side}/layer_{layer}", f"model.{side}.layers.{layer}"
            fused(f"{target}/self_attention/linear_0", f"{source}.self_attn", "qkv")
            plain(f"{target}/self_attention/linear_1", f"{source}.self_attn.out_proj")
            plain(f"{target}/self_attention/layer_norm", f"{source}.self_attn_layer_norm", norm)
            plain(f"{target}/ffn/linear_0", f"{source}.fc1")
            plain(f"{target}/ffn/linear_1", f"{source}.fc2")
            plain(f"{target}/ffn/layer_norm", f"{source}.final_layer_norm", norm)
            if side == "decoder":
                fused(f"{target}/attention/linear_0", f"{source}.encoder_attn", "q")
                fused(f"{target}/attention/linear_1", f"{source}.encoder_attn", "kv")
                plain(f"{target}/attention/linear_2", f"{source}.encoder_attn.out_proj")
                plain(f"{target}/attention/layer_norm", f"{source}.encoder_attn_layer_norm", norm)
    return found


def written(variables: dict[str, np.ndarray], aliases: dict[str, str], specification: str = "WhisperSpec") -> bytes:
    """A `model.bin`."""

    def text(value: str) -> bytes:
        raw = value.encode() + b"\0"
        return struct.pack("<H", len(raw)) + raw

    codes = {np.dtype(np.float32): 0, np.dtype(np.float16): 4}
    content = struct.pack("<I", 6) + text(specification) + struct.pack("<II", 3, len(variables))
    for name, value in variables.items():
        content += text(name) + struct.pack(f"<B{value.ndim}I", value.ndim, *value.shape)
        content += struct.pack("<BI", codes[value.dtype], value.nbytes) + value.tobytes()
    content += struct.pack("<I", len(aliases))
    return content + b"".join(text(alias) + text(name) for alias, name in aliases.items())
