"""Whisper out of CTranslate2's format: the same bits, and clear words for what is something else."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from ctranslate2_files import variables_of, whisper, written

from hf_ema_scaling.data.ctranslate2 import ConversionError, read_variables, whisper_from_variables

SETTINGS = {"suppress_ids": [3, 5], "suppress_ids_begin": [7], "alignment_heads": [[0, 0]]}


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
