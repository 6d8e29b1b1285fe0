"""Filters of the labels of a data set, and their limits from labelled rows."""

from __future__ import annotations

import dataclasses
import itertools
import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from datasets import Audio, Dataset, IterableDataset

from hf_ema_scaling.data.audio import read_audio
from hf_ema_scaling.data.bad_items import BadItemError, BadItems, text_of
from hf_ema_scaling.data.targets import TextTargets
from hf_ema_scaling.labelling.heads import PROMPT, SOURCE, SPEECH, Head
from hf_ema_scaling.labelling.inputs import Inputs
from hf_ema_scaling.labelling.windows import Item
from hf_ema_scaling.labels import PseudoLabel
from hf_ema_scaling.labels.filter_base import SECONDS, TEXT, AdaptiveFilter, Row
from hf_ema_scaling.labels.filter_base import SOURCE as INPUT_IDS
from hf_ema_scaling.labels.filters import FIT, FilterChain, build_filters, read_filters
from hf_ema_scaling.labels.fitting import fit_filters
from hf_ema_scaling.labels.score_filters import Confidence
from hf_ema_scaling.labels.seq2seq import Seq2SeqLabeler

logger = logging.getLogger(__name__)

FIT_ROWS = 10_000
"""Labelled rows that limits are fitted on, from the first on; as in training."""
TEXT_COLUMNS = {SPEECH: "text", SOURCE: "target", PROMPT: "completion"}
"""The column with the text of labelled rows, where none is named."""


