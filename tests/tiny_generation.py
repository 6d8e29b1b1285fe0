"""Random generating models small enough for a test, rows for them, and a greedy loop that shares no code with ours."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    M2M100Config,
    M2M100ForConditionalGeneration,
    MBartConfig,
    MBartForConditionalGeneration,
    MoonshineConfig,
    MoonshineForConditionalGeneration,
    SeamlessM4TConfig,
    SeamlessM4TForSpeechToText,
    SeamlessM4Tv2Config,
    SeamlessM4Tv2ForSpeechToText,
    Speech2TextConfig,
    Speech2TextForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

Tensors = dict[str, Tensor]
VOCABULARY = 24
MAX_NEW = 10
BART_LIKE: dict[str, Any] = dict(
    vocab_size=VOCABULARY,
    d_model=16,
    encoder_layers=1,
    decoder_layers=1,
    encoder_attention_heads=2,
    decoder_attention_heads=2,
    encoder_ffn_dim=16,
    decoder_ffn_dim=16,
    max_position_embeddings=64,
    init_std=0.6,
)
WHISPER = dict(
    vocab_size=VOCABULARY,
    num_mel_bins=4,
    max_source_positions=8,
    max_target_positions=20,
    d_model=16,
    encoder_layers=1,
    decoder_layers=1,
    encoder_attention_heads=2,
    decoder_attention_heads=2,
    encoder_ffn_dim=16,
    decoder_ffn_dim=16,
    init_std=0.6,
    pad_token_id=2,
    bos_token_id=2,
    eos_token_id=2,
    decoder_start_token_id=3,
    suppress_tokens=None,
    begin_suppress_tokens=None,
)
SEAMLESS: dict[str, Any] = dict(
    vocab_size=VOCABULARY,
    hidden_size=16,
    initializer_range=0.6,
    pad_token_id=0,
    bos_token_id=2,
    eos_token_id=3,
    decoder_start_token_id=3,
    max_position_embeddings=64,
    max_source_positions=64,
    encoder_layers=1,
    decoder_layers=1,
    encoder_attention_heads=2,
    decoder_attention_heads=2,
    encoder_ffn_dim=16,
    decoder_ffn_dim=16,
    speech_encoder_layers=1,
    speech_encoder_attention_heads=2,
    speech_encoder_intermediate_size=16,
    feature_projection_input_dim=8,
    conv_depthwise_kernel_size=3,
    num_conv_pos_embeddings=4,
    num_conv_pos_embedding_groups=2,
    adaptor_kernel_size=4,
    adaptor_stride=4,
    num_adapter_layers=1,
    adaptor_dropout=0.0,
)


def _dropout_free(config: Any) -> Any:
    for name in vars(config):
        if "dropout" in name or name.endswith("layerdrop") or name.endswith("_drop") or name.endswith("pdrop"):
            setattr(config, name, 0.0)
    return config


def whisper(seed: int = 0, **changes: Any) -> Any:
    """Multilingual: `<sot>` 3, languages 4 and 5, tasks 6 and 7, no speech 8, no timestamps 9; end and padding 2."""
    model = _made(WhisperForConditionalGeneration, WhisperConfig(**WHISPER | changes), seed)
    _generation(
        model,
        is_multilingual=True,
        lang_to_id={"<|en|>": 4, "<|fr|>": 5},
        task_to_id={"transcribe": 6, "translate": 7},
        no_timestamps_token_id=9,
        suppress_tokens=[3, 4, 5, 6, 7, 8, 9, 11],
        begin_suppress_tokens=[12],
        max_length=20,
    )
    return model


def whisper_english(seed: int = 0) -> Any:
    """English only: `<sot>` 3, no speech 8, no timestamps 9."""
    model = _made(WhisperForConditionalGeneration, WhisperConfig(**WHISPER), seed)
    _generation(model, is_multilingual=False, no_timestamps_token_id=9, suppress_tokens=[3, 8, 9], max_length=20)
    return model


def moonshine(seed: int = 0) -> Any:
    config = MoonshineConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=16,
        encoder_num_hidden_layers=1,
        decoder_num_hidden_layers=1,
        encoder_num_attention_heads=2,
        decoder_num_attention_heads=2,
        max_position_embeddings=32,
        initializer_range=0.6,
    )
    return _made(MoonshineForConditionalGeneration, config, seed)


def speech2text(seed: int = 0) -> Any:
    config = Speech2TextConfig(
        vocab_size=VOCABULARY,
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        conv_channels=16,
        num_conv_layers=2,
        input_feat_per_channel=8,
        max_source_positions=64,
        max_target_positions=64,
        init_std=0.6,
        pad_token_id=1,
        bos_token_id=0,
        eos_token_id=2,
        decoder_start_token_id=2,
    )
    return _made(Speech2TextForConditionalGeneration, config, seed)


def seamless(seed: int = 0) -> Any:
    model = _made(SeamlessM4TForSpeechToText, SeamlessM4TConfig(**SEAMLESS), seed)
    _generation(model, text_decoder_lang_to_code_id={"eng": 5, "fra": 6})
    return model


def seamless_v2(seed: int = 0) -> Any:
    model = _made(SeamlessM4Tv2ForSpeechToText, SeamlessM4Tv2Config(**SEAMLESS), seed)
    _generation(model, text_decoder_lang_to_code_id={"eng": 5, "fra": 6})
    return model


def t5(seed: int = 0, **changes: Any) -> Any:
    config = T5Config(
        **dict(
            vocab_size=VOCABULARY,
            d_model=16,
            d_kv=8,
            d_ff=16,
            num_layers=1,
            num_heads=2,
            relative_attention_num_buckets=8,
            initializer_factor=3.0,
            pad_token_id=0,
            eos_token_id=1,
            decoder_start_token_id=0,
        )
        | changes
    )
    return _made(T5ForConditionalGeneration, config, seed, ends=6.0)


def bart(seed: int = 0) -> Any:
    """Generation is forced to begin with `<s>`, id 0, and to end with `</s>` where it is cut off."""
    model = _made(BartForConditionalGeneration, BartConfig(**BART_LIKE), seed)
    _generation(model, forced_bos_token_id=0, forced_eos_token_id=2)
    return model


def mbart(seed: int = 0, *, start: int = 2) -> Any:
    """mBART-50 starts with `</s>`, id 2; mBART-25 with the language itself."""
    config = MBartConfig(**BART_LIKE, pad_token_id=1, eos_token_id=2, bos_token_id=0, decoder_start_token_id=start)
    model = _made(MBartForConditionalGeneration, config, seed)
    if start == 2:
        _generation(model, forced_bos_token_id=5)
    return model


def mbart_25(seed: int = 0) -> Any:
    return mbart(seed, start=5)


def m2m100(seed: int = 0) -> Any:
    model = _made(M2M100ForConditionalGeneration, M2M100Config(**BART_LIKE), seed)
    _generation(model, forced_bos_token_id=5)
    return model


def gpt2(seed: int = 0) -> Any:
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=32,
        n_embd=16,
        n_layer=1,
        n_head=2,
        initializer_range=0.6,
        bos_token_id=2,
        eos_token_id=2,
        pad_token_id=2,
    )
    return _made(GPT2LMHeadModel, config, seed)


def llama(seed: int = 0) -> Any:
    """Two ids end a text, as in Llama 3's chats; there is no padding id."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=32,
        initializer_range=0.6,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = _made(LlamaForCausalLM, config, seed)
    _generation(model, eos_token_id=[2, 3])
    return model


