"""Every kind of head that labels data sets: a tiny random model with what prepares its rows, rows, and a row alone."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import ctc_models
import numpy as np
import tiny_generation
import tiny_whisper
import torch
import transducers
from label_inputs import RATE, speech_model, speech_rows
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertForTokenClassification,
    PreTrainedTokenizerFast,
    SeamlessM4TFeatureExtractor,
    Speech2TextFeatureExtractor,
    Wav2Vec2FeatureExtractor,
)

from hf_ema_scaling.data.text import build_word_tokenizer
from hf_ema_scaling.labelling import Head, head_of

Row = dict[str, Any]
TEXTS = ["abba", "cab cab", "a", "badge fad", "k", "head", "jab hijack", "b a"]
SENTENCES = ["a good film", "bad", "very very long words a film", "good words", "a", "film film film bad"]
TAGS = {0: "O", 1: "B-x", 2: "I-x", 3: "B-y", 4: "I-y"}
SIZES: dict[str, Any] = {
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 8,
    "max_position_embeddings": 16,
    "initializer_range": 1.0,
}


@dataclass(frozen=True)
class Case:
    """One kind of head."""

    make: Callable[[], Head]
    rows: Callable[[], list[Row]]
    alone: Callable[[Head, Row], dict[str, Tensor]]
    """What the model reads of one row, made without the code under test."""


def letters(eos: int, pad: int | None, *, behind: bool = True) -> PreTrainedTokenizerFast:
    """A token per letter for models of `tiny_generation`: ids 10 to 23 are a blank and the letters a to m."""
    names = [f"<{index}>" for index in range(10)] + list("▁abcdefghijklm")
    unknown = 7
    backend = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, [], unk_token=names[unknown]))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    backend.decoder = decoders.Metaspace(prepend_scheme="never")
    if behind:
        backend.post_processor = processors.TemplateProcessing(
            single=f"$A {names[eos]}", special_tokens=[(names[eos], eos)]
        )
    padding = {} if pad is None else {"pad_token": names[pad]}
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token=names[unknown],
        eos_token=names[eos],
        additional_special_tokens=[names[5], names[6]],
        model_input_names=["input_ids", "attention_mask"],
        **padding,
    )


def waves(seed: int = 0) -> list[Row]:
    return speech_rows(7)[seed:]


def wave(row: Row) -> np.ndarray:
    return np.asarray(row["audio"]["array"], dtype=np.float32)


def heard(head: Head, row: Row) -> dict[str, Tensor]:
    """As the feature extractor makes it."""
    extractor = head.processing_class.feature_extractor
    made = extractor(wave(row), sampling_rate=RATE, return_tensors="pt", return_attention_mask=True)
    if type(extractor).__name__ == "WhisperFeatureExtractor":
        return {"input_features": made["input_features"]}
    return dict(made)


def read(head: Head, row: Row) -> dict[str, Tensor]:
    """As the tokenizer makes it."""
    [text] = [value for name, value in row.items() if name != "id"]
    made = head.processing_class([head.prefix + text], return_tensors="pt")
    return {name: made[name] for name in ("input_ids", "attention_mask")}


def begun(head: Head, row: Row) -> dict[str, Tensor]:
    """A prompt, without an end."""
    made = head.processing_class([row["prompt"]], return_tensors="pt", add_special_tokens=False)
    return {name: made[name] for name in ("input_ids", "attention_mask")}


def tagged(head: Head, row: Row) -> dict[str, Tensor]:
    """Words, each of one token, between two special ones."""
    made = head.processing_class([" ".join(row["tokens"])], return_tensors="pt")
    return {**made, "word_ids": torch.tensor([[-1, *range(len(row["tokens"])), -1]])}


@functools.cache
def ctc() -> Head:
    return head_of(*speech_model())


def any_ctc(name: str) -> Head:
    """A head of `ctc_models`, with features of its kind and ids for text."""
    torch.manual_seed(0)
    make, reads = ctc_models.MODELS[name]
    extractor = (
        Speech2TextFeatureExtractor(feature_size=16, num_mel_bins=16) if reads == "input_features" else _samples()
    )
    tokenizer = SimpleNamespace(decode=lambda ids, group_tokens: " ".join(map(str, ids)))
    return head_of(ctc_models.talkative(make()), SimpleNamespace(feature_extractor=extractor, tokenizer=tokenizer))


def transducer(name: str) -> Head:
    extractor = Speech2TextFeatureExtractor(feature_size=8, num_mel_bins=8)
    tokenizer = SimpleNamespace(decode=lambda ids, group_tokens: " ".join(map(str, ids)))
    processor = SimpleNamespace(feature_extractor=extractor, tokenizer=tokenizer)
    return head_of(transducers.build(name, {"tdt": 2}.get(name, 0)), processor)


WEIGHTS = {"t5": 5, "bart": 10, "mbart-50": 2, "mbart-25": 2, "m2m100": 11, "gpt2": 1, "moonshine": 2}
"""Seeds of models whose labels of these rows differ, and of which some come to an end."""


def writing(name: str, extractor: Any = None, **options: Any) -> Head:
    """A model of `tiny_generation` with letters; for speech with a feature extractor."""
    head = tiny_generation.HEADS[name]
    seed = WEIGHTS.get(name, head.seed)
    eos = head.eos[0]
    pad = {"t5": 0, "gpt2": None, "llama": None}.get(name, 1)
    tokenizer = letters(eos, pad, behind=head.kind != "causal")
    processing = tokenizer if extractor is None else SimpleNamespace(feature_extractor=extractor, tokenizer=tokenizer)
    return head_of(head.make(seed), processing, **{"max_new_tokens": 8, **head.options, **options})


def whisper(**options: Any) -> Head:
    model = tiny_generation.whisper(3, max_source_positions=50 * tiny_whisper.WINDOW)
    processor = SimpleNamespace(feature_extractor=tiny_whisper.extractor(), tokenizer=letters(2, 2))
    return head_of(model, processor, **{"max_new_tokens": 8, **options})


def classifier(problem: str | None, outputs: int, seed: int = 0) -> Head:
    torch.manual_seed(seed)
    tokenizer = build_word_tokenizer(SENTENCES)
    names = {index: ("neg", "pos", "none")[index] for index in range(outputs)}
    config = BertConfig(vocab_size=len(tokenizer), **SIZES, id2label=names, problem_type=problem)
    return head_of(BertForSequenceClassification(config), tokenizer)


def tagger() -> Head:
    torch.manual_seed(0)
    tokenizer = build_word_tokenizer(SENTENCES)
    config = BertConfig(vocab_size=len(tokenizer), **SIZES, id2label=TAGS)
    return head_of(BertForTokenClassification(config), tokenizer)


def column(name: str, values: list[Any]) -> Callable[[], list[Row]]:
    return lambda: [{name: value, "id": f"u{number}"} for number, value in enumerate(values)]


def _mel() -> Speech2TextFeatureExtractor:
    return Speech2TextFeatureExtractor(feature_size=8, num_mel_bins=8)


def _stacked() -> SeamlessM4TFeatureExtractor:
    return SeamlessM4TFeatureExtractor(feature_size=4, num_mel_bins=4, stride=2)


def _samples() -> Wav2Vec2FeatureExtractor:
    return Wav2Vec2FeatureExtractor(return_attention_mask=True)


def case(make: Callable[[], Head], rows: Callable[[], list[Row]], alone: Callable[[Head, Row], Any]) -> Case:
    return Case(functools.cache(make), rows, alone)


CASES: dict[str, Case] = {
    "ctc": case(ctc, waves, heard),
    "rnnt": case(lambda: transducer("rnnt"), waves, heard),
    "tdt": case(lambda: transducer("tdt"), waves, heard),
    "whisper": case(lambda: whisper(language="fr", task="translate"), waves, heard),
    "whisper-any-language": case(whisper, waves, heard),
    "moonshine": case(lambda: writing("moonshine", _samples()), waves, heard),
    "speech2text": case(lambda: writing("speech2text", _mel()), waves, heard),
    "seamless": case(lambda: writing("seamless", _stacked()), waves, heard),
    "seamless-v2": case(lambda: writing("seamless-v2", _stacked()), waves, heard),
    "one-class": case(lambda: classifier(None, 3), column("text", SENTENCES), read),
    "several-classes": case(lambda: classifier("multi_label_classification", 3, 1), column("text", SENTENCES), read),
    "regression": case(lambda: classifier("regression", 2), column("text", SENTENCES), read),
    "words": case(tagger, column("tokens", [text.split() for text in SENTENCES]), tagged),
    "t5": case(lambda: writing("t5", prefix="fed: "), column("source", TEXTS), read),
    "bart": case(lambda: writing("bart"), column("source", TEXTS), read),
    "mbart-50": case(lambda: writing("mbart-50"), column("source", TEXTS), read),
    "mbart-25": case(lambda: writing("mbart-25"), column("source", TEXTS), read),
    "m2m100": case(lambda: writing("m2m100"), column("source", TEXTS), read),
    "gpt2": case(lambda: writing("gpt2"), column("prompt", TEXTS), begun),
    "llama": case(lambda: writing("llama"), column("prompt", TEXTS), begun),
    "gpt2-drawn": case(lambda: writing("gpt2", temperature=1.5, seed=3), column("prompt", TEXTS), begun),
}
