"""Every CTC head of transformers as a tiny random model, and inputs for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor

SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
WAVE = {
    **SIZES,
    "vocab_size": 12,
    "pad_token_id": 0,
    "conv_dim": (8, 8, 8),
    "conv_kernel": (10, 3, 2),
    "conv_stride": (5, 2, 2),
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
    "feat_extract_norm": "layer",
    "do_stable_layer_norm": True,
}


def wave(name: str, **changes: Any) -> tuple[Callable[[], Any], str]:
    config = getattr(transformers, f"{name}Config")
    model = getattr(transformers, f"{name}ForCTC")
    return lambda: model(config(**{**WAVE, **changes})).eval(), "input_values"


def encoder(name: str, **changes: Any) -> tuple[Callable[[], Any], str]:
    encoder_config = getattr(transformers, f"{name}EncoderConfig")
    config, model = getattr(transformers, f"{name}CTCConfig"), getattr(transformers, f"{name}ForCTC")
    parts = {**SIZES, "num_mel_bins": 16, **changes}
    return (
        lambda: model(config(vocab_size=12, pad_token_id=0, encoder_config=encoder_config(**parts))).eval(),
        "input_features",
    )


def wav2vec2_bert(adapter: bool) -> Any:
    parts = {**SIZES, "vocab_size": 12, "pad_token_id": 0, "feature_projection_input_dim": 16, "add_adapter": adapter}
    config = transformers.Wav2Vec2BertConfig(**parts, output_hidden_size=16, conv_depthwise_kernel_size=3)
    return transformers.Wav2Vec2BertForCTC(config).eval()


MODELS: dict[str, tuple[Callable[[], Any], str]] = {
    "wav2vec2": wave("Wav2Vec2"),
    "wav2vec2-adapter": wave("Wav2Vec2", add_adapter=True, num_adapter_layers=1, output_hidden_size=16),
    "wav2vec2-conformer": wave("Wav2Vec2Conformer", conv_depthwise_kernel_size=3),
    "wav2vec2-group-norm": wave("Wav2Vec2", feat_extract_norm="group", do_stable_layer_norm=False),
    "wav2vec2-bert": (lambda: wav2vec2_bert(False), "input_features"),
    "wav2vec2-bert-adapter": (lambda: wav2vec2_bert(True), "input_features"),
    "hubert": wave("Hubert"),
    "wavlm": wave("WavLM"),
    "data2vec-audio": wave("Data2VecAudio", conv_pos_kernel_size=3),
    "unispeech": wave("UniSpeech"),
    "unispeech-sat": wave("UniSpeechSat"),
    "sew": wave("SEW", squeeze_factor=2),
    "sew-d": wave("SEWD", squeeze_factor=2),
    "parakeet": encoder("Parakeet", subsampling_conv_channels=4, conv_kernel_size=3),
    "lasr": encoder("Lasr", subsampling_conv_channels=4, conv_kernel_size=3),
    "granite-speech5": encoder(
        "GraniteSpeech5", vocab_size=12, num_mel_bins=4, num_hidden_layers=2, conv_kernel_size=3
    ),
}


def utterances(name: str, sizes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    if name == "input_values":
        return [torch.randn(size * 16 + size % 7, generator=generator) for size in sizes]
    return [torch.randn(size, 16, generator=generator) for size in sizes]


def padded(name: str, rows: list[Tensor]) -> dict[str, Tensor]:
    lengths = torch.tensor([len(row) for row in rows])
    inputs = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    return {name: inputs, "attention_mask": (torch.arange(inputs.shape[1])[None] < lengths[:, None]).long()}


def talkative(model: Any) -> Any:
    """The model with an output layer that says more than blanks: large weights, blanks made rare."""
    head = getattr(model, "lm_head", None) or model.ctc_head
    with torch.no_grad():
        head.weight.mul_(1 / head.weight.std())
        head.bias[0] = -1.0
    return model
