"""Checksums of the student's weights in a checkpoint: safetensors has none, and would load a flipped bit."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from hf_ema_scaling.ema.durable import file_checksum
from hf_ema_scaling.hub.run_folder import WEIGHTS


def student_checksums(folder: str | Path) -> dict[str, str]:
    """CRC-32 of each file of the student's weights, by its path in the folder.

    They are read once more, from memory as a rule: about a second per gigabyte, on one process, where writing them out
    (the average's as well, and the optimizer's state) takes several times as long. What FSDP saves in shards of its
    own format (`pytorch_model_fsdp_0/`) has none.

    Args:
        folder: A checkpoint in which the student is complete; its average may be there.
    """
    folder = Path(folder)
    files = [path for path in folder.glob("*.safetensors") if WEIGHTS.fullmatch(path.name)]
    # Adapters with names have folders of their own; so has the average.
    files += [path for path in folder.glob("*/adapter_model.safetensors") if not path.parent.name.startswith("ema")]
    return {path.relative_to(folder).as_posix(): file_checksum(path) for path in sorted(files)}


def student_faults(folder: str | Path, expected: Mapping[str, str]) -> list[str]:
    """What of the student's weights in a checkpoint is not as it was saved; empty for nothing.

    Args:
        folder: The checkpoint.
        expected: `student_checksums` of the save.
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
