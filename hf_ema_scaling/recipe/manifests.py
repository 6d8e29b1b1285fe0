"""Rows of manifests: JSON lines and CSV in UTF-8, with or without a byte order mark, with any line ends."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hf_ema_scaling.data.bad_items import BadItemError, BadItems

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_OTHER_SIGNS = {";": "semicolons", "\t": "tabs"}
"""What spreadsheets write between columns where commas stand in numbers, or on request."""


def read_manifest(path: Path, bad: BadItems) -> list[dict[str, Any]]:
    """The rows of a manifest: CSV with a header where the name says so, else one JSON object per line.

    Blank lines are no rows.

    Args:
        path: of the file.
        bad: is told of lines that are no rows ("not_utf8", "not_a_row").

    Raises:
        BadItemError: naming the file and the line (from 1), unless bad lines are skipped.
        ValueError: for a CSV file whose header names a column twice or has semicolons or tabs for commas, or that is
            not UTF-8: it has no lines before it is decoded.
    """
    return list(_csv_rows(path, bad) if path.suffix.lower() == ".csv" else _json_rows(path, bad))


def wanted_columns(row: Mapping[str, Any], wanted: Sequence[str], arguments: str) -> dict[str, Any]:
    """The values of some columns.

    Args:
        row: of a manifest.
        wanted: the columns.
        arguments: that name them, for the message.

    Raises:
        BadItemError: when one is missing ("no_column").
    """
    missing = [column for column in wanted if column not in row]
    if missing:
        raise BadItemError(
            f"no {', '.join(missing)}; it has {', '.join(map(str, row))}. Name the columns by {arguments}", "no_column"
        )
    return {column: row[column] for column in wanted}


def _json_rows(path: Path, bad: BadItems) -> Iterator[dict[str, Any]]:
    # Not splitlines: that also splits at characters that may stand inside of a JSON string, such as U+2028.
    lines = path.read_bytes().removeprefix(BYTE_ORDER_MARK).split(b"\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            yield _json_row(line)
        except BadItemError as error:
            bad.add(error.of(f"{path}, line {number}"))


def _json_row(line: bytes) -> dict[str, Any]:
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadItemError(f"not UTF-8 at byte {error.start + 1}: save the file as UTF-8", "not_utf8") from error
    try:
        row = json.loads(text, object_pairs_hook=_unique)
    except RecursionError as error:
        raise BadItemError("not JSON that can be read (nested too deeply)", "not_a_row") from error
    except json.JSONDecodeError as error:
        raise BadItemError(f"not JSON ({error})", "not_a_row") from error
    if not isinstance(row, dict):
        raise BadItemError(f"a JSON object is expected, got {text.strip()[:60]!r}", "not_a_row")
    return row


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        names = [name for name, _ in pairs]
        twice = sorted({name for name in names if names.count(name) > 1})
        raise BadItemError(f"{', '.join(twice)} is given twice", "not_a_row")
    return row


def _csv_rows(path: Path, bad: BadItems) -> Iterator[dict[str, Any]]:
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 at byte {error.start + 1}: save the file as UTF-8") from error
    reader = csv.DictReader(io.StringIO(text, newline=""))
    header = list(reader.fieldnames or [])
    twice = sorted({name for name in header if header.count(name) > 1})
    if twice:
        raise ValueError(f"{path}: its header names {', '.join(twice)} twice")
    if len(header) == 1 and (found := [name for sign, name in _OTHER_SIGNS.items() if sign in header[0]]):
        raise ValueError(
            f"{path}: its header {header[0][:60]!r} has {found[0]} where commas separate columns: save it with commas"
        )
    while True:
        try:
            row = next(reader, None)
            if row is None:
                return
            if None in row or None in row.values():
                raise BadItemError(f"the header names {len(header)} columns, this line has others", "not_a_row")
            yield row
        except csv.Error as error:
            bad.add(BadItemError(f"{path}, after line {reader.line_num}: not CSV ({error})", "not_a_row"))
        except BadItemError as error:
            bad.add(error.of(f"{path}, line {reader.line_num}"))
