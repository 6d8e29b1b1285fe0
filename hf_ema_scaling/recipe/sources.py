"""Speech and text from the Hub, from audio folders, from saved data sets, from manifests."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
from datasets import Audio, Dataset, DatasetDict, load_dataset, load_from_disk

from hf_ema_scaling.data.bad_items import RAISE, BadItemError, BadItems, text_of, words_of
from hf_ema_scaling.data.speech import quiet_unless_terminal
from hf_ema_scaling.data.text import label_name
from hf_ema_scaling.recipe.manifests import read_manifest, wanted_columns
from hf_ema_scaling.recipe.speech_files import speech_files

logger = logging.getLogger(__name__)

TEXT_ARGUMENTS, WORD_ARGUMENTS = "text_column and label_column", "word_column and tag_column"
PAIR_ARGUMENTS = "text_column and target_column"
LABELLED_RECORD = "labelling.json"
"""Marks a folder that `hf-ema-scaling label` wrote."""


def load_speech(
    source: str,
    *,
    audio_column: str = "audio",
    text_column: str | None = "text",
    keep: Sequence[str] = (),
    on_bad_item: str = RAISE,
) -> Dataset:
    """Audio, undecoded, and texts of a source, in the order they have there.

    Args:
        source: as in `SpeechDataArguments`; local where the path, or what stands before its last colon, exists.
        audio_column: column of the audio; in audio folders it is `file_name` whatever this says.
        text_column: column of the texts; None where there are none or they must not be read.
        keep: other columns to keep, as they are.
        on_bad_item: `raise` an error for a row of a manifest that is no row or lacks a value, or `skip` it, counted
            by reason and named in the log; an audio file that is not there is then left for `prepare_ctc` to skip.

    Returns:
        A map-style data set with these columns only.

    Raises:
        FileNotFoundError: for a local source or an audio file that is not there.
        ValueError: for a source that cannot be loaded, has no rows, or lacks a column.
        NotImplementedError: for a URL: streaming is not supported yet.
    """
    wanted = [audio_column, *([] if text_column is None else [text_column])]
    wanted += [name for name in keep if name not in wanted]
    files = partial(speech_files, bad=BadItems(on_bad_item), texts=[] if text_column is None else [text_column])
    dataset = _found(source, wanted, "audio_column and text_column", files)
    if isinstance(dataset.features[audio_column], Audio):
        dataset = dataset.cast_column(audio_column, Audio(decode=False))
    return dataset.select_columns(wanted)


def load_text(
    source: str,
    *,
    text_column: str = "text",
    label_column: str | None = "label",
    also: Sequence[str] = (),
    on_bad_item: str = RAISE,
) -> Dataset:
    """Texts and their labels, in the order they have in a source.

    Args:
        source: as in `TextDataArguments`; local where the path, or what stands before its last colon, exists.
        text_column: column of the texts.
        label_column: column of the labels: strings, integers or a `ClassLabel`; None where there are none or they must
            not be read.
        also: further columns, as they are.
        on_bad_item: `raise` an error for a row whose text is empty or null or whose label names no class, and for a
            line of a manifest that is no row, or `skip` it, counted by reason and named in the log.

    Returns:
        A map-style data set with these columns only. Labels of a manifest are strings.

    Raises:
        FileNotFoundError: for a local source that is not there.
        ValueError: for a source that cannot be loaded, has no rows, or lacks a column, and for a bad row.
        NotImplementedError: for a URL: streaming is not supported yet.
    """
    wanted = [text_column, *([] if label_column is None else [label_column]), *also]
    check = partial(_check_text, text_column, label_column)
    arguments = f"{TEXT_ARGUMENTS}, and by source_column" if also else TEXT_ARGUMENTS
    rows_of = partial(_manifest_rows, bad=BadItems(on_bad_item), check=check, arguments=arguments)
    dataset = _found(source, wanted, arguments, rows_of).select_columns(wanted)
    feature = None if label_column is None else dataset.features[label_column]
    return _checked_rows(dataset, source, partial(check, feature=feature), on_bad_item)


def _checked_rows(
    dataset: Dataset, source: str, check: Callable[[Mapping[str, Any]], object], on_bad_item: str
) -> Dataset:
    """The rows that pass a check, which raises `BadItemError` for others."""
    bad, good, number = BadItems(on_bad_item), [], 0
    for rows in dataset.iter(batch_size=1000):
        for row in (dict(zip(rows, values, strict=True)) for values in zip(*rows.values(), strict=True)):
            number += 1
            try:
                check(row)
                good.append(number - 1)
            except BadItemError as error:
                bad.add(error.of(f"{source}, row {number}"))
    bad.log(logger, source, number)
    return dataset if len(good) == number else dataset.select(good)


def load_rows(
    source: str,
    columns: Sequence[str],
    *,
    on_bad_item: str = RAISE,
    check: Callable[[Mapping[str, Any]], dict[str, Any]] = dict,
) -> Dataset:
    """Columns of a source as they are, for those who judge the rows themselves.

    Args:
        source: as for `load_text`.
        columns: which.
        on_bad_item: `raise` an error for a line of a manifest that is no row or lacks a column, or `skip` it.
        check: of a manifest's rows: gives back the row, or raises `BadItemError` for one that fits no column beside
            others; such rows are errors or skipped likewise.

    Raises:
        FileNotFoundError, ValueError, NotImplementedError: as `load_text`, but for what rows hold; ValueError also for
            a manifest whose rows hold values of different kinds.
    """
    arguments = "column and keep_columns"

    def rows_of(path: Path, split: str | None, wanted: list[str]) -> Dataset:
        with _of_one_kind(path):
            return _manifest_rows(path, split, wanted, bad=BadItems(on_bad_item), check=check, arguments=arguments)

    return _found(source, list(columns), arguments, rows_of).select_columns(list(columns))


def _check_text(
    text_column: str, label_column: str | None, row: Mapping[str, Any], feature: Any = None
) -> dict[str, Any]:
    """The row with its label, if it has one, as a string.

    Raises:
        BadItemError: when the text or the label is none.
    """
    _check_texts([text_column], row)
    if label_column is None:
        return dict(row)
    return {**row, label_column: label_name(row[label_column], feature)}


def _check_texts(columns: Sequence[str], row: Mapping[str, Any]) -> dict[str, Any]:
    """The row as it is.

    Raises:
        BadItemError: when one of its texts is none.
    """
    for column in columns:
        if not text_of(row[column], column).strip():
            raise BadItemError(f"{column} is empty: leave such rows out", "empty_text")
    return dict(row)


def load_pairs(
    source: str, *, text_column: str = "source", target_column: str | None = "target", on_bad_item: str = RAISE
) -> Dataset:
    """Texts and their translations, in the order they have in a source.

    Args:
        source: as in `TranslationDataArguments`; local where the path, or what stands before its last colon, exists.
        text_column: column of the texts; `translation.en` for the part `en` of a column of mappings.
        target_column: column of their translations; None where there are none or they must not be read.
        on_bad_item: `raise` an error for a row with a text that is empty, null or no string, and for a line of a
            manifest that is no row, or `skip` it, counted by reason and named in the log.

    Returns:
        A map-style data set with these columns only.

    Raises:
        FileNotFoundError: for a local source that is not there.
        ValueError: for a source that cannot be loaded, has no rows, or lacks a column, and for a bad row.
        NotImplementedError: for a URL: streaming is not supported yet.
    """
    wanted = [text_column] if target_column is None else [text_column, target_column]
    check = partial(_check_texts, wanted)
    rows_of = partial(_manifest_rows, bad=BadItems(on_bad_item), check=check, arguments=PAIR_ARGUMENTS)
    dataset = _found(source, wanted, PAIR_ARGUMENTS, rows_of).select_columns(wanted)
    return _checked_rows(dataset, source, check, on_bad_item)


def load_words(
    source: str, *, word_column: str = "tokens", tag_column: str | None = "ner_tags", on_bad_item: str = RAISE
) -> Dataset:
    """Rows of words and their tags, in the order they have in a source.

    Args:
        source: as in `TextDataArguments`, without tables.
        word_column: column of the words, a list of strings in each row.
        tag_column: column of the tags, a list of as many strings or `ClassLabel` ids; None where there are none or
            they must not be read.
        on_bad_item: `raise` an error for a row without words, with a word that is empty or no string, or with another
            number of tags than of words, and for a line of a manifest that is no row, or `skip` it, counted by reason
            and named in the log.

    Returns:
        A map-style data set with these columns only.

    Raises:
        FileNotFoundError: for a local source that is not there.
        ValueError: for a source that cannot be loaded, has no rows, or lacks a column, and for a bad row.
        NotImplementedError: for a URL: streaming is not supported yet.
    """
    wanted = [word_column] if tag_column is None else [word_column, tag_column]
    check = partial(_check_words, word_column, tag_column)
    rows_of = partial(_word_rows, bad=BadItems(on_bad_item), check=check, arguments=WORD_ARGUMENTS)
    dataset = _found(source, wanted, WORD_ARGUMENTS, rows_of).select_columns(wanted)
    return _checked_rows(dataset, source, check, on_bad_item)


def _check_words(word_column: str, tag_column: str | None, row: Mapping[str, Any]) -> dict[str, Any]:
    """The row as it is.

    Raises:
        BadItemError: when the words or the tags are none.
    """
    words = words_of(row[word_column], word_column)
    tags = words if tag_column is None else row[tag_column]
    if not isinstance(tags, list) or len(tags) != len(words):
        found = len(tags) if isinstance(tags, list) else f"{tags!r:.60}"
        raise BadItemError(f"{len(words)} words, but {found} tags", "no_label")
    return dict(row)


@contextmanager
def naming(source: str) -> Iterator[None]:
    """Inside, errors about values name the source."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error


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
    if (path / LABELLED_RECORD).is_file():
        return _labels(path, split)
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