def _made(kind: Any, config: Any, seed: int, *, ends: float = 1.3) -> Any:
    torch.manual_seed(seed)
    model = kind(_dropout_free(config)).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Biases of random models are zero, and a mistake in padding would not show.
            if name.endswith("bias"):
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
        # Random models rarely come to an end; these do, at various lengths.
        model.get_output_embeddings().weight[config.eos_token_id] = ends * torch.randn(16, generator=generator)
    return model


def _generation(model: Any, **values: Any) -> None:
    config = GenerationConfig.from_model_config(model.config)
    for name, value in values.items():
        setattr(config, name, value)
    model.generation_config = config


@dataclass(frozen=True)
class Head:
    """One golden test: a model, what its decoder starts with, and what its own loss expects around the text."""

    make: Callable[[int], Any]
    seed: int
    kind: str
    """text, features, whisper, values or causal."""
    prompt: list[int] = field(default_factory=list)
    """What the decoder reads before the first token that the teacher chooses."""
    before: list[int] = field(default_factory=list)
    """Target tokens before the text."""
    after: list[int] = field(default_factory=list)
    """Target tokens behind the end."""
    eos: tuple[int, ...] = (2,)
    options: dict[str, Any] = field(default_factory=dict)
    suppressed: tuple[int, ...] = ()
    suppressed_first: tuple[int, ...] = ()


