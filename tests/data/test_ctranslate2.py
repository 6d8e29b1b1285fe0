"""Whisper out of CTranslate2's format: the same bits, and clear words for what is something else."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
import pytest
import torch
from transformers import WhisperConfig, WhisperForConditionalGeneration

from hf_ema_scaling.data.ctranslate2 import ConversionError, read_variables, whisper_from_variables

SETTINGS = {"suppress_ids": [3, 5], "suppress_ids_begin": [7], "alignment_heads": [[0, 0]]}


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


def test_a_model_comes_out_bit_for_bit() -> None:
    model = whisper()
    content = written(variables_of(model), {"decoder/projection/weight": "decoder/embeddings/weight"})
    variables = read_variables(content)
    assert variables["decoder/projection/weight"] is variables["decoder/embeddings/weight"]
    found = whisper_from_variables(variables, SETTINGS)
    features, ids = torch.randn(2, 8, 40), torch.tensor([[98, 4, 9], [98, 1, 2]])
    with torch.no_grad():
        wanted = model.eval()(input_features=features, decoder_input_ids=ids).logits
        assert torch.equal(found.eval()(input_features=features, decoder_input_ids=ids).logits, wanted)
    assert found.config.eos_token_id == 97 and found.config.decoder_start_token_id == 98
    settings = found.generation_config
    assert settings.suppress_tokens == [3, 5] and settings.no_timestamps_token_id == 98 and settings.max_length == 12


def test_half_precision_is_read_as_float32() -> None:
    variables = {name: value.astype(np.float16) for name, value in variables_of(whisper()).items()}
    found = whisper_from_variables(read_variables(written(variables, {})), SETTINGS)
    weight = found.model.decoder.layers[0].fc1.weight
    assert weight.dtype == torch.float32
    assert torch.equal(weight.detach().half(), torch.from_numpy(variables["decoder/layer_0/ffn/linear_0/weight"]))


def _languages(variables: dict[str, Any]) -> None:
    variables["decoder/embeddings/weight"] = np.zeros((51_865, 64), dtype=np.float32)


def _bias_of_keys(variables: dict[str, Any]) -> None:
    variables["encoder/layer_1/self_attention/linear_0/bias"][64] = 1.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v.pop("decoder/layer_0/ffn/linear_1/bias"), "no variable 'decoder/layer_0/ffn/linear_1/bias'"),
        (lambda v: v.update({"encoder/conv1/weight_scale": np.ones(1, dtype=np.float32)}), "are quantised"),
        (_languages, "several languages .51865 tokens"),
        (_bias_of_keys, "encoder/layer_1/self_attention/linear_0 has a bias of keys"),
    ],
)
def test_what_is_no_english_whisper_is_refused(change: Any, message: str) -> None:
    variables = variables_of(whisper())
    change(variables)
    with pytest.raises(ConversionError, match=message):
        whisper_from_variables(variables, SETTINGS)


def test_another_file_is_refused() -> None:
    whole = written(variables_of(whisper()), {})
    for content in (whole[: len(whole) // 2], whole[:-3], b"", b"safetensors" * 40):
        with pytest.raises(ConversionError, match="not a CTranslate2 model, or cut short"):
            read_variables(content)
    with pytest.raises(ConversionError, match="is a 'TransformerSpec', not a 'WhisperSpec'"):
        read_variables(written({}, {}, "TransformerSpec"))
