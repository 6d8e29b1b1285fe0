"""Audio files as a data set: those that a manifest names, or those of a folder."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import soundfile
from datasets import Dataset

from hf_ema_scaling.data.audio import is_file
from hf_ema_scaling.data.bad_items import RAISE, BadItemError, BadItems, text_of
from hf_ema_scaling.data.speech import quiet_unless_terminal
from hf_ema_scaling.recipe.manifests import read_manifest, wanted_columns

logger = logging.getLogger(__name__)


def speech_files(path: Path, split: str | None, wanted: list[str], *, bad: BadItems, texts: list[str]) -> Dataset:
    """Rows of a manifest of audio files, or of an audio folder.

    Args:
        path: of the file or folder.
        split: what stands behind the last colon of the source: a file or folder in `path`.
        wanted: columns, the audio first.
        bad: is told of rows that are none.
        texts: those of the columns that must hold texts.

    Raises:
        FileNotFoundError: for audio files that are not there, unless bad rows are skipped.
        ValueError: when there is no row, or a bad one that is not skipped.
    """
    if split is not None:
        path = path / split
    if path.is_file():
        rows, folder, name = read_manifest(path, bad), path.parent, wanted[0]
    elif found := [path / name for name in ("metadata.jsonl", "metadata.csv") if (path / name).is_file()]:
        folder, name, path = path, "file_name", found[0]
        rows = read_manifest(path, bad)
    else:
        suffixes = {f".{kind.lower()}" for kind in soundfile.available_formats()} | {".mp3", ".opus"}
        files = sorted(file for file in path.rglob("*") if file.suffix.lower() in suffixes)
        folder, name = path, "file_name"
        rows = [{name: str(file.relative_to(path))} for file in files]
    return _of_files(path, folder, name, rows, wanted, bad, texts)


def _of_files(
    path: Path,
    folder: Path,
    name: str,
    rows: list[dict[str, Any]],
    wanted: list[str],
    bad: BadItems,
    texts: list[str],
) -> Dataset:
    """Rows that name audio files as a data set in the cache of `datasets`, anew whenever a row or a file changes."""
    if not rows and not bad.counts:
        raise ValueError(f"{path}: no rows")
    columns, kept = [name, *wanted[1:]], []
    for number, row in enumerate(rows, start=1):
        try:
            found = wanted_columns(row, columns, "audio_column and text_column")
            file = found.pop(name)
            if not isinstance(file, str):
                raise BadItemError(f"{name} is {'null' if file is None else repr(file)[:60]}, no path", "no_audio")
            values = {wanted[0]: file, **found}
            for column in texts:
                text_of(values[column], column)
            kept.append(values)
        except BadItemError as error:
            bad.add(error.of(f"{path}, row {number}"))
    bad.log(logger, str(path), bad.counts.total() + len(kept))
    for row in kept:
        row[wanted[0]] = str((folder / row[wanted[0]]).absolute())
    absent = [row[wanted[0]] for row in kept if not is_file(row[wanted[0]])]
    if absent and bad.on_bad_item == RAISE:
        raise FileNotFoundError(
            f"{path}: {len(absent)} of {len(kept)} audio files are not there, first {absent[0]}; paths are relative "
            f"to {folder}"
        )
    key = hashlib.sha256()
    for row in kept:
        stat = Path(row[wanted[0]]).stat() if is_file(row[wanted[0]]) else None
        key.update(json.dumps([row, *((stat.st_size, stat.st_mtime_ns) if stat else ())]).encode())
    with quiet_unless_terminal():
        return Dataset.from_generator(_rows, gen_kwargs={"rows": kept}, fingerprint=key.hexdigest()[:32])


def _rows(rows: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    yield from rows
