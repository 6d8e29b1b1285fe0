"""Which model labels, with which labeler, and how its labels are read as text."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCTC, AutoModelForSequenceClassification, AutoProcessor, AutoTokenizer
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CTC_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
)
from transformers.utils import logging

from hf_ema_scaling.labels import ClassLabeler, Labeler, PseudoLabel, labeler_for

SPEECH, TEXT = "speech", "text"


@dataclass(frozen=True)
class Head:
    """A model ready to label.

    Args:
        model: in eval mode, on its device.
        processing_class: processor or tokenizer.
        labeler: turns the model's output into labels.
        kind: `speech` or `text`, what it reads.
        decode: the text of a label.
        name: of the folder or repository it comes from.
    """

    model: nn.Module
    processing_class: Any
    labeler: Labeler
    kind: str
    decode: Callable[[PseudoLabel], str]
    name: str = ""


def load_head(name: str, *, device: str | None = None, dtype: str = "float32") -> Head:
    """The model in a folder (such as `run/ema`) or on the Hub, with its processor or tokenizer.

    Args:
        name: of the folder or repository.
        device: where it runs; a GPU if there is one when None.
        dtype: `float32`, `bfloat16` or `float16`.

    Raises:
        NotImplementedError: for heads that cannot label a data set.
        OSError: when there is no such model.
    """
    kind: Any
    processing: Any
    architecture = next(iter(AutoConfig.from_pretrained(name).architectures or []), "")
    if architecture in MODEL_FOR_CTC_MAPPING_NAMES.values():
        kind, processing = AutoModelForCTC, AutoProcessor
    elif architecture in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES.values():
        kind, processing = AutoModelForSequenceClassification, AutoTokenizer
    else:
        raise _unknown(architecture)
    with _quiet_unless_terminal():
        model = kind.from_pretrained(name, dtype=getattr(torch, dtype))
    place = device or ("cuda" if torch.cuda.is_available() else "cpu")
    return replace(head_of(model.to(place), processing.from_pretrained(name)), name=name)


@contextmanager
def _quiet_unless_terminal() -> Iterator[None]:
    """No progress bars of transformers where nobody would see them move."""
    silence = not sys.stderr.isatty() and logging.is_progress_bar_enabled()
    if silence:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        if silence:
            logging.enable_progress_bar()


def head_of(model: nn.Module, processing_class: Any) -> Head:
    """The head of a loaded model, which is put in eval mode.

    Raises:
        NotImplementedError: for heads that cannot label a data set.
    """
    model.eval()
    architecture = type(model).__name__
    if architecture in MODEL_FOR_CTC_MAPPING_NAMES.values():
        tokenizer = getattr(processing_class, "tokenizer", processing_class)

        def transcript(label: PseudoLabel) -> str:
            # Repeats are merged already: once more, and doubled letters would vanish.
            return str(tokenizer.decode(list(label.ids), group_tokens=False))

        return Head(model, processing_class, labeler_for(model, processing_class), SPEECH, transcript)
    if architecture in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES.values():
        config: Any = model.config
        if config.num_labels < 2 or config.problem_type in ("regression", "multi_label_classification"):
            raise NotImplementedError(
                f"{architecture} with problem_type {config.problem_type!r} labels no data sets yet"
            )
        names: Mapping[int, str] = config.id2label
        # Checkpoints of one label per text often leave problem_type out.
        labeler = ClassLabeler(config.num_labels, soft=True)
        return Head(model, processing_class, labeler, TEXT, lambda label: str(names[label.ids[0]]))
    raise _unknown(architecture)


def _unknown(architecture: str) -> NotImplementedError:
    return NotImplementedError(
        f"{architecture or 'a model without architectures in its configuration'} labels no data sets yet: CTC models "
        "and sequence classifiers do"
    )
