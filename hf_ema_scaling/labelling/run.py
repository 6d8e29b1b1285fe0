"""Labels a data set shard by shard: a run that was killed goes on where it was, and ends on the same bytes."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from datasets import Audio, Dataset, Features, IterableDataset, List, Value
from tqdm import tqdm

from hf_ema_scaling.data.bad_items import RAISE, UNWANTED, BadItemError, BadItems
from hf_ema_scaling.labelling.heads import Head, load_head
from hf_ema_scaling.labelling.inputs import Inputs, Prepared, batches, inputs_of
from hf_ema_scaling.labelling.provenance import average_record, versions, weights_fingerprint
from hf_ema_scaling.labelling.shards import Shards
from hf_ema_scaling.labelling.summary import LabellingSummary
from hf_ema_scaling.labels import PseudoLabel

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
"""Columns beside those that are kept and the size, which is called `seconds` or `tokens`."""


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
    max_seconds: float = 40.0,
    max_length: int | None = None,
    min_confidence: float = 0.0,
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
    - `label`: text of the label, or name of the class; "" where there is none;
    - `label_ids`: ids of the label in the model's vocabulary, or of the class;
    - `label_values`: probabilities of the classes, empty for sequences;
    - `confidence`: in [0, 1], as the labeler computes it; 0 for rows the model never saw;
    - `reason`: null for a label that is kept, else why it was dropped: "confidence", what the labeler says ("empty",
      "too_long"), what `read_audio` and `prepare_ctc` drop rows for, "empty_text";
    - `scores`: what else the labeler says, as a JSON object;
    - `seconds` of audio, or `tokens`: the size of the row.

    Rows are read in order, in windows of one shard; within a window the longest are labelled first, so that batches
    hold little padding. Batches depend on the data and the arguments only. Run again with the same arguments, a run
    that was killed goes on after its last finished shard, and the folder ends byte for byte as if nothing had
    happened, times aside. A streamed data set is read again up to there. No column but the needed ones is read; memory
    holds one window.

    Args:
        model: a folder such as `run/ema`, a name on the Hub, or a `Head`.
        data: audio as in `read_audio`, or texts; an `IterableDataset` is streamed.
        output: folder, new or of the same labelling.
        data_name: what to call the data in `labelling.json`.
        column: with the audio or the texts; `audio` or `text` when None.
        keep: columns to keep; when None, `column` alone.
        batch_size: padded seconds (speech, default 240) or tokens (text, default 16384) of a batch.
        shard_rows: most rows of a shard.
        shard_size: seconds (default 3600) or tokens (default 1,000,000) at which a shard is closed earlier.
        min_seconds: shorter audio is dropped.
        max_seconds: longer audio is dropped: its attention may not fit into memory.
        max_length: tokens at which texts are cut; the most that the model knows when None.
        min_confidence: labels below are dropped ("confidence").
        on_bad_item: `raise` an error for a row that is broken, or `skip` it: it is written with its reason, counted,
            and the first few are named in the log. Rows that are merely unwanted (too short, too long, silent, empty)
            are always written with their reason.
        device: where the model runs; a GPU if there is one when None. Not for a `Head`.
        dtype: of the model: `float32`, `bfloat16` or `float16`. Not for a `Head`.
        progress: whether to show a bar; only in a terminal when None.

    Returns:
        Counts of what was kept and dropped.

    Raises:
        ValueError: for columns that are not there, arguments out of range, an output folder with other labels, or a
            broken row (`BadItemError`), naming it, counted from 1.
        FileExistsError: the output folder holds something else.
    """
    _check(batch_size=batch_size, shard_rows=shard_rows, shard_size=shard_size, max_length=max_length)
    if not 0.0 <= min_confidence <= 1.0:
        raise ValueError(f"min_confidence must lie in [0, 1], got {min_confidence}")
    bad = BadItems(on_bad_item)
    head = model if isinstance(model, Head) else load_head(str(model), device=device, dtype=dtype)
    inputs = inputs_of(head, column, (min_seconds, max_seconds), max_length)
    speech = inputs.unit == "seconds"
    limit = batch_size or (240.0 if speech else 16384.0)
    window = shard_rows, shard_size or (3600.0 if speech else 1e6)
    kept = [inputs.column] if keep is None else list(dict.fromkeys(keep))
    rows = _needed(data, inputs, kept)
    record = {
        "model": {
            "name": head.name,
            "class": type(head.model).__name__,
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
        },
        "on_bad_item": on_bad_item,
        "versions": versions(),
        "time": {"started": _now()},
    }
    shards = Shards(output)
    if (finished := shards.begin(record)) is not None:
        return LabellingSummary.merged(inputs.unit, [finished["summary"]])
    notes = shards.finished()
    done = sum(note["rows"] for note in notes)
    total = len(data) if isinstance(data, Dataset) else None
    hidden = not (sys.stderr.isatty() if progress is None else progress)
    with tqdm(total=total, initial=done, unit="row", desc="labelling", disable=hidden) as bar:
        for items in _windows(_from(rows, done), done, inputs, kept, bad, window):
            summary = LabellingSummary(inputs.unit)
            labels = _labels(head, inputs, items, limit, min_confidence)
            for item, label in zip(items, labels, strict=True):
                summary.add(label.reason, item.size)
            columns = _columns(head, inputs, items, labels, kept)
            features = shards.features() or _features(rows, columns, kept, inputs.unit)
            note = {"rows": len(items), **summary.to_dict()}
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


