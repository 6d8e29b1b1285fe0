"""Speech and text from the Hub, from audio folders, from saved data sets, from manifests."""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import soundfile
from datasets import Audio, Dataset, DatasetDict, load_dataset, load_from_disk

from hf_ema_scaling.data.speech import quiet_unless_terminal
from hf_ema_scaling.data.text import label_name


def load_speech(source: str, *, audio_column: str = "audio", text_column: str | None = "text") -> Dataset:
    """Audio, undecoded, and texts of a source, in the order they have there.

    Args:
        source: as in `SpeechDataArguments`; local where the path, or what stands before its last colon, exists.
        audio_column: column of the audio; in audio folders it is `file_name` whatever this says.
        text_column: column of the texts; None where there are none or they must not be read.

    Returns:
        A map-style data set with these columns only.

    Raises:
        FileNotFoundError: for a local source or an audio file that is not there.
        ValueError: for a source that cannot be loaded, has no rows, or lacks a column.
        NotImplementedError: for a URL: streaming is not supported yet.
    """
    wanted = [audio_column] if text_column is None else [audio_column, text_column]
    dataset = _found(source, wanted, "audio_column and text_column", _speech_files)
    if isinstance(dataset.features[audio_column], Audio):
        dataset = dataset.cast_column(audio_column, Audio(decode=False))
    return dataset.select_columns(wanted)


def load_text(source: str, *, text_column: str = "text", label_column: str | None = "label") -> Dataset:
    """Texts and their labels, in the order they have in a source.

    Args:
        source: as in `TextDataArguments`; local where the path, or what stands before its last colon, exists.
        text_column: column of the texts.
        label_column: column of the labels: strings, integers or a `ClassLabel`; None where there are none or they must
            not be read.

    Returns:
        A map-style data set with these columns only. Labels of a manifest are strings.

    Raises:
        FileNotFoundError: for a local source that is not there.
        ValueError: for a source that cannot be loaded, has no rows, or lacks a column, and for a row whose text is
            empty or whose label names no class.
        NotImplementedError: for a URL: streaming is not supported yet.
    """
    wanted = [text_column] if label_column is None else [text_column, label_column]
    dataset = _found(source, wanted, "text_column and label_column", _text_rows).select_columns(wanted)
    feature, number = None if label_column is None else dataset.features[label_column], 0
    for rows in dataset.iter(batch_size=1000):
        labels = rows[text_column] if label_column is None else rows[label_column]
        for text, label in zip(rows[text_column], labels, strict=True):
            number += 1
            if not isinstance(text, str) or not text.strip():
                shown = "empty" if isinstance(text, str) else "null" if text is None else f"{text!r}, not a string"
                raise ValueError(f"{source}, row {number}: {text_column} is {shown}: leave such rows out")
            if label_column is None:
                continue
            try:
                label_name(label, feature)
            except ValueError as error:
                raise ValueError(f"{source}, row {number}: {error}") from error
    return dataset


def load_words(source: str, *, word_column: str = "tokens", tag_column: str | None = "ner_tags") -> Dataset:
    """Rows of words and their tags, in the order they have in a source.

    Args:
        source: as in `TextDataArguments`, without tables.
        word_column: column of the words, a list of strings in each row.
        tag_column: column of the tags, a list of as many strings or `ClassLabel` ids; None where there are none or
            they must not be read.

    Returns:
        A map-style data set with these columns only.

    Raises:
        FileNotFoundError: for a local source that is not there.
        ValueError: for a source that cannot be loaded, has no rows, or lacks a column, and for a row without words,
            with a word that is empty or no string, or with another number of tags than of words.
        NotImplementedError: for a URL: streaming is not supported yet.
    """
    wanted = [word_column] if tag_column is None else [word_column, tag_column]
    dataset = _found(source, wanted, "word_column and tag_column", _manifest_rows).select_columns(wanted)
    number = 0
    for rows in dataset.iter(batch_size=1000):
        for row in range(len(rows[word_column])):
            number += 1
            words = rows[word_column][row]
            if not isinstance(words, list) or not words:
                raise ValueError(f"{source}, row {number}: {word_column} is {words!r}, not a list of words")
            bad = [word for word in words if not isinstance(word, str) or not word.strip()]
            if bad:
                raise ValueError(f"{source}, row {number}: the word {bad[0]!r} is empty or no string")
            tags = words if tag_column is None else rows[tag_column][row]
            if not isinstance(tags, list) or len(tags) != len(words):
                found = len(tags) if isinstance(tags, list) else repr(tags)
                raise ValueError(f"{source}, row {number}: {len(words)} words, but {found} tags")
    return dataset