class LabelledFilters:
    """What drops labels: filters by name, then `min_confidence`; the first that fires gives the reason.

    The model does not change as it labels, so thresholds that follow the labels (`confidence_quantile`,
    `logprob_quantile`) are quantiles of all labels from the first row to the end of the row's own shard, each of the
    same weight; their `momentum`, which is about steps of training, has no meaning here.

    Args:
        head: that labels.
        filters: in order.

    Raises:
        ValueError: for filters that ask for what this head's labels do not have.
    """

    def __init__(self, head: Head, filters: Iterable[Any]) -> None:
        self.head = head
        self.chain = FilterChain(filters)
        given = {TEXT: head.text is not None, SECONDS: head.kind == SPEECH, INPUT_IDS: head.kind != SPEECH}
        lacking = {TEXT: "labels that are text", SECONDS: "audio", INPUT_IDS: "texts to label"}
        for what, names in self.chain.needs.items():
            if not given[what]:
                raise ValueError(f"the filters {', '.join(names)} need {lacking[what]}: take them out")

    def judge(self, labels: Sequence[PseudoLabel], items: Sequence[Item]) -> list[PseudoLabel]:
        """The labels of a shard, those that are dropped with their reason.

        Args:
            labels: one for each row.
            items: the rows.
        """
        judged = [
            dataclasses.replace(label, reason="empty") if label.kept and not (label.ids or label.values) else label
            for label in labels
        ]
        if not self.chain.filters:
            return judged
        rows = [self._row(label, item) for label, item in zip(judged, items, strict=True)]
        for one in self.chain.filters:
            kept = [number for number, label in enumerate(judged) if label.kept]
            if isinstance(one, AdaptiveFilter):
                for number in kept:
                    one.observe(rows[number])
                # No time goes by: what was measured first counts as much as what was measured last.
                one.end_step(one.measured(), 0.0)
            for number in kept:
                if one.drops(rows[number]):
                    judged[number] = dataclasses.replace(judged[number], reason=one.reason)
        return judged

    def _row(self, label: PseudoLabel, item: Item) -> Row:
        read = None if item.prepared is None else item.prepared.inputs.get("input_ids")
        return Row(
            label,
            decode=self.head.text,
            seconds=item.size if self.head.kind == SPEECH else None,
            source_ids=read,
            decode_source=self.head.text,
        )

    def state_dict(self) -> dict[str, Any]:
        """What thresholds go on from, as JSON values."""
        return self.chain.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave."""
        self.chain.load_state_dict(state)


def judge_of(
    head: Head,
    inputs: Inputs,
    filters: str | Mapping[str, Any] | None,
    min_confidence: float,
    labelled: Dataset | IterableDataset | None,
    labelled_column: str | None,
    on_bad_item: str,
) -> tuple[LabelledFilters, dict[str, Any]]:
    """What drops labels, and the filters as they are for the record, with the limits that were found.

    Args:
        head: that labels.
        inputs: how its rows are read.
        filters: by name, as in `PseudoLabelArguments`.
        min_confidence: labels below are dropped, after all filters.
        labelled: rows with their text, for filters that are written as "fit".
        labelled_column: with the text; that of `TEXT_COLUMNS` when None.
        on_bad_item: `raise` an error for a labelled row that is broken, or `skip` it, counted and named in the log.

    Raises:
        ValueError: as `read_filters`; for "fit" without labelled rows or with rows that lack something, labelled rows
            that nothing is fitted on, and filters that the labels do not go with.
    """
    written = {} if filters is None else read_filters(filters)
    wanted = [name for name, values in written.items() if values == FIT]
    if wanted and labelled is None:
        raise ValueError(
            f"the filters {', '.join(wanted)} are to be fitted, and there are no labelled rows: name them by labelled "
            "(--labelled), or write their limits"
        )
    if labelled is not None and not wanted:
        raise ValueError("labelled rows are for filters that are written as 'fit', and there are none: leave them out")
    if "confidence_adaptive" in written:
        raise ValueError(
            "confidence_adaptive follows a teacher that learns, and this one does not: use confidence or "
            "confidence_quantile"
        )
    if labelled is not None:
        written |= _fitted(wanted, labelled, head, inputs, labelled_column, BadItems(on_bad_item))
    chosen = build_filters(written)
    if min_confidence > 0:
        chosen.append(Confidence(min_confidence))
    return LabelledFilters(head, chosen), written


def _fitted(
    wanted: Sequence[str],
    labelled: Dataset | IterableDataset,
    head: Head,
    inputs: Inputs,
    column: str | None,
    bad: BadItems,
) -> dict[str, Any]:
    """Limits of the wanted filters, from labelled rows."""
    fits = {"rate": head.kind == SPEECH, "length_ratio": head.kind in (SOURCE, PROMPT)}
    for name in wanted:
        if not fits[name]:
            raise ValueError(f"the filter {name} cannot be fitted for a {type(head.model).__name__}: take it out")
    name = column or TEXT_COLUMNS[head.kind]
    known = labelled.column_names
    missing = [] if known is None else [one for one in (inputs.column, name) if one not in known]
    if missing:
        raise ValueError(
            f"the labelled rows have no column {', '.join(missing)}: they have {', '.join(known or ())}; name the "
            "one with the text by labelled_column"
        )
    rows = labelled.select_columns([inputs.column, name])
    if rows.features is not None and isinstance(rows.features[inputs.column], Audio):
        rows = rows.cast_column(inputs.column, Audio(decode=False))
    texts: list[str] = []
    sizes: list[float] = []
    counts: list[int] = []
    for number, row in enumerate(itertools.islice(rows, FIT_ROWS), start=1):
        try:
            text = text_of(row[name], name)
            if head.kind == SPEECH:
                extractor = getattr(head.processing_class, "feature_extractor", head.processing_class)
                sizes.append(len(read_audio(row[inputs.column], extractor.sampling_rate)) / extractor.sampling_rate)
            else:
                ids = _target(text, head)
                sizes.append(len(inputs.prepare(row).inputs["input_ids"]))
                counts.append(len(ids))
            texts.append(text)
        except BadItemError as error:
            del counts[len(texts) :], sizes[len(texts) :]
            bad.add(error.of(f"labelled row {number}"))
    bad.log(logger, "labelled rows", len(texts) + bad.counts.total())
    if head.kind == SPEECH:
        found = fit_filters(texts, seconds=sizes)
    else:
        found = fit_filters(None, tokens=counts, source_tokens=[int(size) for size in sizes])
    logger.warning("limits found on %d labelled rows: %s", len(texts), found)
    return {one: found[one] for one in wanted}


def _target(text: str, head: Head) -> list[int]:
    """The ids of a text as a label, its end included."""
    if isinstance(head.labeler, Seq2SeqLabeler):
        return TextTargets(head.labeler, head.processing_class)(text)
    return [*head.processing_class(text, add_special_tokens=False).input_ids, 0]
