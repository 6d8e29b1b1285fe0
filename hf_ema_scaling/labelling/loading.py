"""Models that label, from a folder, from the Hub, or at hand."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoProcessor, AutoTokenizer
from transformers.utils import logging

from hf_ema_scaling.labelling.heads import SOURCE, SPEECH, Head
from hf_ema_scaling.labelling.kinds import build_head, kind_of, unknown


def load_head(
    name: str,
    *,
    device: str | None = None,
    dtype: str = "float32",
    source_language: str | None = None,
    prefix: str = "",
    **options: Any,
) -> Head:
    """The model in a folder (such as `run/ema`) or on the Hub, with its processor or tokenizer.

    Args:
        name: of the folder or repository.
        device: where it runs; a GPU if there is one when None.
        dtype: `float32`, `bfloat16` or `float16`.
        source_language: of texts to translate, where the tokenizer knows several: its own code. None for that with
            which the tokenizer was saved.
        prefix: as in `head_of`.
        **options: as in `head_of`.

    Raises:
        NotImplementedError: for heads that cannot label a data set.
        ValueError: as `head_of`; for a source language where there is nothing to translate.
        OSError: when there is no such model.
    """
    architecture = next(iter(AutoConfig.from_pretrained(name).architectures or []), "")
    kind, made = kind_of(architecture), getattr(transformers, architecture, None)
    if kind is None or made is None:
        raise unknown(architecture)
    languages = {} if source_language is None else {"src_lang": source_language}
    if languages and kind != SOURCE:
        raise ValueError(f"source_language={source_language!r} is for models that translate, {architecture} is none")
    auto = AutoProcessor if kind == SPEECH else AutoTokenizer
    with _quiet_unless_terminal():
        model = made.from_pretrained(name, dtype=getattr(torch, dtype))
    place = device or ("cuda" if torch.cuda.is_available() else "cpu")
    head = head_of(model.to(place), auto.from_pretrained(name, **languages), prefix=prefix, **options)
    settings = {**head.settings, **({} if source_language is None else {"source_language": source_language})}
    return replace(head, name=name, settings=settings)


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


def head_of(model: nn.Module, processing_class: Any, *, prefix: str = "", **options: Any) -> Head:
    """The head of a loaded model, which is put in eval mode.

    Args:
        model: of transformers.
        processing_class: its processor or tokenizer.
        prefix: what is written before each text to translate, to summarise or to continue.
        **options: of the labels, as far as the head has them; those that are None are left out. Of texts that are
            written (Whisper and other encoder-decoders, causal language models): `language`, `task` (of None what
            `generation_config` says), `max_new_tokens`, `num_beams`, `temperature`, `top_k`, `top_p`, `seed`, as in
            `generative_labeler_for`; draws are seeded by the row's number. `temperature` of a class, `thresholds` of
            any number of classes.

    Raises:
        NotImplementedError: for heads that cannot label a data set.
        ValueError: for an option that this head does not have, or a value of one that does not fit.
    """
    model.eval()
    given = {name: value for name, value in options.items() if value is not None}
    return build_head(model, processing_class, prefix, given)