class _Item:
    """A row of the window that is being labelled: what is kept of it, and what the model reads or why it does not."""

    __slots__ = ("kept", "number", "prepared", "reason", "size")

    def __init__(self, number: int, kept: dict[str, Any]) -> None:
        self.number = number
        self.kept = kept
        self.prepared: Prepared | None = None
        self.reason: str | None = None
        self.size = 0.0


def _check(**sizes: float | None) -> None:
    for name, size in sizes.items():
        if size is not None and not size > 0:
            raise ValueError(f"{name} must be above 0, got {size}")


def _needed(data: Dataset | IterableDataset, inputs: Inputs, kept: list[str]) -> Dataset | IterableDataset:
    """The columns that are read, audio undecoded."""
    clash = sorted({*kept} & {*OUTPUT_FEATURES, inputs.unit})
    if clash:
        raise ValueError(f"the columns {', '.join(clash)} cannot be kept: the labels use these names; rename yours")
    wanted = list(dict.fromkeys([inputs.column, *kept]))
    if data.column_names is not None:
        missing = [name for name in wanted if name not in data.column_names]
        if missing:
            raise ValueError(f"no column {', '.join(missing)} in the data set: it has {', '.join(data.column_names)}")
    data = data.select_columns(wanted)
    for name in wanted:
        if data.features is not None and isinstance(data.features[name], Audio):
            data = data.cast_column(name, Audio(decode=False))
    return data


def _from(rows: Dataset | IterableDataset, done: int) -> Iterator[dict[str, Any]]:
    if isinstance(rows, Dataset):
        return (rows[number] for number in range(done, len(rows)))
    return iter(rows.skip(done) if done else rows)


def _windows(
    rows: Iterable[dict[str, Any]],
    done: int,
    inputs: Inputs,
    kept: Sequence[str],
    bad: BadItems,
    window: tuple[int, float],
) -> Iterator[list[_Item]]:
    """The rows of one shard after another, prepared."""
    items: list[_Item] = []
    size = 0.0
    for number, row in enumerate(rows, start=done):
        item = _Item(number, {name: row[name] for name in kept})
        try:
            item.prepared = inputs.prepare(row)
            item.size = item.prepared.size
        except BadItemError as error:
            if error.reason not in UNWANTED:
                bad.add(error.of(f"row {number + 1}"))
            item.reason, item.size = error.reason, error.size
        items.append(item)
        size += item.size
        if len(items) >= window[0] or size >= window[1]:
            yield items
            items, size = [], 0.0
    if items:
        yield items


def _labels(
    head: Head, inputs: Inputs, items: Sequence[_Item], limit: float, min_confidence: float
) -> list[PseudoLabel]:
    """One label per item, in order."""
    labels = {item.number: PseudoLabel((), 0.0, item.reason) for item in items if item.reason is not None}
    readable = [(item.number, item.prepared) for item in items if item.prepared is not None]
    like = next(head.model.parameters())
    for batch in batches([prepared for _, prepared in readable], limit, inputs.same_length):
        tensors = inputs.collate([readable[place][1] for place in batch])
        moved = {
            name: tensor.to(device=like.device, dtype=like.dtype if tensor.is_floating_point() else tensor.dtype)
            for name, tensor in tensors.items()
        }
        for place, label in zip(batch, head.labeler.label(head.model, moved), strict=True):
            if label.kept and label.confidence < min_confidence:
                label = PseudoLabel(label.ids, label.confidence, "confidence", label.values, label.scores)
            labels[readable[place][0]] = label
    return [labels[item.number] for item in items]


def _columns(
    head: Head, inputs: Inputs, items: Sequence[_Item], labels: Sequence[PseudoLabel], kept: Sequence[str]
) -> dict[str, list[Any]]:
    columns: dict[str, list[Any]] = {name: [item.kept[name] for item in items] for name in kept}
    columns["row"] = [item.number for item in items]
    columns["label"] = [head.decode(label) if label.ids else "" for label in labels]
    columns["label_ids"] = [list(label.ids) for label in labels]
    columns["label_values"] = [list(label.values) for label in labels]
    columns["confidence"] = [label.confidence for label in labels]
    columns["reason"] = [label.reason for label in labels]
    columns["scores"] = [json.dumps(dict(label.scores), sort_keys=True) for label in labels]
    columns[inputs.unit] = [item.size for item in items]
    return columns


def _features(
    rows: Dataset | IterableDataset, columns: dict[str, list[Any]], kept: Sequence[str], unit: str
) -> Features:
    """Types of the shards' columns; of a stream that does not say its own, those of the first window."""
    known = rows.features or Dataset.from_dict({name: columns[name] for name in kept}).features
    return Features({**{name: known[name] for name in kept}, **OUTPUT_FEATURES, unit: Value("float32")})


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
