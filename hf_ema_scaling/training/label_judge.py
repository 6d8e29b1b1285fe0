"""From labels as the teacher makes them to labels that are kept or dropped: filters, and what they know of a row."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
)

from hf_ema_scaling.data.collator import MicroBatch
from hf_ema_scaling.data.streaming import is_stream
from hf_ema_scaling.ema.adapters import base_of
from hf_ema_scaling.ema.sharding import class_of
from hf_ema_scaling.labels.base import PseudoLabel
from hf_ema_scaling.labels.decoder import TRANSDUCERS
from hf_ema_scaling.labels.filter_base import SECONDS, SOURCE, TEXT, Decode, Filter, Row
from hf_ema_scaling.labels.filters import FilterChain, build_filters
from hf_ema_scaling.labels.fitting import fit_filters
from hf_ema_scaling.labels.score_filters import Confidence
from hf_ema_scaling.training.arguments import PseudoLabelArguments

FIT_ROWS = 10_000
"""Labelled rows that limits are fitted on, from the first on."""


class LabelJudge:
    """Filters labels, with the reason of the first filter that fires.

    Args:
        filters: in order.
        decode: label ids to text; None where labels are no text.
        seconds: duration of each row of the unlabelled set; None where it is not known.
        source: whether rows have `input_ids`.

    Raises:
        ValueError: for filters that ask for what is not there.
    """

    def __init__(
        self,
        filters: Iterable[Filter],
        *,
        decode: Decode | None = None,
        seconds: NDArray[np.float64] | None = None,
        source: bool = False,
    ) -> None:
        self.chain = FilterChain(filters)
        self.decode = decode
        self.seconds = seconds
        given = {TEXT: decode is not None, SECONDS: seconds is not None, SOURCE: source}
        ways_out = {
            TEXT: "the text of labels: give the trainer a processing_class that decodes them",
            SECONDS: "durations: add a column with seconds to the unlabelled set and name it by duration_column",
            SOURCE: "rows with input_ids",
        }
        for what, names in self.chain.needs.items():
            if not given[what]:
                raise ValueError(f"the filters {', '.join(names)} need {ways_out[what]}")
        self._wants_source = SOURCE in self.chain.needs

    def judge(
        self, labels: Sequence[PseudoLabel], batch: MicroBatch, ages: Callable[[Sequence[int]], NDArray[np.float64]]
    ) -> list[PseudoLabel]:
        """The labels of a batch, those that a filter drops with its reason.

        Args:
            labels: one for each row.
            batch: unlabelled rows.
            ages: reference steps from stream positions to the end of the step.
        """
        if not self.chain.filters:
            return self.chain.judge(labels, lambda number: Row(labels[number]))
        since = ages(batch["positions"]).tolist()
        sources = source_ids(batch["inputs"]) if self._wants_source else None

        def row(number: int) -> Row:
            return Row(
                labels[number],
                decode=self.decode,
                seconds=None if self.seconds is None else float(self.seconds[batch["indices"][number]]),
                source_ids=None if sources is None else sources[number],
                age=since[number],
            )

        return self.chain.judge(labels, row)


def source_ids(inputs: Mapping[str, Tensor]) -> list[list[int]]:
    """Ids of each row's input, without padding."""
    ids = inputs["input_ids"].tolist()
    mask = inputs.get("attention_mask")
    if mask is None:
        return ids
    return [
        [token for token, inside in zip(row, kept, strict=True) if inside]
        for row, kept in zip(ids, mask.tolist(), strict=True)
    ]


def judge_for(
    model: Any,
    arguments: PseudoLabelArguments,
    filters: Iterable[Filter] | None,
    *,
    ctc: bool,
    processing_class: Any,
    labelled: Any,
    unlabelled: Any,
    duration_column: str,
) -> LabelJudge:
    """The judge of a run: the filters of `arguments`, then `filters`, then `min_confidence`.

    Args:
        model: the student.
        arguments: with `filters` and `min_confidence`.
        filters: further filters.
        ctc: whether the model has a CTC head.
        processing_class: decodes labels, where they are text.
        labelled: the labelled set, for filters that are fitted.
        unlabelled: the unlabelled set.
        duration_column: column with seconds, in both sets.

    Raises:
        ValueError: for filters that cannot be built or ask for what is not there.
    """
    decode = decoder(model, processing_class, ctc=ctc)
    chosen: list[Filter] = []
    if arguments.filters is not None:

        def fit() -> dict[str, dict[str, float]]:
            return fitted(labelled, decode, duration_column)

        classes = getattr(getattr(model, "config", None), "num_labels", None)
        chosen += build_filters(arguments.filters, classes=classes, fit=fit)
    chosen += filters or []
    if arguments.min_confidence > 0:
        chosen.append(Confidence(arguments.min_confidence))
    columns = getattr(unlabelled, "column_names", None) or []
    return LabelJudge(
        chosen, decode=decode, seconds=durations(unlabelled, duration_column), source="input_ids" in columns
    )


def decoder(model: Any, processing_class: Any, *, ctc: bool) -> Decode | None:
    """Label ids to text; None without something that decodes, and for classifiers, whose labels are no text."""
    name = class_of(base_of(model)).__name__
    classifiers = (MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES, MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES)
    decode = getattr(getattr(processing_class, "tokenizer", processing_class), "decode", None)
    if decode is None or any(name in names.values() for names in classifiers):
        return None
    # Label ids have been collapsed: another merge would take doubled letters for one.
    options = {"group_tokens": False} if ctc or name in TRANSDUCERS else {"skip_special_tokens": True}
    return lambda ids: decode(list(ids), **options)


def durations(dataset: Any, column: str) -> NDArray[np.float64] | None:
    """Seconds of each row; None without the column, and for a stream, whose rows are not known yet."""
    if is_stream(dataset) or column not in (getattr(dataset, "column_names", None) or []):
        return None
    return np.asarray(dataset[column][:], dtype=np.float64)


def fitted(dataset: Any, decode: Decode | None, duration_column: str) -> dict[str, dict[str, float]]:
    """Limits of `rate` and `length_ratio` from the labels of the labelled set, as far as it has what they need."""
    columns = getattr(dataset, "column_names", None) or []
    if is_stream(dataset) or "labels" not in columns:
        return {}
    rows = dataset.select(range(min(FIT_ROWS, len(dataset)))).with_format(None)
    labels = [[token for token in row if token >= 0] for row in rows["labels"][:]]
    seconds = durations(rows, duration_column)
    speech = decode is not None and seconds is not None
    text = "input_ids" in columns
    return fit_filters(
        [decode(ids) for ids in labels] if speech and decode is not None else None,
        seconds=None if seconds is None else seconds.tolist(),
        tokens=[len(ids) for ids in labels] if text else None,
        source_tokens=[len(ids) for ids in rows["input_ids"][:]] if text else None,
    )
