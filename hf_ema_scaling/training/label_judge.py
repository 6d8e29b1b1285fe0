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
from hf_ema_scaling.labels.base import CONFIDENCE, Labeler, PseudoLabel
from hf_ema_scaling.labels.decoder import TRANSDUCERS
from hf_ema_scaling.labels.filter_base import SECONDS, SOURCE, TEXT, Decode, Filter, Row
from hf_ema_scaling.labels.filters import FILTERS, FilterChain, build_filters, read_filters
from hf_ema_scaling.labels.fitting import fit_filters
from hf_ema_scaling.labels.score_filters import Confidence
from hf_ema_scaling.labels.serving import check_served, names_of
from hf_ema_scaling.training.aligned import Aligned
from hf_ema_scaling.training.arguments import PseudoLabelArguments
from hf_ema_scaling.training.losses import labels_by_token

FIT_ROWS = 10_000
"""Labelled rows that limits are fitted on, from the first on."""


class LabelJudge:
    """Filters labels, with the reason of the first filter that fires.

    Args:
        filters: in order.
        decode: label ids to text; None where labels are no text.
        seconds: duration of each row of the unlabelled set; None where it is not known.
        source: whether rows have `input_ids`.
        alignment: corrects labels before they are filtered.

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
        alignment: Aligned | None = None,
    ) -> None:
        self.alignment = alignment
        self.chain = FilterChain(filters, None if alignment is None else alignment.alignment)
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
        """The labels of a batch, aligned where there is an alignment, those that a filter drops with its reason.

        Args:
            labels: one for each row.
            batch: unlabelled rows.
            ages: reference steps from stream positions to the end of the step.
        """
        if not self.chain.filters and self.alignment is None:
            return self.chain.judge(labels, lambda number: Row(labels[number]))
        since = ages(batch["positions"]).tolist()
        if self.alignment is not None:
            labels = self.alignment(labels, batch["indices"], since)
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
    labeler: Labeler,
    ctc: bool,
    processing_class: Any,
    labelled: Any,
    unlabelled: Any,
    duration_column: str,
    alignment: Aligned | None = None,
) -> LabelJudge:
    """The judge of a run: the filters of `arguments`, then `filters`, then `min_confidence`.

    Args:
        model: the student.
        arguments: with `filters` and `min_confidence`.
        filters: further filters.
        labeler: makes the labels.
        ctc: whether the model has a CTC head.
        processing_class: decodes labels, where they are text.
        labelled: the labelled set, for filters that are fitted.
        unlabelled: the unlabelled set.
        duration_column: column with seconds, in both sets.
        alignment: corrects labels before they are filtered.

    Raises:
        ValueError: for filters that cannot be built or ask for what is not there.
    """
    decode = decoder(model, processing_class, ctc=ctc)
    seconds, source = durations(unlabelled, duration_column), "input_ids" in (_columns(unlabelled) or [])
    given = {what for what, there in ((TEXT, decode), (SECONDS, seconds)) if there is not None}
    given |= {SOURCE} if source else set()
    head = class_of(base_of(model)).__name__
    chosen: list[Filter] = []
    if arguments.filters is not None:
        # Before limits are fitted: labels that are no tokens have no lengths.
        check_served({name: FILTERS[name] for name in read_filters(arguments.filters)}, labeler, head, given)

        def fit() -> dict[str, dict[str, float]]:
            return fitted(labelled, decode, duration_column, joined=labels_by_token(model))

        classes = getattr(getattr(model, "config", None), "num_labels", None)
        chosen += build_filters(arguments.filters, classes=classes, fit=fit)
    more = list(filters or [])
    check_served(names_of(more), labeler, head, given)
    if arguments.min_confidence > 0:
        more.append(Confidence(arguments.min_confidence))
        check_served({f"min_confidence={arguments.min_confidence:g}": more[-1]}, labeler, head, given)
    return LabelJudge([*chosen, *more], decode=decode, seconds=seconds, source=source, alignment=alignment)


def check_scores(chain: FilterChain, labels: Sequence[PseudoLabel]) -> None:
    """Refuses filters that judge by a score which a first label does not have, for labelers that do not tell theirs.

    Args:
        chain: the filters.
        labels: of a few rows; those that the labeler dropped say nothing of scores.

    Raises:
        ValueError: naming the score.
    """
    for score in sorted(chain.needs_scores - {CONFIDENCE}):
        for label in labels:
            if label.kept:
                Row(label).score(score)


def _columns(dataset: Any) -> list[str] | None:
    return getattr(dataset, "column_names", None)


def decoder(model: Any, processing_class: Any, *, ctc: bool) -> Decode | None:
    """Label ids to text; None without something that decodes, and for classifiers, whose labels are no text."""
    name = class_of(base_of(model)).__name__
    classifiers = (MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES, MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES)
    if any(name in names.values() for names in classifiers):
        return None
    return text_decoder(processing_class, ctc=ctc or name in TRANSDUCERS)


def text_decoder(processing_class: Any, *, ctc: bool) -> Decode | None:
    """Label ids to text by a tokenizer or processor; None where it does not decode.

    Args:
        processing_class: may be None.
        ctc: whether ids have been collapsed: another merge would take doubled letters for one.
    """
    decode = getattr(getattr(processing_class, "tokenizer", processing_class), "decode", None)
    if decode is None:
        return None
    options = {"group_tokens": False} if ctc else {"skip_special_tokens": True}
    return lambda ids: decode(list(ids), **options)


def durations(dataset: Any, column: str) -> NDArray[np.float64] | None:
    """Seconds of each row; None without the column, and for a stream, whose rows are not known yet."""
    if is_stream(dataset) or column not in (getattr(dataset, "column_names", None) or []):
        return None
    return np.asarray(dataset[column][:], dtype=np.float64)


def fitted(dataset: Any, decode: Decode | None, duration_column: str, *, joined: bool) -> dict[str, dict[str, float]]:
    """Limits of `rate` and `length_ratio` from the labels of the labelled set, as far as it has what they need.

    Args:
        dataset: the labelled set.
        decode: label ids to text; None where labels are no text.
        duration_column: column with seconds.
        joined: whether `input_ids` hold the label behind its prompt (causal language models): tokens with a label are
            then no part of the input.
    """
    columns = _columns(dataset) or []
    if is_stream(dataset) or "labels" not in columns:
        return {}
    rows = dataset.select(range(min(FIT_ROWS, len(dataset)))).with_format(None)
    found = rows["labels"][:]
    if not all(isinstance(row, Sequence) for row in found):
        return {}
    labels = [[token for token in row if token >= 0] for row in found]
    seconds = durations(rows, duration_column)
    speech = decode is not None and seconds is not None
    sources = _input_lengths(rows) if "input_ids" in columns else None
    if joined and sources is not None:
        sources = [length - len(label) for length, label in zip(sources, labels, strict=True)]
    return fit_filters(
        [decode(ids) for ids in labels] if speech and decode is not None else None,
        seconds=None if seconds is None else seconds.tolist(),
        tokens=None if sources is None else [len(ids) for ids in labels],
        source_tokens=sources,
    )


def _input_lengths(rows: Any) -> list[int]:
    """Tokens of each input, without padding."""
    if "attention_mask" in rows.column_names:
        return [sum(mask) for mask in rows["attention_mask"][:]]
    return [len(ids) for ids in rows["input_ids"][:]]
