"""The kinds of heads that label data sets: their labelers, and how their labels read."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from datasets import List, Value
from torch import nn
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_CTC_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES,
    MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
)

from hf_ema_scaling.labelling.heads import PROMPT, SOURCE, SPEECH, TEXT, WORDS, Column, Head
from hf_ema_scaling.labels import PseudoLabel, generative_labeler_for, labeler_for
from hf_ema_scaling.labels.decoder import TRANSDUCERS, is_encoder_decoder
from hf_ema_scaling.labels.sequence import ClassLabeler, MultiLabelLabeler, RegressionLabeler
from hf_ema_scaling.labels.tokens import TokenLabeler
from hf_ema_scaling.spans import spans

WRITING_SPEECH = frozenset(
    {
        "WhisperForConditionalGeneration",
        "MoonshineForConditionalGeneration",
        "Speech2TextForConditionalGeneration",
        "SeamlessM4TForSpeechToText",
        "SeamlessM4Tv2ForSpeechToText",
    }
)
"""Encoder-decoders for speech whose labels are tested; audio language models read a prompt as well."""
WRITING = ("language", "task", "max_new_tokens", "num_beams", "temperature", "top_k", "top_p", "seed")
"""Options of labels that are written token by token."""


def build_head(model: nn.Module, processing_class: Any, prefix: str, options: Mapping[str, Any]) -> Head:
    """As `head_of`, for a model in eval mode and options that are not None."""
    architecture = type(model).__name__
    kind = kind_of(architecture)
    if kind is None or (kind in (SPEECH, SOURCE) and _writes(architecture) and not is_encoder_decoder(model)):
        raise unknown(architecture)
    if prefix and kind not in (SOURCE, PROMPT):
        raise ValueError(f"prefix={prefix!r} is for models that write texts of texts, and {architecture} is none")
    builders: dict[str, Callable[..., Head]] = {
        SPEECH: _writing if _writes(architecture) else _speech,
        TEXT: _classes,
        WORDS: _words,
        SOURCE: _writing,
        PROMPT: _writing,
    }
    return builders[kind](model, processing_class, kind=kind, options=options, prefix=prefix)


def kind_of(architecture: str) -> str | None:
    """What models of a class read; None for a class that labels no data sets."""
    speech = {*MODEL_FOR_CTC_MAPPING_NAMES.values(), *TRANSDUCERS, *WRITING_SPEECH}
    others = set(MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES.values()) - WRITING_SPEECH
    kinds: list[tuple[str, Collection[str]]] = [
        (SPEECH, speech),
        (TEXT, MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES.values()),
        (WORDS, MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES.values()),
        (SOURCE, set(MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES.values()) - others),
        (PROMPT, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()),
    ]
    return next((kind for kind, names in kinds if architecture in names), None)


def unknown(architecture: str) -> NotImplementedError:
    """The error for a class that labels no data sets."""
    return NotImplementedError(
        f"{architecture or 'a model without architectures in its configuration'} labels no data sets yet: CTC models, "
        f"transducers, {', '.join(sorted(WRITING_SPEECH))}, classifiers of texts and of words, encoder-decoders of "
        "texts and causal language models do"
    )


def _writes(architecture: str) -> bool:
    return architecture in WRITING_SPEECH or architecture in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES.values()


def _known(model: nn.Module, options: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """The options, if the head has them."""
    strange = sorted(set(options) - set(names))
    if strange:
        has = f"it has {', '.join(names)}" if names else "it has none"
        raise ValueError(f"labels of {type(model).__name__} have no option {', '.join(strange)}: {has}")
    return dict(options)


def _tokenizer(processing_class: Any) -> Any:
    return getattr(processing_class, "tokenizer", processing_class)


def _speech(model: nn.Module, processing_class: Any, *, kind: str, options: Mapping[str, Any], prefix: str) -> Head:
    """CTC heads and transducers."""
    _known(model, options, ())
    decode = _tokenizer(processing_class).decode

    def text(ids: Sequence[int]) -> str:
        # Repeats are merged already: once more, and doubled letters would vanish.
        return str(decode(list(ids), group_tokens=False))

    labeler = labeler_for(model, processing_class)
    return Head(model, processing_class, labeler, kind, lambda label: text(label.ids), text=text)


def _writing(model: Any, processing_class: Any, *, kind: str, options: Mapping[str, Any], prefix: str) -> Head:
    """Encoder-decoders and causal language models."""
    names = WRITING if kind != PROMPT else WRITING[2:]
    settings = _known(model, options, names)
    if str(model.config.model_type) == "whisper" and getattr(model.generation_config, "is_multilingual", False):
        # What training has told generation to write, see `recipe.generating.labeler_of`.
        said = {name: getattr(model.generation_config, name, None) for name in ("language", "task")}
        settings = {name: value for name, value in said.items() if value is not None} | settings
    labeler = generative_labeler_for(model, processing_class, **settings)
    decode = _tokenizer(processing_class).decode

    def text(ids: Sequence[int]) -> str:
        found = str(decode(list(ids), skip_special_tokens=True))
        # A completion goes on where its prompt ends, with a space or without.
        return found if kind == PROMPT else found.strip()

    settings |= {"prefix": prefix} if prefix else {}
    return Head(
        *(model, processing_class, labeler, kind, lambda label: text(label.ids)),
        text=text,
        prefix=prefix,
        settings=settings,
    )


def _classes(model: Any, processing_class: Any, *, kind: str, options: Mapping[str, Any], prefix: str) -> Head:
    """Classifiers of texts: one class, any number of them, or numbers."""
    config = model.config
    problem = config.problem_type or ("regression" if config.num_labels == 1 else "single_label_classification")
    names: Mapping[int, str] = config.id2label
    if problem == "regression":
        _known(model, options, ())
        numbers = RegressionLabeler(config.num_labels)
        return Head(model, processing_class, numbers, kind, lambda label: _numbers(label.values))
    if problem == "multi_label_classification":
        settings = _known(model, options, ("thresholds",))
        several = MultiLabelLabeler(config.num_labels, soft=True, **settings)

        def chosen(label: PseudoLabel) -> list[str]:
            return [str(names[index]) for index in label.ids]

        return Head(
            *(model, processing_class, several, kind, lambda label: json.dumps(chosen(label), ensure_ascii=False)),
            columns={"classes": Column(List(Value("string")), chosen)},
            settings=settings,
        )
    settings = _known(model, options, ("temperature",))
    # Checkpoints of one label per text often leave problem_type out.
    one = ClassLabeler(config.num_labels, soft=True, **settings)
    return Head(
        *(model, processing_class, one, kind, lambda label: str(names[label.ids[0]])),
        settings=settings,
    )


def _numbers(values: Sequence[float]) -> str:
    """One number, or several with spaces between; as few digits as tell float32 numbers apart."""
    return " ".join(f"{value:.9g}" for value in values)


def _words(model: Any, processing_class: Any, *, kind: str, options: Mapping[str, Any], prefix: str) -> Head:
    """Classifiers of words: a tag for each, and where tags are BIO the spans."""
    _known(model, options, ())
    labeler = TokenLabeler(model.config.id2label)

    def tags(label: PseudoLabel) -> list[str]:
        return [labeler.names[index] for index in label.ids]

    def found(label: PseudoLabel) -> list[dict[str, Any]]:
        return [{"type": name, "start": start, "end": end} for name, start, end in spans(tags(label))]

    columns = {"tags": Column(List(Value("string")), tags)}
    if labeler.bio:
        feature = List({"type": Value("string"), "start": Value("int64"), "end": Value("int64")})
        columns["spans"] = Column(feature, found)
    return Head(
        *(model, processing_class, labeler, kind, lambda label: " ".join(tags(label))),
        columns=columns,
    )
