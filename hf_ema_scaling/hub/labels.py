"""Labelled data sets on the Hub: rows with label, confidence and reason, and the record of what made them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import DatasetCard, DatasetCardData

from hf_ema_scaling.hub.details import CardDetails, library_version
from hf_ema_scaling.hub.markdown import Markdown, fenced, plain, render, table
from hf_ema_scaling.hub.model_card import TAGS
from hf_ema_scaling.hub.run_folder import RunFolderError, read_json

RECORD_NAME = "labelling.json"
SHARDS = "data/*.parquet"
COLUMNS = {
    "row": "number of the row in the data set that was labelled",
    "label": "the label as text",
    "label_ids": "the label as the model's ids",
    "label_values": "values of the label, such as probabilities of classes",
    "classes": "names of the classes of the label",
    "tags": "the label, a tag for each word",
    "spans": "spans of the tags: type, first word, and the word behind the last one",
    "confidence": "what the model gave the label, in [0, 1]",
    "reason": "null for a label to train on, else the code of why it was dropped",
    "scores": "what filters measured, as JSON",
    "seconds": "length of the audio",
    "tokens": "length of the text",
    "word_count": "length of the text in words",
}
TASKS = {
    "speech": "automatic-speech-recognition",
    "text": "text-classification",
    "words": "token-classification",
    "source": "text-generation",
    "prompt": "text-generation",
}
"""Task categories of the Hub by what the model reads."""
_SIZES = ((10**3, "n<1K"), (10**4, "1K<n<10K"), (10**5, "10K<n<100K"), (10**6, "100K<n<1M"), (10**7, "1M<n<10M"))


def is_labelled(folder: str | Path) -> bool:
    """Whether `hf-ema-scaling label` made this folder."""
    return (Path(folder) / RECORD_NAME).is_file()


def stage_labels(
    folder: Path,
    target: Path,
    *,
    repo_id: str | None,
    details: CardDetails,
    place: Callable[[Path, Path], object],
) -> str:
    """Lays labels out in `target`; returns their card, which is not written.

    Audio that the shards name by path is read into them: what is pushed can be heard elsewhere.

    Raises:
        RunFolderError: the labels are not complete.
    """
    # Heavy, and of no use for models.
    import pyarrow.parquet as pq
    from datasets import Audio, Features
    from datasets.table import embed_table_storage

    record = _record(folder)
    shards = sorted(folder.glob(SHARDS))
    if not shards:
        raise RunFolderError(f"{folder} holds no {SHARDS}: run the command that labels it once more")
    features = Features.from_arrow_schema(pq.read_schema(shards[0]))
    card = dataset_card(record, list(features), folder=folder, repo_id=repo_id, details=details)
    (target / "data").mkdir(parents=True, exist_ok=True)
    for shard in shards:
        staged = target / "data" / shard.name
        if any(isinstance(feature, Audio) for feature in features.values()):
            pq.write_table(embed_table_storage(pq.read_table(shard)), staged)
        else:
            place(shard, staged)
    place(folder / RECORD_NAME, target / RECORD_NAME)
    return card


def dataset_card(
    record: Mapping[str, Any], columns: Sequence[str], *, folder: Path, repo_id: str | None, details: CardDetails
) -> str:
    """The card of labels, with its metadata."""
    title = details.title or (repo_id or folder.resolve().name).rpartition("/")[2]
    unit, reasons = record["summary"]["unit"], record["summary"]["reasons"]
    rows = sum(int(cell["rows"]) for cell in reasons.values())
    model, data = record["model"], record["data"]
    values = {
        "title": title,
        "usage": _usage(repo_id or "OWNER/NAME"),
        "rows": rows,
        "kept": int(reasons.get("kept", {}).get("rows", 0)),
        "model": model,
        "source": data,
        "source_name": data.get("name") or "a data set without a name",
        "arguments": dict(record["arguments"]),
        "columns": [(name, COLUMNS.get(name, "as in the data set that was labelled")) for name in columns],
        "summary": _summary(reasons, unit, rows),
        "datasets": list(details.datasets),
        "versions": ", ".join(f"{name} {version}" for name, version in dict(record["versions"]).items()),
        "time": dict(record.get("time", {})),
        "license": details.license,
        "limits": details.limits,
        "version": library_version(),
    }
    metadata = DatasetCardData(
        language=list(details.language) or None,
        license=details.license,
        annotations_creators=["machine-generated"],
        source_datasets=list(details.datasets) or None,
        task_categories=[_task(record, unit)],
        size_categories=[next((name for limit, name in _SIZES if rows < limit), "n>10M")],
        pretty_name=" ".join(plain(title).split()),
        tags=list(dict.fromkeys([*TAGS, "pseudo-labels", *(" ".join(plain(tag).split()) for tag in details.tags)])),
        configs=[{"config_name": "default", "data_files": [{"split": "train", "path": SHARDS}]}],
    )
    return str(DatasetCard(f"---\n{metadata.to_yaml()}\n---\n\n{render('dataset_card.md.jinja', values)}"))


def _task(record: Mapping[str, Any], unit: str) -> str:
    kind = record["model"].get("kind") or ("speech" if unit == "seconds" else "text")
    named = dict(record["arguments"].get("labels") or {}).get("language")
    return "translation" if kind == "source" and named else TASKS[kind]


def _usage(repo: str) -> Markdown:
    load = f'labels = load_dataset({json.dumps(repo)}, split="train").filter(lambda row: row["reason"] is None)'
    return fenced(f"from datasets import load_dataset\n\n{load}", "python")


def _record(folder: Path) -> dict[str, Any]:
    path = folder / RECORD_NAME
    record = read_json(path)
    missing = [name for name in ("complete", "model", "data", "arguments", "versions") if name not in record]
    if missing:
        raise RunFolderError(f"{path} has no {', '.join(missing)}: it was not written by `hf-ema-scaling label`")
    if not record["complete"] or "summary" not in record:
        raise RunFolderError(f"{folder}: not all rows are labelled yet; run the command that labels them again")
    return record


def _summary(reasons: Mapping[str, Mapping[str, float]], unit: str, rows: int) -> Markdown:
    lines: list[list[object]] = [["Outcome", "Rows", unit, "Share of rows"]]
    for name in sorted(reasons, key=lambda reason: (reason != "kept", reason)):
        cell = reasons[name]
        share = f"{cell['rows'] / rows:.1%}" if rows else "n/a"
        lines.append([name, int(cell["rows"]), float(cell[unit]), share])
    return table(lines)
