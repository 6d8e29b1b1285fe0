"""Checksums of what in a checkpoint has none of its own, and would be loaded with a flipped bit, or not be missed.

That is the student's weights (safetensors), what accelerate saves in shards under FSDP2, optimizer included, and the
small files that a resume reads: Trainer's state, schedule, random states, cached labels and places in streams.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from transformers.trainer import TRAINER_STATE_NAME

from hf_ema_scaling.ema.durable import file_checksum
from hf_ema_scaling.hub.run_folder import WEIGHTS
from hf_ema_scaling.labels.cache import CACHE_NAME

CHECKSUMS_NAME = "checksums.json"
_RESUMED = ("scheduler.pt", "scaler.pt", "rng_state*.pth", "stream_state_*.json", CACHE_NAME)


def student_checksums(folder: str | Path) -> dict[str, str]:
    """CRC-32 of each file of the student's weights, by its path in the folder.

    They are read once more, from memory as a rule: about a second per gigabyte, on one process, where writing them out
    (the average's as well, and the optimizer's state) takes several times as long.

    Args:
        folder: A checkpoint in which the student is complete; its average may be there.
    """
    folder = Path(folder)
    files = [path for path in folder.glob("*.safetensors") if WEIGHTS.fullmatch(path.name)]
    # Adapters with names have folders of their own; so has the average.
    files += [path for path in folder.glob("*/adapter_model.safetensors") if not path.parent.name.startswith("ema")]
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


def write_checksums(folder: str | Path, state: Path) -> None:
    """Writes `checksums.json` into a checkpoint that is complete but for Trainer's state.

    The optimizer's state is left out: the format has a checksum for every record, and reading it once more costs.

    Args:
        folder: The checkpoint.
        state: What is to become its `trainer_state.json`.
    """
    folder = Path(folder)
    files = sorted(path for pattern in _RESUMED for path in folder.glob(pattern))
    checksums = {path.name: file_checksum(path) for path in files} | {TRAINER_STATE_NAME: file_checksum(state)}
    text = json.dumps({"format_version": 1, "crc32": checksums | shard_checksums(folder)}, indent=1)
    (folder / CHECKSUMS_NAME).write_text(text + "\n", encoding="utf-8")


def checksum_faults(folder: str | Path) -> list[str]:
    """What `checksums.json` names that is not as it was saved; empty for nothing, and where there is no such file.

    Raises:
        ValueError, KeyError, TypeError: It does not say.
    """
    path = Path(folder) / CHECKSUMS_NAME
    if not path.is_file():
        return []
    found = student_faults(folder, json.loads(path.read_text(encoding="utf-8"))["crc32"])
    return [f"{fault} (delete {CHECKSUMS_NAME} to resume all the same)" for fault in found]


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