HEADS: dict[str, Head] = {
    "whisper": Head(
        whisper,
        0,
        "whisper",
        prompt=[3, 5, 6, 9],
        before=[5, 6, 9],
        options={"language": "fr"},
        suppressed=(3, 4, 5, 6, 7, 8, 9, 11),
        suppressed_first=(12,),
    ),
    "whisper-english": Head(whisper_english, 3, "whisper", prompt=[3, 9], before=[9], suppressed=(3, 8, 9)),
    "moonshine": Head(moonshine, 12, "values", prompt=[1]),
    "speech2text": Head(speech2text, 58, "features", prompt=[2]),
    "seamless": Head(seamless, 110, "features", prompt=[3, 6], before=[6], eos=(3,), options={"language": "fra"}),
    "seamless-v2": Head(seamless_v2, 53, "features", prompt=[3, 6], before=[6], eos=(3,), options={"language": "fra"}),
    "t5": Head(t5, 95, "text", prompt=[0], eos=(1,)),
    "bart": Head(bart, 31, "text", prompt=[2, 0], before=[0]),
    "mbart-50": Head(mbart, 34, "text", prompt=[2, 5], before=[5]),
    "mbart-25": Head(mbart_25, 10, "text", prompt=[5], after=[5]),
    "m2m100": Head(m2m100, 36, "text", prompt=[2, 5], before=[5]),
    "gpt2": Head(gpt2, 5, "causal"),
    "llama": Head(llama, 0, "causal", eos=(2, 3)),
}


def rows_for(kind: str, count: int = 6, seed: int = 1) -> list[Tensors]:
    """Rows of unlike lengths, each as a batch of one without padding; none of their tokens is a special id."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for row in range(count):
        if kind == "whisper":
            rows.append({"input_features": 2 * torch.randn(1, 4, 16, generator=generator)})
            continue
        length = 3 + (5 * row) % 7
        if kind in ("text", "causal"):
            name, values = "input_ids", torch.randint(10, VOCABULARY, (1, length), generator=generator)
        elif kind == "values":
            length = 800 + 400 * length
            name, values = "input_values", torch.randn(1, length, generator=generator)
        else:
            length *= 5
            name, values = "input_features", 2 * torch.randn(1, length, 8, generator=generator)
        rows.append({name: values, "attention_mask": torch.ones(1, length, dtype=torch.long)})
    return rows


def batch_of(rows: list[Tensors], *, side: str = "right", filler: float = 0) -> Tensors:
    """Rows padded to the longest with `filler`."""
    batch = {}
    for name in rows[0]:
        values = [row[name][0] for row in rows]
        longest = max(len(value) for value in values)
        padded = []
        for value in values:
            extra = torch.full((longest - len(value), *value.shape[1:]), 0 if "mask" in name else filler)
            parts = [value, extra.to(value.dtype)]
            padded.append(torch.cat(parts if side == "right" else parts[::-1]))
        batch[name] = torch.stack(padded)
    return batch


@torch.no_grad()
def greedy(head: Head, model: Any, row: Tensors, *, max_new: int = MAX_NEW) -> tuple[list[int], bool, float]:
    """The tokens that a plain loop without cache chooses, whether it came to an end, their mean log-probability."""
    causal = head.kind == "causal"
    tokens = row["input_ids"][0].tolist() if causal else list(head.prompt)
    chosen: list[int] = []
    total = 0.0
    while len(chosen) < max_new:
        read = torch.tensor([tokens + chosen])
        inputs = {"input_ids": read} if causal else {**row, "decoder_input_ids": read}
        logits = model(**inputs, use_cache=False).logits[0, -1]
        allowed = logits.clone()
        allowed[list(head.suppressed)] = -torch.inf
        if not chosen:
            allowed[list(head.suppressed_first)] = -torch.inf
        token = int(allowed.argmax())
        total += float(logits.log_softmax(-1)[token])
        chosen.append(token)
        if token in head.eos:
            return chosen, True, total / len(chosen)
    return chosen, False, total / len(chosen)