def _labels(path: Path, split: str | None) -> Dataset:
    """The rows of a folder that `hf-ema-scaling label` has finished whose label was not dropped."""
    if split is not None:
        raise ValueError(f"{path} holds labels, which have no splits: leave ':{split}' out")
    if not json.loads((path / LABELLED_RECORD).read_text(encoding="utf-8"))["complete"]:
        raise ValueError(f"{path}: not all rows are labelled yet; run the command that labels them again")
    with quiet_unless_terminal():
        dataset = load_dataset("parquet", data_files=str(path / "data" / "*.parquet"), split="train")
    kept = [row for row, reason in enumerate(dataset["reason"]) if reason is None]
    if not kept:
        raise ValueError(f"{path}: all {len(dataset)} labels were dropped")
    logger.warning("%s: %d of %d rows have a label", path, len(kept), len(dataset))
    return dataset.select(kept)


def _manifest_rows(
    path: Path,
    split: str | None,
    wanted: list[str],
    *,
    bad: BadItems,
    check: Callable[[Mapping[str, Any]], dict[str, Any]],
    arguments: str,
) -> Dataset:
    if split is not None:
        path = path / split
    if not path.is_file():
        raise ValueError(
            f"{path} is neither a file (.jsonl, .csv) nor a folder that save_to_disk of `datasets` has written"
        )
    rows = read_manifest(path, bad)
    if not rows and not bad.counts:
        raise ValueError(f"{path}: no rows")
    columns: dict[str, list[Any]] = {column: [] for column in wanted}
    for number, row in enumerate(rows, start=1):
        try:
            kept = check(wanted_columns(row, wanted, arguments))
        except BadItemError as error:
            bad.add(error.of(f"{path}, row {number}"))
            continue
        for column in wanted:
            columns[column].append(kept[column])
    bad.log(logger, str(path), bad.counts.total() + len(columns[wanted[0]]))
    return Dataset.from_dict(columns)


def _word_rows(path: Path, split: str | None, wanted: list[str], **options: Any) -> Dataset:
    file = path if split is None else path / split
    if not file.is_file() or file.suffix.lower() == ".csv":
        raise ValueError(f"{file} is neither a file .jsonl nor a folder that save_to_disk of `datasets` has written")
    with _of_one_kind(file):
        return _manifest_rows(path, split, wanted, **options)


@contextmanager
def _of_one_kind(file: Path) -> Iterator[None]:
    """Inside, values that do not fit into one column are an error that names the file."""
    try:
        yield
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise ValueError(f"{file}: the rows hold values of different kinds ({error})") from error
