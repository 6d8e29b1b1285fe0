"""The labeler of a model, by the kind of its head."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

from torch import nn
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_CTC_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES,
    MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
)

from hf_ema_scaling.ema.adapters import base_of
from hf_ema_scaling.ema.sharding import class_of
from hf_ema_scaling.labels.base import Labeler, LabelKind, kind_of
from hf_ema_scaling.labels.ctc import CTCLabeler, blank_id, non_target_ids
from hf_ema_scaling.labels.decoder import TRANSDUCERS
from hf_ema_scaling.labels.generative import generative_labeler_for
from hf_ema_scaling.labels.sequence import ClassLabeler, MultiLabelLabeler, RegressionLabeler
from hf_ema_scaling.labels.tokens import TokenLabeler
from hf_ema_scaling.labels.transducer import TransducerLabeler


def ctc_labeler(config: Any, processing_class: Any, **options: Any) -> CTCLabeler:
    """For CTC heads; bos, eos and unk of the tokenizer are never targets."""
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    blank = blank_id(config)
    special = set() if tokenizer is None else set(non_target_ids(tokenizer)) - {blank}
    return CTCLabeler(blank, **{"special_ids": sorted(special), **options})


def transducer_labeler(config: Any, processing_class: Any, **options: Any) -> TransducerLabeler:
    """For transducers; bos, eos and unk of the tokenizer are never targets."""
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    special = set() if tokenizer is None else set(non_target_ids(tokenizer))
    return TransducerLabeler(config.blank_token_id, **{"special_ids": sorted(special), **options})


def sequence_labeler(config: Any, processing_class: Any, **options: Any) -> Labeler:
    """For heads that classify sequences, by `config.problem_type`.

    Raises:
        ValueError: when `problem_type` is None and there are several outputs.
    """
    outputs = int(config.num_labels)
    problem = config.problem_type or ("regression" if outputs == 1 else None)
    if problem is None:
        raise ValueError(
            f"{type(config).__name__}.problem_type is None, so what {outputs} outputs mean is only known from labels, "
            "and unlabelled data has none: set it to single_label_classification, multi_label_classification or "
            "regression"
        )
    kinds: dict[str, Callable[..., Labeler]] = {
        "single_label_classification": ClassLabeler,
        "multi_label_classification": MultiLabelLabeler,
        "regression": RegressionLabeler,
    }
    return kinds[problem](outputs, **options)


def token_labeler(config: Any, processing_class: Any, **options: Any) -> TokenLabeler:
    """For heads that classify tokens; the names of the classes are those of the config."""
    return TokenLabeler(config.id2label, **options)


def label_kind(model: nn.Module, labeler: Labeler) -> LabelKind | None:
    """What labels say: by the labeler, else for sequence classifiers by the model; None where nobody knows."""
    kind = kind_of(labeler)
    if kind is not None or class_of(base_of(model)).__name__ not in SEQUENCE_HEADS:
        return kind
    config: Any = model.config
    kinds = {
        "single_label_classification": LabelKind.CLASS,
        "multi_label_classification": LabelKind.CLASSES,
        "regression": LabelKind.NUMBERS,
    }
    # As transformers infers it from labels that are class ids.
    return kinds[config.problem_type or ("regression" if config.num_labels == 1 else "single_label_classification")]


SEQUENCE_HEADS = frozenset(MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES.values())
LabelerFactory = Callable[..., Labeler]
"""`(config, processing_class, **options) -> labeler`; options are arguments of the labeler."""
HEADS: list[tuple[Collection[str], LabelerFactory]] = [
    (set(MODEL_FOR_CTC_MAPPING_NAMES.values()), ctc_labeler),
    (TRANSDUCERS, transducer_labeler),
    (SEQUENCE_HEADS, sequence_labeler),
    (set(MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES.values()), token_labeler),
]
"""Names of model classes, and what makes their labeler."""
GENERATING = {
    *MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES.values(),
    *MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES.values(),
    *MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values(),
}
"""Names of model classes whose labels are written token by token."""


def labeler_for(model: nn.Module, processing_class: Any = None, **options: Any) -> Labeler:
    """The labeler that goes with a transformers model.

    Args:
        model: a student; may be wrapped by PEFT.
        processing_class: tokenizer or processor of its data, for the ids that are never a target; may be None.
        **options: arguments of the labeler, such as `soft` and `temperature` of `ClassLabeler`.

    Raises:
        NotImplementedError: for a head without one.
        ValueError: when the config does not say enough.
        TypeError: for an option that this labeler does not have.
    """
    name = class_of(base_of(model)).__name__
    for names, factory in HEADS:
        if name in names:
            return factory(model.config, processing_class, **options)
    if name in GENERATING:
        return generative_labeler_for(model, processing_class, **options)
    raise NotImplementedError(f"no labeler is known for {name}: pass labeler= with a `Labeler` of your own")
