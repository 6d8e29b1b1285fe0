"""Labels on disk: shards that are complete or absent, and the record that says what made them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from datasets import Dataset, Features

from hf_ema_scaling.ema.durable import flush, rename
from hf_ema_scaling.recipe.sources import LABELLED_RECORD as RECORD_NAME

FORMAT_VERSION = 1
FREE = {"time", "on_bad_item", "complete", "summary"}
"""What may differ between the runs that label one folder: no label depends on it."""
_KEY = b"hf_ema_scaling"


class Shards:
    """The folder of labels: `data/train-00000.parquet` and so on, beside `labelling.json`.

    A shard is written under another name, flushed and renamed, and says itself how many rows of the data set it is
    made of. What a killed run leaves half-written has the name `.partial` and is overwritten by the next.

    Args:
        folder: where it is or will be.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def path(self, number: int) -> Path:
        """Of one shard."""
        # `load_dataset` takes the file names for those of a split, and leaves labelling.json alone.
        return self.folder / "data" / f"train-{number:05d}.parquet"

    def begin(self, record: Mapping[str, Any]) -> dict[str, Any] | None:
        """Starts a folder, or verifies that an existing one was started by the same model, data and arguments.

        Args:
            record: JSON values; all of them but those of `FREE` must agree.

        Returns:
            The finished record if all rows are labelled already, else None.

        Raises:
            FileExistsError: the folder holds something else.
            ValueError: it was started otherwise; says what differs.
        """
        old = self.record()
        if old is None:
            # A run may have been killed before it wrote its record.
            found = {path.name for path in self.folder.iterdir()} if self.folder.exists() else set()
            if found - {"data", f".{RECORD_NAME}.partial"} or any((self.folder / "data").glob("*")):
                raise FileExistsError(f"{self.folder} exists and holds no {RECORD_NAME}: choose another output folder")
            (self.folder / "data").mkdir(parents=True, exist_ok=True)
            self._write_record({**record, "complete": False})
            return None
        given = json.loads(json.dumps({"format_version": FORMAT_VERSION, **record}))
        differing = [name for name in sorted((given.keys() | old.keys()) - FREE) if given.get(name) != old.get(name)]
        if differing and not old["complete"] and not self.path(0).is_file():
            # Nothing was labelled yet, so no label was made otherwise.
            self._write_record({**record, "complete": False})
            return None
        if differing:
            told = "; ".join(_difference(name, old.get(name), given.get(name)) for name in differing)
            raise ValueError(
                f"{self.folder} holds labels that were made otherwise: {told}. Choose another output folder, or "
                "remove this one"
            )
        return old if old["complete"] else None

    def record(self) -> dict[str, Any] | None:
        """What `labelling.json` holds, None if there is none.

        Raises:
            ValueError: it cannot be read.
        """
        path = self.folder / RECORD_NAME
        if not path.is_file():
            return None
        try:
            found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            if found["format_version"] != FORMAT_VERSION:
                raise ValueError(f"format version {found['format_version']!r}, this version reads {FORMAT_VERSION}")
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} cannot be read ({error}): choose another output folder") from error
        return found

    def finished(self) -> list[dict[str, Any]]:
        """What `write` was told of each finished shard, in order."""
        notes: list[dict[str, Any]] = []
        while self.path(len(notes)).is_file():
            path = self.path(len(notes))
            try:
                notes.append(json.loads(pq.read_schema(path).metadata[_KEY]))
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{path} is damaged ({error}): remove it, its rows are labelled again") from error
        return notes

    def features(self) -> Features | None:
        """Types of the columns of the shards, None if there is none yet."""
        path = self.path(0)
        return Features.from_arrow_schema(pq.read_schema(path)) if path.is_file() else None

    def write(self, number: int, rows: Dataset, note: Mapping[str, Any]) -> None:
        """Writes one shard, durably.

        Args:
            number: of the shard.
            rows: its rows.
            note: JSON values that `finished` gives back.
        """
        table = rows.data.table
        metadata = {**(table.schema.metadata or {}), _KEY: json.dumps(note).encode()}
        path = self.path(number)
        partial = path.with_name(f".{path.name}.partial")
        pq.write_table(table.replace_schema_metadata(metadata), partial)
        flush(partial)
        rename(partial, path)

    def finish(self, record: Mapping[str, Any]) -> None:
        """Says that all rows are labelled."""
        self._write_record({**record, "complete": True})

    def _write_record(self, record: Mapping[str, Any]) -> None:
        path = self.folder / RECORD_NAME
        partial = path.with_name(f".{path.name}.partial")
        text = json.dumps({"format_version": FORMAT_VERSION, **record}, indent=1, allow_nan=False)
        partial.write_text(text + "\n", encoding="utf-8")
        flush(partial)
        rename(partial, path)


def _difference(name: str, old: Any, new: Any) -> str:
    """The innermost values that differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        inner = [key for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key)]
        return "; ".join(_difference(f"{name}.{key}", old.get(key), new.get(key)) for key in inner)
    return f"{name} was {old!r}, is {new!r}"
