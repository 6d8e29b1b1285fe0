"""Checksums of what in a checkpoint has none of its own, and would be loaded with a flipped bit, or not be missed.

That is the student's weights (safetensors), what accelerate saves in shards under FSDP2, optimizer included, and the
small files that a resume reads: Trainer's state, schedule, random states, cached labels and places in streams.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers.trainer import OPTIMIZER_NAME, OPTIMIZER_NAME_BIN, TRAINER_STATE_NAME

from hf_ema_scaling.ema.durable import check_seal, file_checksum, flush, rename, sealed_json
from hf_ema_scaling.hub.run_folder import WEIGHTS
from hf_ema_scaling.labels.cache import CACHE_NAME

CHECKSUMS_NAME = "checksums.json"
RANDOM_STATES = "rng_state*.pth"
_RESUMED = ("scheduler.pt", "scaler.pt", "stream_state_*.json", CACHE_NAME)


def student_checksums(folder: str | Path) -> dict[str, str]:
    """CRC-32 of each file of the student's weights, by its path in the folder.

    They are read once more, from memory as a rule: about a second per gigabyte, on one process, where writing them out
    (the average's as well, and the optimizer's state) takes several times as long.

    Args:
        folder: A checkpoint in which the student is complete; its average may be there.
    """
    folder = Path(folder)
    # Adapters with names have folders of their own, and so have modules of sentence-transformers; and the average.
    found = [*folder.glob("*.safetensors"), *folder.glob("*/*.safetensors")]
    inside = [path for path in found if path.parent == folder or not path.parent.name.startswith(("ema", "."))]
    files = [path for path in inside if WEIGHTS.fullmatch(path.name)]
    return {path.relative_to(folder).as_posix(): file_checksum(path) for path in sorted(files)}


def shard_checksums(folder: str | Path) -> dict[str, str]:
    """CRC-32 of each file of a model or optimizer in shards (`pytorch_model_fsdp_0/`, `optimizer_0/`), by its path.

    On a machine of several, of the files that it can see.

    Args:
        folder: A checkpoint in which every process has written its shards.
    """
    folder = Path(folder)
    folders = [path for pattern in ("pytorch_model_fsdp_*", "optimizer_*") for path in folder.glob(pattern)]
    files = sorted(path for place in folders for path in place.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): file_checksum(path) for path in files}


def write_checksums(
    folder: str | Path,
    state: Path,
    *,
    student: Mapping[str, str] | None = None,
    random_states: str = RANDOM_STATES,
) -> None:
    """Writes `checksums.json` into a checkpoint that is complete but for its commit, and makes it durable.

    Of the optimizer's state it says only that there is one: the format has a checksum for every record, and reading it
    once more costs.

    Args:
        folder: The checkpoint.
        state: What is, or is to become, its `trainer_state.json`.
        student: `student_checksums` of the checkpoint, if nothing else there has them.
        random_states: Pattern of the files with random states that are written by now.
    """
    folder = Path(folder)
    files = sorted(path for pattern in (*_RESUMED, random_states) for path in folder.glob(pattern))
    checksums = {path.name: file_checksum(path) for path in files} | {TRAINER_STATE_NAME: file_checksum(state)}
    record = {
        "format_version": 1,
        "crc32": checksums | shard_checksums(folder) | dict(student or {}),
        "present": [name for name in (OPTIMIZER_NAME, OPTIMIZER_NAME_BIN) if (folder / name).is_file()],
    }
    partial = folder / f".{CHECKSUMS_NAME}.partial"
    try:
        partial.write_text(sealed_json(record), encoding="utf-8")
        flush(partial)
        rename(partial, folder / CHECKSUMS_NAME)
    finally:
        partial.unlink(missing_ok=True)


def read_checksums(folder: str | Path) -> dict[str, Any] | None:
    """What `checksums.json` says, `crc32` and `present`; None where there is no such file.

    Raises:
        OSError, ValueError, KeyError, TypeError: It cannot be read, or is not as it was written.
    """
    path = Path(folder) / CHECKSUMS_NAME
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    check_seal(record)
    return {"crc32": dict(record["crc32"]), "present": list(record.get("present", ()))}


def checksum_faults(folder: str | Path) -> list[str]:
    """What `checksums.json` names that is not as it was saved; empty for nothing, and where there is no such file."""
    way_out = f"(delete {CHECKSUMS_NAME} to resume all the same)"
    try:
        record = read_checksums(folder)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return [f"{CHECKSUMS_NAME} is not readable ({type(error).__name__}: {error}) {way_out}"]
    if record is None:
        return []
    found = [f"{name} is missing" for name in record["present"] if not (Path(folder) / name).is_file()]
    found += student_faults(folder, record["crc32"])
    return [f"{fault} {way_out}" for fault in found]


def student_faults(folder: str | Path, expected: Mapping[str, str]) -> list[str]:
    """What of the student's files in a checkpoint is not as it was saved; empty for nothing.

    Args:
        folder: The checkpoint.
        expected: `student_checksums` of the save, or `shard_checksums`.
    """
    found = []
    for name, checksum in expected.items():
        try:
            now = file_checksum(Path(folder) / name)
        except FileNotFoundError:
            found.append(f"{name} is missing")
        except OSError as error:
            found.append(f"{name} is not readable ({error})")
        else:
            if now != checksum:
                found.append(
                    f"{name} is damaged, or of another step than the average: its CRC-32 is {now}, and was {checksum} "
                    "when both were saved"
                )
    return found
