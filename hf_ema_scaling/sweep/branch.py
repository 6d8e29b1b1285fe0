"""Where a run of a sweep goes on from: the checkpoint of its phase, or a copy of it with another order of data."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hf_ema_scaling.ema.durable import sealed_json
from hf_ema_scaling.ema.storage import STATE_NAME
from hf_ema_scaling.sweep.jobs import SweepJob
from hf_ema_scaling.training.checkpoints import newest_complete_checkpoint


@contextmanager
def branch_of(job: SweepJob) -> Iterator[str | None]:
    """The checkpoint to resume, None for a run from its initialisation.

    A run that forks gets a copy that is removed afterwards.

    Raises:
        FileNotFoundError: when the phase left no complete checkpoint.
    """
    if job.branch is None:
        yield None
        return
    try:
        checkpoint = newest_complete_checkpoint(job.branch.folder)
    except ValueError as error:
        raise FileNotFoundError(f"{error}: remove {job.branch.folder} to run it again") from error
    if not job.forks:
        yield str(checkpoint)
        return
    with tempfile.TemporaryDirectory(dir=job.folder, prefix="fork-") as folder:
        yield str(fork(checkpoint, Path(folder), seed=int(job.settings["data_seed"])))


def fork(checkpoint: Path, folder: Path, *, seed: int) -> Path:
    """Copies a checkpoint so that the order of data from there on is that of `seed`; what was drawn stays drawn.

    Args:
        checkpoint: `checkpoint-N`, of the trainers of this library.
        folder: receives a folder of the same name.
        seed: of the order of data.

    Returns:
        The copy.
    """
    copy = folder / checkpoint.name
    shutil.copytree(checkpoint, copy)
    path = copy / "ema" / STATE_NAME
    record = json.loads(path.read_text(encoding="utf-8"))
    record["state"]["identity"]["seed"] = seed
    path.write_text(sealed_json(record), encoding="utf-8")
    return copy