def load_pairs(source: str, *, source_column: str = "source", target_column: str | None = "target") -> Dataset:
    """Texts and their translations, in the order they have in a source.

    Args:
        source: as in `TranslationDataArguments`; local where the path, or what stands before its last colon, exists.
        source_column: column of the texts; `translation.en` for the part `en` of a column of mappings.
        target_column: column of their translations; None where there are none or they must not be read.

    Returns:
        A map-style data set with these columns only.

    Raises:
        FileNotFoundError: for a local source that is not there.
        ValueError: for a source that cannot be loaded, has no rows, or lacks a column, and for a row with a text that
            is empty or no string.
        NotImplementedError: for a URL: streaming is not supported yet.
    """
    wanted = [source_column] if target_column is None else [source_column, target_column]
    dataset = _found(source, wanted, "source_column and target_column", _manifest_rows).select_columns(wanted)
    first = 1
    for rows in dataset.iter(batch_size=1000):
        for column in wanted:
            for number, text in enumerate(rows[column], start=first):
                if not isinstance(text, str) or not text.strip():
                    raise ValueError(f"{source}, row {number}: {column} is {text!r}, no text: leave such rows out")
        first += len(rows[source_column])
    return dataset


def named_sources(text: str | None) -> dict[str, str]:
    """Evaluation sources by name, from an argument that holds one or a JSON mapping; a single one has the name ''."""
    text = (text or "").strip()
    return json.loads(text) if text.startswith("{") else {"": text} if text else {}


def _found(
    source: str, wanted: list[str], arguments: str, of_files: Callable[[Path, str | None, list[str]], Dataset]
) -> Dataset:
    """A source with the columns `wanted`, which `arguments` name; `of_files` reads what is no saved data set."""
    before, _, split = source.rpartition(":")
    if Path(source).exists():
        dataset = _local(Path(source), None, wanted, of_files)
    elif before and Path(before).exists():
        dataset = _local(Path(before), split, wanted, of_files)
    elif "://" in source:
        raise NotImplementedError(f"{source}: streaming from a URL is not supported yet; download it first")
    elif source.startswith((".", "/", "~")) or source.endswith((".jsonl", ".json", ".csv")):
        raise FileNotFoundError(f"{source}: no such file or folder, seen from {Path.cwd()}")
    else:
        dataset = _from_hub(source)
    if any("." in name and name not in dataset.column_names for name in wanted):
        dataset = dataset.flatten()
    missing = [name for name in wanted if name not in dataset.column_names]
    if missing:
        raise ValueError(
            f"{source}: no column {', '.join(missing)}; it has {', '.join(dataset.column_names)}. Name the columns by "
            f"{arguments}"
        )
    if not len(dataset):
        raise ValueError(f"{source}: no rows")
    return dataset


def _from_hub(source: str) -> Dataset:
    name, *rest = source.split(":")
    if len(rest) not in (1, 2) or not all(rest):
        raise ValueError(
            f"{source!r} is no file or folder here (seen from {Path.cwd()}); a source on the Hub is owner/name:split "
            "or owner/name:config:split"
        )
    try:
        return load_dataset(name, rest[0] if len(rest) == 2 else None, split=rest[-1])
    except (OSError, ValueError) as error:
        raise ValueError(f"{source}: neither here nor on the Hub ({error})") from error


def _local(
    path: Path, split: str | None, wanted: list[str], of_files: Callable[[Path, str | None, list[str]], Dataset]
) -> Dataset:
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        saved = load_from_disk(str(path))
        if isinstance(saved, Dataset):
            return saved
        assert isinstance(saved, DatasetDict)
        if split not in saved:
            raise ValueError(
                f"{path} has the splits {', '.join(saved)}: write one of them as {path}:{next(iter(saved))}"
            )
        return saved[split]
    return of_files(path, split, wanted)


