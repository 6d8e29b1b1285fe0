"""How a checkpoint is committed: it is complete, or not one at all.

Trainer assembles `checkpoint-N/` in place, writes `trainer_state.json` last and then deletes older checkpoints. Here
that file is the **commit**: it appears by a rename, after everything else in the folder is on the disk and every
process has written its part, and before anything is deleted. A folder without it is what a killed save left behind.
"""

from __future__ import annotations

import functools
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

from hf_ema_scaling.ema.durable import flush, flush_names, free_at, rename
from hf_ema_scaling.training.arguments import EMATrainingArguments
from hf_ema_scaling.training.checkpoints import checkpoint_step, checkpoints_in, faults_of, what_is_missing
from hf_ema_scaling.training.student_files import write_checksums

if TYPE_CHECKING:
    from hf_ema_scaling.training.reference_run import ReferenceRun

logger = logging.get_logger(__name__)

# Written by Trainer's just-in-time checkpoints until after older checkpoints are gone; the commit says more.
JIT_MARK = "checkpoint-is-incomplete.txt"


@contextmanager
def committed(trainer: ReferenceRun, trial: Any) -> Iterator[None]:
    """Inside, Trainer saves a checkpoint; it commits it, or leaves nothing of it when an error ends it.

    What already lies in the folder (the same step of an earlier attempt) is deleted first: a half of each would pass
    for a whole. With `save_total_limit`, incomplete checkpoints are deleted after the commit, so that none takes the
    place of a complete one among those that Trainer keeps.

    Args:
        trainer: The trainer that saves; the same on every process.
        trial: Of a hyper-parameter search.
    """
    state, writes = trainer.state, trainer.args.should_save
    folder = Path(trainer._get_output_dir(trial=trial)) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
    if writes:
        _clear(folder)
    trainer.accelerator.wait_for_everyone()
    # Trainer calls it when all else is written, and then deletes older checkpoints.
    commit = functools.partial(_commit, state, trainer.args)
    state.save_to_json = commit  # type: ignore[method-assign]
    try:
        yield
    except BaseException as error:
        # After the commit (while it is pushed, say) it stays.
        if writes and not (folder / TRAINER_STATE_NAME).exists():
            shutil.rmtree(folder, ignore_errors=True)
            error.add_note(_not_saved(folder))
        raise
    finally:
        del state.save_to_json


def _commit(state: TrainerState, args: EMATrainingArguments, json_path: str) -> None:
    path = Path(json_path)
    partial = path.with_name(f".{path.name}.partial")
    type(state).save_to_json(state, str(partial))
    write_checksums(path.parent, partial)
    flush(path.parent)
    rename(partial, path)
    flush_names(path.parent.parent)
    if not args.save_total_limit:
        return
    average = args.on_missing_average == "raise"
    for other in checkpoints_in(path.parent.parent):
        if other == path.parent or str(other) == state.best_model_checkpoint:
            continue
        # The full check reads everything: only for what Trainer may take for the newest, by its number.
        if checkpoint_step(other) > checkpoint_step(path.parent) and not args.save_only_model:
            faults = what_is_missing(other, average=average)
        else:
            faults = faults_of(other, [TRAINER_STATE_NAME])
        if faults:
            logger.warning(f"Deleting {other}, which is not complete: {'; '.join(faults)}.")
            shutil.rmtree(other, ignore_errors=True)


def _clear(folder: Path) -> None:
    if not folder.is_dir():
        return
    first = folder / TRAINER_STATE_NAME  # without it, it is no checkpoint any more
    for entry in [*([first] if first.exists() else []), *(entry for entry in folder.iterdir() if entry != first)]:
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        elif entry.name != JIT_MARK:
            entry.unlink()


def _not_saved(folder: Path) -> str:
    complete = (path for path in reversed(checkpoints_in(folder.parent)) if not what_is_missing(path))
    newest = next(complete, None)
    return f"{folder} was not saved and its parts were deleted; {free_at(folder.parent)}. " + (
        "No earlier checkpoint is complete."
        if newest is None
        else f"{newest.name} is complete: train(resume_from_checkpoint=True) continues from it."
    )
