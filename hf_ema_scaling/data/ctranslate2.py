"""Whisper models in CTranslate2's format, as transformers models: read with numpy alone."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers import GenerationConfig, WhisperConfig, WhisperForConditionalGeneration

Variables = Mapping[str, npt.NDArray[Any]]
DTYPES = {0: np.float32, 1: np.int8, 2: np.int16, 3: np.int32, 4: np.float16}
WHISPER = "WhisperSpec"
HEAD_SIZE = 64
"""Width of an attention head in every Whisper."""
MULTILINGUAL_VOCABULARY = 51_865
"""Tokens from which on a vocabulary has languages."""
TIMESTAMPS = 1501
"""The last tokens of a vocabulary; "no timestamps" stands before them."""
ENGLISH_END = 50_256
"""End of text in the vocabulary without languages."""


class ConversionError(ValueError):
    """The file is not a CTranslate2 model, or not one of Whisper; the message says which."""


class _Reader:
    def __init__(self, content: bytes) -> None:
        self.content, self.at = content, 0

    def number(self, kind: str) -> int:
        (value,) = struct.unpack_from(f"<{kind}", self.content, self.at)
        self.at += struct.calcsize(kind)
        return int(value)

    def text(self) -> str:
        length = self.number("H")
        raw = self.content[self.at : self.at + length]
        self.at += length
        return raw.rstrip(b"\0").decode()

    def array(self) -> npt.NDArray[Any]:
        shape = [self.number("I") for _ in range(self.number("B"))]
        dtype = np.dtype(DTYPES[self.number("B")])
        size = self.number("I")
        found = np.frombuffer(self.content, dtype, count=size // dtype.itemsize, offset=self.at).reshape(shape)
        self.at += size
        return found


def read_variables(content: bytes) -> Variables:
    """The variables of a `model.bin` of Whisper by name, aliases included.

    Args:
        content: of the file: version, name of the specification, its revision, then name, shape, dtype and bytes of
            each variable, then pairs of alias and name; all little-endian.

    Raises:
        ConversionError: for another file, another model, or one cut short.
    """
    reader = _Reader(content)
    try:
        reader.number("I")
        specification = reader.text()
        if specification != WHISPER:
            if not specification.endswith("Spec"):
                raise ValueError("no specification")
            raise ConversionError(f"the model is a {specification!r}, not a {WHISPER!r}")
        reader.number("I")
        variables = {reader.text(): reader.array() for _ in range(reader.number("I"))}
        for _ in range(reader.number("I")):
            alias, name = reader.text(), reader.text()
            variables[alias] = variables[name]
    except (struct.error, KeyError, UnicodeDecodeError, ValueError) as error:
        if isinstance(error, ConversionError):
            raise
        raise ConversionError(
            f"not a CTranslate2 model, or cut short: {type(error).__name__} at byte {reader.at} of {len(content)}"
        ) from error
    return variables


def whisper_from_variables(variables: Variables, settings: Mapping[str, Any]) -> WhisperForConditionalGeneration:
    """The float32 model of the variables of a Whisper that was not quantised.

    Args:
        variables: see `read_variables`.
        settings: CTranslate2's `config.json`: `suppress_ids`, `suppress_ids_begin`, `lang_ids`, `alignment_heads`.

    Raises:
        ConversionError: for a quantised model, one of several languages, or variables that do not make a Whisper.
    """
    quantised = [name for name, value in variables.items() if name.endswith("weight_scale")]
    if quantised:
        raise ConversionError(f"the weights are quantised ({quantised[0]}): convert a float16 or float32 model")
    try:
        weights = _weights(variables)
        config = _config(variables)
    except KeyError as error:
        raise ConversionError(f"the model has no variable {error}") from error
    model = WhisperForConditionalGeneration(config)
    missing, unexpected = model.load_state_dict(weights, strict=False)
    if unexpected or set(missing) - {"proj_out.weight"}:
        raise ConversionError(f"weights do not fit a Whisper: missing {missing}, unexpected {unexpected}")
    model.tie_weights()
    model.generation_config = _generation_config(config, settings)
    return model


def _layers(variables: Variables, side: str) -> int:
    return sum(name.startswith(side) and name.endswith("ffn/layer_norm/gamma") for name in variables)


def _config(variables: Variables) -> WhisperConfig:
    width = len(variables["encoder/layer_norm/gamma"])
    vocabulary = len(variables["decoder/embeddings/weight"])
    if vocabulary >= MULTILINGUAL_VOCABULARY:
        raise ConversionError(f"a model of several languages ({vocabulary} tokens): only English ones are converted")
    # Smaller vocabularies are of models for tests.
    end = min(ENGLISH_END, vocabulary - TIMESTAMPS - 2)
    heads = max(1, width // HEAD_SIZE)
    return WhisperConfig(
        vocab_size=vocabulary,
        num_mel_bins=variables["encoder/conv1/weight"].shape[1],
        d_model=width,
        encoder_layers=_layers(variables, "encoder"),
        decoder_layers=_layers(variables, "decoder"),
        encoder_attention_heads=heads,
        decoder_attention_heads=heads,
        encoder_ffn_dim=4 * width,
        decoder_ffn_dim=4 * width,
        max_source_positions=len(variables["encoder/position_encodings/encodings"]),
        max_target_positions=len(variables["decoder/position_encodings/encodings"]),
        bos_token_id=end,
        eos_token_id=end,
        pad_token_id=end,
        decoder_start_token_id=end + 1,
    )


def _generation_config(config: WhisperConfig, settings: Mapping[str, Any]) -> GenerationConfig:
    end = config.eos_token_id
    return GenerationConfig(
        bos_token_id=end,
        eos_token_id=end,
        pad_token_id=end,
        decoder_start_token_id=config.decoder_start_token_id,
        max_length=config.max_target_positions,
        suppress_tokens=settings["suppress_ids"],
        begin_suppress_tokens=settings["suppress_ids_begin"],
        alignment_heads=settings.get("alignment_heads"),
        no_timestamps_token_id=config.vocab_size - TIMESTAMPS - 1,
        return_timestamps=False,
        max_initial_timestamp_index=50,
        is_multilingual=False,
    )


def _weights(variables: Variables) -> dict[str, Tensor]:
    def tensor(name: str) -> Tensor:
        return torch.from_numpy(np.array(variables[name], dtype=np.float32))

    weights: dict[str, Tensor] = {
        "model.encoder.embed_positions.weight": tensor("encoder/position_encodings/encodings"),
        "model.decoder.embed_positions.weight": tensor("decoder/position_encodings/encodings"),
        "model.decoder.embed_tokens.weight": tensor("decoder/embeddings/weight"),
    }

    def linear(target: str, source: str) -> None:
        for part in ("weight", "bias"):
            weights[f"{target}.{part}"] = tensor(f"{source}/{part}")

    def norm(target: str, source: str) -> None:
        weights[f"{target}.weight"], weights[f"{target}.bias"] = tensor(f"{source}/gamma"), tensor(f"{source}/beta")

    def fused(target: str, source: str, names: str) -> None:
        # Projections that CTranslate2 keeps as one; keys have no bias, and zeros stand in its place.
        weights_of, biases_of = (tensor(f"{source}/{part}").chunk(len(names)) for part in ("weight", "bias"))
        for name, weight, bias in zip(names, weights_of, biases_of, strict=True):
            weights[f"{target}.{name}_proj.weight"] = weight.clone()
            if name != "k":
                weights[f"{target}.{name}_proj.bias"] = bias.clone()
            elif bias.any():
                raise ConversionError(f"{source} has a bias of keys, which Whisper has not")

    for number in (1, 2):
        linear(f"model.encoder.conv{number}", f"encoder/conv{number}")
    for side in ("encoder", "decoder"):
        norm(f"model.{side}.layer_norm", f"{side}/layer_norm")
        for layer in range(_layers(variables, side)):
            target, source = f"model.{side}.layers.{layer}", f"{side}/layer_{layer}"
            fused(f"{target}.self_attn", f"{source}/self_attention/linear_0", "qkv")
            linear(f"{target}.self_attn.out_proj", f"{source}/self_attention/linear_1")
            norm(f"{target}.self_attn_layer_norm", f"{source}/self_attention/layer_norm")
            linear(f"{target}.fc1", f"{source}/ffn/linear_0")
            linear(f"{target}.fc2", f"{source}/ffn/linear_1")
            norm(f"{target}.final_layer_norm", f"{source}/ffn/layer_norm")
            if side == "decoder":
                fused(f"{target}.encoder_attn", f"{source}/attention/linear_0", "q")
                fused(f"{target}.encoder_attn", f"{source}/attention/linear_1", "kv")
                linear(f"{target}.encoder_attn.out_proj", f"{source}/attention/linear_2")
                norm(f"{target}.encoder_attn_layer_norm", f"{source}/attention/layer_norm")
    return weights