def _text_rows(path: Path, split: str | None, wanted: list[str]) -> Dataset:
    if split is not None:
        path = path / split
    if not path.is_file():
        raise ValueError(
            f"{path} is neither a file (.jsonl, .csv) nor a folder that save_to_disk of `datasets` has written"
        )
    if path.suffix.lower() == ".csv":
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows: list[dict[str, Any]] = list(csv.DictReader(file))
    else:
        rows = _json_lines(path)
    if not rows:
        raise ValueError(f"{path}: no rows")
    text_column, *labels = wanted
    columns: dict[str, list[Any]] = {column: [] for column in wanted}
    for number, row in enumerate(rows, start=1):
        missing = [column for column in wanted if column not in row]
        if missing:
            raise ValueError(
                f"{path}, row {number}: no {', '.join(missing)}; it has {', '.join(map(str, row))}. Name the columns "
                "by text_column and label_column"
            )
        text = row[text_column]
        if text is not None and not isinstance(text, str):
            raise ValueError(f"{path}, row {number}: {text_column} is {text!r}, not a string")
        for label_column in labels:
            try:
                columns[label_column].append(label_name(row[label_column]))
            except ValueError as error:
                raise ValueError(f"{path}, row {number}: {error}") from error
        columns[text_column].append(text)
    return Dataset.from_dict(columns)


def _manifest_rows(path: Path, split: str | None, wanted: list[str]) -> Dataset:
    path = path if split is None else path / split
    if not path.is_file() or path.suffix.lower() == ".csv":
        raise ValueError(f"{path} is neither a file .jsonl nor a folder that save_to_disk of `datasets` has written")
    rows = _json_lines(path)
    for number, row in enumerate(rows, start=1):
        missing = [column for column in wanted if column not in row]
        if missing:
            raise ValueError(f"{path}, row {number}: no {', '.join(missing)}; it has {', '.join(row)}")
    try:
        return Dataset.from_list([{column: row[column] for column in wanted} for row in rows])
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: the rows hold values of different kinds ({error})") from error


def _speech_files(path: Path, split: str | None, wanted: list[str]) -> Dataset:
    if split is not None:
        path = path / split
    rows: list[dict[str, Any]]
    if path.is_file():
        rows = _json_lines(path)
        folder, name = path.parent, wanted[0]
    elif (path / "metadata.jsonl").is_file():
        folder, name = path, "file_name"
        path = path / "metadata.jsonl"
        rows = _json_lines(path)
    elif (path / "metadata.csv").is_file():
        folder, name = path, "file_name"
        path = path / "metadata.csv"
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
    else:
        suffixes = {f".{kind.lower()}" for kind in soundfile.available_formats()} | {".mp3", ".opus"}
        files = sorted(file for file in path.rglob("*") if file.suffix.lower() in suffixes)
        folder, name = path, "file_name"
        rows = [{name: str(file.relative_to(path))} for file in files]
    return _of_files(path, folder, name, rows, wanted)


def _json_lines(path: Path) -> list[dict[str, Any]]:
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            row = json.loads(line) if line.strip() else {}
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: not JSON ({error})") from error
        if not isinstance(row, dict):
            raise ValueError(f"{path}, line {number}: a JSON object is expected, got {line[:60]!r}")
        if row:
            rows.append(row)
    return rows


def _of_files(path: Path, folder: Path, name: str, rows: list[dict[str, Any]], wanted: list[str]) -> Dataset:
    """Rows that name audio files as a data set in the cache of `datasets`, anew whenever a row or a file changes."""
    if not rows:
        raise ValueError(f"{path}: no rows")
    taken = {wanted[0]: name, **{column: column for column in wanted[1:]}}
    for number, row in enumerate(rows, start=1):
        missing = [column for column in taken.values() if row.get(column) is None]
        if missing:
            null = [column for column in missing if column in row]
            if null:
                raise ValueError(f"{path}, row {number}: {', '.join(null)} is null: leave such rows out")
            raise ValueError(
                f"{path}, row {number}: no {', '.join(missing)}; it has {', '.join(row)}. Name the columns by "
                "audio_column and text_column"
            )
    kept = [{column: str(row[key]) for column, key in taken.items()} for row in rows]
    for row in kept:
        row[wanted[0]] = str((folder / row[wanted[0]]).absolute())
    absent = [row[wanted[0]] for row in kept if not Path(row[wanted[0]]).is_file()]
    if absent:
        raise FileNotFoundError(
            f"{path}: {len(absent)} of {len(kept)} audio files are not there, first {absent[0]}; paths are relative "
            f"to {folder}"
        )
    key = hashlib.sha256()
    for row in kept:
        stat = Path(row[wanted[0]]).stat()
        key.update(json.dumps([row, stat.st_size, stat.st_mtime_ns]).encode())
    with quiet_unless_terminal():
        return Dataset.from_generator(_rows, gen_kwargs={"rows": kept}, fingerprint=key.hexdigest()[:32])


def _rows(rows: list[dict[str, str]]) -> Iterator[dict[str, str]]:
    yield from rows
