"""Labels a data set shard by shard: a run that was killed goes on where it was, and ends on the same bytes."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, IterableDataset, List, Value
from tqdm import tqdm

from hf_ema_scaling.data.bad_items import RAISE, BadItems
from hf_ema_scaling.data.named_views import read_second_view, with_second_view
from hf_ema_scaling.labelling.heads import Head
from hf_ema_scaling.labelling.inputs import Inputs, batches
from hf_ema_scaling.labelling.judge import judge_of
from hf_ema_scaling.labelling.loading import load_head
from hf_ema_scaling.labelling.provenance import average_record, versions, weights_fingerprint
from hf_ema_scaling.labelling.reading import inputs_of
from hf_ema_scaling.labelling.shards import Shards
from hf_ema_scaling.labelling.summary import LabellingSummary
from hf_ema_scaling.labelling.windows import Item, needed, rows_from, windows
from hf_ema_scaling.labels import LabelsByPosition, PseudoLabel

logger = logging.getLogger(__name__)

OUTPUT_FEATURES = {
    "row": Value("int64"),
    "label": Value("string"),
    "label_ids": List(Value("int64")),
    "label_values": List(Value("float32")),
    "confidence": Value("float32"),
    "reason": Value("string"),
    "scores": Value("string"),
}
"""Columns beside those that are kept and the size, which is called `seconds`, `tokens` or `word_count`."""


def label_dataset(
    model: str | Path | Head,
    data: Dataset | IterableDataset,
    output: str | Path,
    *,
    data_name: str = "",
    column: str | None = None,
    keep: Sequence[str] | None = None,
    batch_size: float | None = None,
    shard_rows: int = 2000,
    shard_size: float | None = None,
    min_seconds: float = 0.0,
    max_seconds: float | None = None,
    max_length: int | None = None,
    min_confidence: float = 0.0,
    filters: str | Mapping[str, Any] | None = None,
    labelled: Dataset | IterableDataset | None = None,
    labelled_column: str | None = None,
    second_view: str | Mapping[str, Any] | None = None,
    on_bad_item: str = RAISE,
    device: str | None = None,
    dtype: str = "float32",
    progress: bool | None = None,
) -> LabellingSummary:
    """Labels every row of a data set with one model, and writes the labels down.

    The output folder holds Parquet files, which `load_dataset(output)` reads, and `labelling.json` with where they
    come from: model, fingerprint of its weights, average, data, arguments, versions, times, and the counts of what was
    kept and dropped. Its rows are those of the data set in their order, the dropped ones included:

    - the columns in `keep`;
    - `row`: number of the row in the data set, from 0;
    - `label`: text of the label, name of the class, of several classes a JSON list of names, of words their tags with
      spaces between, of a regression its numbers; "" where there is none;
    - `label_ids`: ids of the label in the model's vocabulary, of the classes, or of the tags;
    - `label_values`: probabilities of the classes, numbers of a regression, empty for sequences;
    - `classes`: names of any number of classes; `tags`: one for each word, and where they are BIO `spans`: type, first
      word, and the word behind the last one;
    - `confidence`: in [0, 1], as the labeler computes it; 0 for rows the model never saw;
    - `reason`: null for a label that is kept, else why it was dropped: the reason of a filter, what the labeler says
      ("empty", "too_long", "no_eos", "special_tokens"), what `read_audio` and `prepare_ctc` drop rows for,
      "empty_text", "too_long" for words and texts to write from of which the model cannot read all, "beyond_window";
    - `scores`: what else the labeler says, as a JSON object;
    - `seconds` of audio, `tokens`, or of words `word_count`: the size of the row.

    Rows are read in order, in windows of one shard; within a window the longest are labelled first, so that batches
    hold little padding. Batches depend on the data and the arguments only. Run again with the same arguments, a run
    that was killed goes on after its last finished shard, and the folder ends byte for byte as if nothing had
    happened, times aside. A streamed data set is read again up to there, and refused where its last labelled row is
    another one now. No column but the needed ones is read; memory
    holds one window.

    Args:
        model: a folder such as `run/ema`, a name on the Hub, or a `Head`.
        data: audio as in `read_audio`, texts, or lists of words; an `IterableDataset` is streamed.
        output: folder, new or of the same labelling.
        data_name: what to call the data in `labelling.json`.
        column: with what the model reads; when None `audio`, `text` (to classify), `tokens` (words), `source` (to
            translate or summarise) or `prompt` (to continue).
        keep: columns to keep; when None, `column` alone.
        batch_size: padded seconds (speech, default 240) or tokens (text, default 16384) of a batch; of texts that are
            written only what they are written from counts.
        shard_rows: most rows of a shard.
        shard_size: seconds (default 3600) or tokens (default 1,000,000) at which a shard is closed earlier.
        min_seconds: shorter audio is dropped.
        max_seconds: longer audio is dropped: its attention may not fit into memory. None for 40, and no limit where
            the model hears a window (Whisper's 30 s): a row beyond the window is broken.
        max_length: tokens at which texts to classify are cut, and above which others are dropped; the most that the
            model knows when None.
        min_confidence: labels below are dropped ("confidence"), after all filters.
        filters: by name, as `PseudoLabelArguments.filters`; see `LabelledFilters` for those that follow the labels.
        labelled: rows like the data, with their text, on which filters written as "fit" find their limits.
        labelled_column: with that text; when None `text` (speech), `target` or `completion`.
        second_view: another view of each row, as `read_second_view` takes it; labels then have the score
            `disagreement`, by which the filter `disagree` judges. Labelling takes twice as long.
        on_bad_item: `raise` an error for a row that is broken, or `skip` it: it is written with its reason, counted,
            and the first few are named in the log. Rows that are merely unwanted (too short, too long, silent, empty)
            are always written with their reason.
        device: where the model runs; a GPU if there is one when None. Not for a `Head`.
        dtype: of the model: `float32`, `bfloat16` or `float16`. Not for a `Head`.
        progress: whether to show a bar; only in a terminal when None.

    Returns:
        Counts of what was kept and dropped.

    Raises:
        ValueError: for columns that are not there, arguments out of range, filters and views that the head's labels
            do not go with, an output folder with other labels, or a broken row (`BadItemError`), naming it, counted
            from 1.
        FileExistsError: the output folder holds something else.
    """
    _check(batch_size=batch_size, shard_rows=shard_rows, shard_size=shard_size, max_length=max_length)
    if not 0.0 <= min_confidence <= 1.0:
        raise ValueError(f"min_confidence must lie in [0, 1], got {min_confidence}")
    bad = BadItems(on_bad_item)
    head = model if isinstance(model, Head) else load_head(str(model), device=device, dtype=dtype)
    inputs = inputs_of(head, column, (min_seconds, max_seconds), max_length)
    judge, found_filters = judge_of(head, inputs, filters, min_confidence, labelled, labelled_column, on_bad_item)
    head = replace(head, labeler=with_second_view(head.labeler, second_view, head.processing_class))
    speech = inputs.unit == "seconds"
    limit = batch_size or (240.0 if speech else 16384.0)
    window = shard_rows, shard_size or (3600.0 if speech else 1e6)
    kept = [inputs.column] if keep is None else list(dict.fromkeys(keep))
    rows = needed(data, inputs, kept, [*OUTPUT_FEATURES, *head.columns])
    record = {
        "model": {
            "name": head.name,
            "class": type(head.model).__name__,
            "kind": head.kind,
            "dtype": str(next(head.model.parameters()).dtype).removeprefix("torch."),
            "weights_sha256": weights_fingerprint(head.model),
            "average": average_record(head.name),
        },
        "data": {
            "name": data_name,
            "fingerprint": data._fingerprint if isinstance(data, Dataset) else None,
            "rows": len(data) if isinstance(data, Dataset) else None,
        },
        "arguments": {
            "column": inputs.column,
            "keep": kept,
            "batch_size": limit,
            "shard_rows": window[0],
            "shard_size": window[1],
            "min_seconds": min_seconds,
            "max_seconds": max_seconds,
            "max_length": max_length,
            "min_confidence": min_confidence,
            # As a list: their order decides which one gives the reason.
            "filters": [[name, values] for name, values in found_filters.items()] or None,
            "second_view": None if second_view is None else [*read_second_view(second_view)],
            "labels": dict(head.settings) or None,
        },
        "on_bad_item": on_bad_item,
        "versions": versions(),
        "time": {"started": _now()},
    }
    shards = Shards(output)
    if (finished := shards.begin(record)) is not None:
        return LabellingSummary.merged(inputs.unit, [finished["summary"]])
    notes = shards.finished()
    if notes:
        judge.load_state_dict(notes[-1].get("filters", {}))
    done = sum(note["rows"] for note in notes)
    total = len(data) if isinstance(data, Dataset) else None
    hidden = not (sys.stderr.isatty() if progress is None else progress)
    with tqdm(total=total, initial=done, unit="row", desc="labelling", disable=hidden) as bar:
        left = rows_from(rows, done, notes[-1].get("last") if notes else None)
        for items in windows(left, done, inputs, kept, bad, window):
            summary = LabellingSummary(inputs.unit)
            labels = judge.judge(_labels(head, inputs, items, limit), items)
            for item, label in zip(items, labels, strict=True):
                summary.add(label.reason, item.size)
            columns = _columns(head, inputs, items, labels, kept)
            features = shards.features() or _features(rows, columns, kept, inputs.unit, head)
            note = {"rows": len(items), "last": items[-1].digest, "filters": judge.state_dict(), **summary.to_dict()}
            shards.write(len(notes), Dataset.from_dict(columns, features=features), note)
            notes.append(note)
            bar.update(len(items))
    summary = LabellingSummary.merged(inputs.unit, notes)
    if not summary.total:
        raise ValueError(f"{data_name or 'the data set'} has no rows")
    if bad.counts:
        logger.warning("%s", bad.told(data_name or "the data set", summary.total))
    first: dict[str, Any] = shards.record() or record
    shards.finish({**record, "time": {**first["time"], "finished": _now()}, "summary": summary.to_dict()})
    return summary


def _check(**sizes: float | None) -> None:
    for name, size in sizes.items():
        if size is not None and not size > 0:
            raise ValueError(f"{name} must be above 0, got {size}")


def _labels(head: Head, inputs: Inputs, items: Sequence[Item], limit: float) -> list[PseudoLabel]:
    """One label per item, in order."""
    labels = {item.number: PseudoLabel((), 0.0, item.reason) for item in items if item.reason is not None}
    readable = [(item.number, item.prepared) for item in items if item.prepared is not None]
    like = next(head.model.parameters())
    for batch in batches([prepared for _, prepared in readable], limit, inputs.same_length):
        numbers = [readable[place][0] for place in batch]
        tensors = inputs.collate([readable[place][1] for place in batch])
        moved = {
            name: tensor.to(device=like.device, dtype=like.dtype if tensor.is_floating_point() else tensor.dtype)
            for name, tensor in tensors.items()
        }
        labeler = head.labeler.at(numbers) if isinstance(head.labeler, LabelsByPosition) else head.labeler
        labels |= dict(zip(numbers, labeler.label(head.model, moved), strict=True))
    return [labels[item.number] for item in items]


def _columns(
    head: Head, inputs: Inputs, items: Sequence[Item], labels: Sequence[PseudoLabel], kept: Sequence[str]
) -> dict[str, list[Any]]:
    columns: dict[str, list[Any]] = {name: [item.kept[name] for item in items] for name in kept}
    columns["row"] = [item.number for item in items]
    columns["label"] = [head.decode(label) if label.ids or label.values else "" for label in labels]
    columns["label_ids"] = [list(label.ids) for label in labels]
    columns["label_values"] = [list(label.values) for label in labels]
    for name, column in head.columns.items():
        columns[name] = [column.value(label) for label in labels]
    columns["confidence"] = [label.confidence for label in labels]
    columns["reason"] = [label.reason for label in labels]
    columns["scores"] = [json.dumps(dict(label.scores), sort_keys=True) for label in labels]
    columns[inputs.unit] = [item.size for item in items]
    return columns


def _features(
    rows: Dataset | IterableDataset, columns: dict[str, list[Any]], kept: Sequence[str], unit: str, head: Head
) -> Features:
    """Types of the shards' columns; of a stream that does not say its own, those of the first window."""
    known = rows.features or Dataset.from_dict({name: columns[name] for name in kept}).features
    own = {name: column.feature for name, column in head.columns.items()}
    return Features({**{name: known[name] for name in kept}, **OUTPUT_FEATURES, **own, unit: Value("float32")})


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
