"""Files that neither a kill nor a power cut can tear: data reaches the disk before the name that promises it.

And what tells a whole file from one that others have torn, or a disk has damaged.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

UNREADABLE_ZIP = (OSError, ValueError, EOFError, zipfile.BadZipFile)
"""What `check_zip` raises."""
_DOS_FOLDER = 0x10
SEAL = "own_crc32"
"""Field of a JSON record for the checksum of its other fields."""


def flush(path: str | Path) -> None:
    """Waits until a file, or a folder with everything in it, is on the disk (fsync).

    Raises:
        OSError: A file could not be written out.
    """
    path = Path(path)
    if path.is_dir():
        for entry in sorted(path.iterdir()):
            flush(entry)
        flush_names(path)
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def rename(source: str | Path, target: str | Path) -> None:
    """Gives a flushed file or folder its name, durably; a file of that name is replaced, a folder must not exist.

    Raises:
        OSError: As `os.replace`.
    """
    os.replace(source, target)
    flush_names(Path(target).parent)


def flush_names(folder: str | Path) -> None:
    """Waits until the names in a folder are on the disk, as far as its file system can say so."""
    # Some network file systems refuse to flush a directory; their names are as durable as they get.
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def free_at(folder: Path) -> str:
    """How much room the disk of a folder has, in words for an error message."""
    free = shutil.disk_usage(folder).free if folder.is_dir() else 0
    return f"{free / 1e9:.1f} GB are free there"


def check_zip(path: str | Path) -> None:
    """Verifies the CRC-32 of every record in a file that `torch.save` wrote.

    Raises:
        FileNotFoundError: There is no such file.
        OSError, ValueError, EOFError, zipfile.BadZipFile: It is torn or damaged.
    """
    try:
        with zipfile.ZipFile(path) as file:
            broken = file.testzip() if torch.serialization.get_crc32_options() else None
            # torch's reader takes a record with this flag for a folder, and fills its tensor with what lies in memory.
            folders = [record.filename for record in file.infolist() if record.external_attr & _DOS_FOLDER]
    except UNREADABLE_ZIP:
        raise
    except Exception as error:
        # A flipped bit of a header makes records encrypted or compressed ones: what then fails may raise anything.
        raise ValueError(f"{type(error).__name__}: {error}") from error
    if broken is not None:
        raise ValueError(f"wrong CRC-32 of its record {broken}")
    if folders:
        raise ValueError(f"its record {folders[0]} is marked as a folder")


def file_checksum(path: str | Path) -> str:
    """CRC-32 of a file's content, as eight hexadecimal digits.

    Raises:
        OSError: It cannot be read.
    """
    checksum = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            checksum = zlib.crc32(block, checksum)
    return f"{checksum:08x}"


def sealed_json(record: Mapping[str, Any]) -> str:
    """A record as JSON text with a checksum of itself in the field `own_crc32`; one that it has is replaced.

    Raises:
        TypeError, ValueError: The record is not JSON, or has NaN or infinity.
    """
    content = {key: value for key, value in record.items() if key != SEAL}
    return json.dumps(content | {SEAL: _record_checksum(content)}, indent=1, allow_nan=False) + "\n"


def check_seal(record: Mapping[str, Any]) -> None:
    """Verifies the checksum in a record that was parsed; one without (of an older version) passes.

    Raises:
        ValueError: The record is not the one that was written.
    """
    if SEAL in record and record[SEAL] != (now := _record_checksum(record)):
        raise ValueError(f"its CRC-32 is {now}, {SEAL} says {record[SEAL]}")


def _record_checksum(record: Mapping[str, Any]) -> str:
    # As it will be read: keys are strings then, tuples lists. Neither order of keys nor white space counts.
    content = json.loads(json.dumps(dict(record), allow_nan=False))
    content.pop(SEAL, None)
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return f"{zlib.crc32(text.encode()):08x}"
