"""Which checkpoint a run resumes from, and what keeps it from resuming from one."""

from __future__ import annotations

import contextlib
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError, safe_open
from transformers.trainer import OPTIMIZER_NAME, OPTIMIZER_NAME_BIN, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, logging

from hf_ema_scaling.ema import AverageStateError, WeightAverage, load_average
from hf_ema_scaling.ema.durable import UNREADABLE_ZIP, check_zip
from hf_ema_scaling.ema.storage import check_average
from hf_ema_scaling.training.run_state import read_run_state
from hf_ema_scaling.training.student_files import checksum_faults, student_faults

if TYPE_CHECKING:
    from transformers import Trainer

    from hf_ema_scaling.training.averaged_steps import AveragedSteps

logger = logging.get_logger(__name__)

EMA_FOLDER = "ema"
GATHERED_NAME = "pytorch_model_fsdp.bin"  # of accelerate, under FSDP with FULL_STATE_DICT
UNREADABLE = (KeyError, TypeError, SafetensorError, *UNREADABLE_ZIP)


class IncompleteCheckpointError(ValueError):
    """A checkpoint lacks what resuming needs; the message names it."""


def checkpoint_to_resume(trainer: AveragedSteps, given: str | bool | None) -> str | None:
    """The checkpoint that `train(resume_from_checkpoint=given)` resumes, verified; the main process decides for all.

    Args:
        trainer: The trainer; with `on_missing_average="rebuild"` the checkpoint may lack a sound average.
        given: None or False for none; True for the newest complete one in `output_dir`; else its path.

    Raises:
        ValueError: There is no checkpoint in `output_dir`.
        IncompleteCheckpointError: What is given, or every checkpoint in `output_dir`, is incomplete.
        AverageStateError: The average of the given checkpoint is missing or damaged.
    """
    if not given:
        return None
    average = trainer.args.on_missing_average == "raise"
    answer: list[Any] = [None]
    if trainer.accelerator.is_main_process:
        try:
            if given is True:
                answer = [str(newest_complete_checkpoint(str(trainer.args.output_dir), average=average))]
            else:
                refuse_incomplete(given, average=average)
                answer = [str(given)]
        except (ValueError, AverageStateError) as error:
            answer = [error]
    if trainer.accelerator.num_processes > 1:
        broadcast_object_list(answer)
    if isinstance(answer[0], Exception):
        raise answer[0]
    return str(answer[0])


def restored_average(trainer: AveragedSteps, checkpoint: str | Path) -> WeightAverage:
    """The average in a checkpoint; with `on_missing_average="rebuild"` a new one of the student where it is lost.

    Args:
        trainer: The trainer, whose model holds the checkpoint's student.
        checkpoint: The folder.

    Raises:
        AverageStateError: It is missing or damaged, and not to be rebuilt.
    """
    average = trainer.ensure_average()
    try:
        load_average(Path(checkpoint) / EMA_FOLDER, trainer.model, average)
    except AverageStateError as error:
        if trainer.args.on_missing_average == "raise":
            raise
        logger.warning(f"The average is rebuilt from the student's weights in {checkpoint}. {error}")
        trainer.average = None
        average = trainer.ensure_average()
    return average


def newest_complete_checkpoint(output_dir: str | Path, *, average: bool = True) -> Path:
    """The newest `checkpoint-N` in a folder that a run can resume from; warns of incomplete ones that are newer.

    Args:
        output_dir: Where the checkpoints lie.
        average: Whether its average must be there and sound.

    Raises:
        ValueError: There is no checkpoint.
        IncompleteCheckpointError: None is complete; the message says of each what is missing.
    """
    passed_over: list[str] = []
    for checkpoint in reversed(checkpoints_in(Path(output_dir))):
        missing = what_is_missing(checkpoint, average=average)
        if not missing:
            if passed_over:
                logger.warning(f"Resuming from {checkpoint}. Newer but not complete: {' | '.join(passed_over)}.")
            return checkpoint
        passed_over.append(f"{checkpoint.name}: {'; '.join(missing)}")
    if passed_over:
        raise IncompleteCheckpointError(
            f"no checkpoint in {output_dir} is complete ({' | '.join(passed_over)}). Restore one from a copy, or "
            "start anew without resume_from_checkpoint"
        )
    raise ValueError(f"there is no checkpoint to resume from in {output_dir}")


def what_is_missing(checkpoint: str | Path, *, average: bool = True) -> list[str]:
    """What keeps a run from resuming from a checkpoint; empty when it is complete.

    Verifies that JSON parses, that safetensors files have the length their headers say, the CRC-32 of the student's
    files, of shards, of every record in PyTorch's files and of what else is resumed (Trainer's state, schedule, random
    states of every process, cached labels, places in streams), and with `average` the checksums of the average's
    tensors. What DeepSpeed writes is not verified.

    Args:
        checkpoint: The folder.
        average: Whether its average and run state must be there and sound.
    """
    folder = Path(checkpoint)
    if not folder.is_dir():
        return ["there is no such folder"]
    found = _trainers_faults(folder)
    if average:
        try:
            refuse_damaged_average(folder)
        except AverageStateError as error:
            found.append(str(error).split(". ")[0])  # without the way out
    return found


def refuse_incomplete(checkpoint: str | Path, *, average: bool = True) -> None:
    """Refuses a checkpoint that a run could not resume from, or would resume half.

    Raises:
        IncompleteCheckpointError: naming what of Trainer's part is missing.
        AverageStateError: naming what is wrong with the average.
    """
    folder = Path(checkpoint)
    found = _trainers_faults(folder) if folder.is_dir() else ["there is no such folder"]
    if found:
        raise IncompleteCheckpointError(
            f"{checkpoint} cannot be resumed: {'; '.join(found)}. Resume from another checkpoint, or let "
            "train(resume_from_checkpoint=True) find the newest complete one"
        )
    if average:
        refuse_damaged_average(folder)


def refuse_damaged_average(checkpoint: Path) -> None:
    """Refuses a checkpoint whose average or run state is missing or damaged.

    Raises:
        AverageStateError: naming the file.
    """
    state = read_run_state(checkpoint)
    check_average(checkpoint / EMA_FOLDER)
    step = _global_step(checkpoint)
    if step is not None and state.global_step != step:
        raise AverageStateError(
            f"The average in {checkpoint / EMA_FOLDER} is damaged: it is of step {state.global_step} and "
            f"{TRAINER_STATE_NAME} of step {step}. Restore the folder from a copy, or resume from another checkpoint."
        )


def refuse_damaged_best(trainer: Trainer) -> None:
    """Refuses to load the best model at the end of a run where its files are not as they were saved.

    Trainer would load a flipped bit, and without the files go on with the last weights. The main process decides.

    Raises:
        IncompleteCheckpointError: naming what is wrong.
        AverageStateError: The run state beside it is missing or damaged.
    """
    answer: list[Any] = [None]
    if trainer.accelerator.is_main_process:
        best = Path(str(trainer.state.best_model_checkpoint))
        try:
            if found := student_faults(best, read_run_state(best).student):
                raise IncompleteCheckpointError(
                    f"the best model, {best}, cannot be loaded: {'; '.join(found)}. Training is done, and no "
                    "checkpoint was deleted: restore the file from a copy, or take another checkpoint"
                )
        except (IncompleteCheckpointError, AverageStateError) as error:
            answer = [error]
    if trainer.accelerator.num_processes > 1:
        broadcast_object_list(answer)
    if answer[0] is not None:
        raise answer[0]


def _trainers_faults(folder: Path) -> list[str]:
    """What is wrong with the part of a checkpoint that Trainer writes."""
    try:
        names = {path.name for path in folder.iterdir()}
    except OSError as error:
        return [f"it is not readable ({error})"]
    deepspeed = any(name.startswith("global_step") for name in names)
    sharded = {name for name in names if name.startswith(("pytorch_model_fsdp", "optimizer_"))}
    found = []
    if TRAINER_STATE_NAME not in names:
        found.append(f"{TRAINER_STATE_NAME} is missing: its saving did not finish")
    if not any(name.endswith(".safetensors") for name in names | _adapters(folder)) and not deepspeed | bool(sharded):
        found.append(f"{SAFE_WEIGHTS_NAME} is missing")
    if not deepspeed | bool(sharded) and not {OPTIMIZER_NAME, OPTIMIZER_NAME_BIN} & names:
        found.append(f"{OPTIMIZER_NAME} is missing (no optimizer state: save_only_model?)")
    if not deepspeed and SCHEDULER_NAME not in names:
        found.append(f"{SCHEDULER_NAME} is missing")
    if not any(name.startswith("rng_state") for name in names):
        found.append("rng_state.pth is missing")
    found.extend(faults_of(folder, sorted(names)))
    if not found and _global_step(folder) is None:
        found.append(f"{TRAINER_STATE_NAME} has no global_step")
    if not found:
        # Where the run state is lost with the average, so are the student's checksums.
        with contextlib.suppress(AverageStateError):
            found.extend(student_faults(folder, read_run_state(folder).student))
        found.extend(checksum_faults(folder))
    return found


def faults_of(folder: Path, names: list[str]) -> list[str]:
    """What is missing or unreadable of the named files of a folder."""
    found = []
    for name in names:
        if name.startswith("."):
            continue  # what was never finished is no part of a checkpoint
        try:
            wanted = _verify(folder / name)
        except FileNotFoundError:
            found.append(f"{name} is missing")
        except UNREADABLE as error:
            found.append(f"{name} is not readable ({type(error).__name__}: {error})")
        else:
            found.extend(f"{shard} is missing" for shard in wanted if not (folder / shard).is_file())
    return found


def _verify(path: Path) -> list[str]:
    """Reads a file as far as its kind can be verified; the files that it refers to."""
    if path.suffix == ".json":
        content = json.loads(path.read_text(encoding="utf-8"))
        if path.name == SAFE_WEIGHTS_INDEX_NAME:
            return sorted(set(content["weight_map"].values()))
    elif path.suffix == ".safetensors":
        with safe_open(path, "pt"):
            pass
    elif (path.suffix in (".pt", ".pth") or path.name in (OPTIMIZER_NAME_BIN, GATHERED_NAME)) and path.is_file():
        check_zip(path)
    return []


def _adapters(folder: Path) -> set[str]:
    return {path.name for path in folder.glob("*/adapter_model.safetensors")}


def _global_step(folder: Path) -> int | None:
    try:
        return int(json.loads((folder / TRAINER_STATE_NAME).read_text(encoding="utf-8"))["global_step"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def checkpoints_in(folder: Path) -> list[Path]:
    """The folders `checkpoint-N`, by their number."""
    if not folder.is_dir():
        return []
    found = (path for path in folder.iterdir() if checkpoint_step(path) >= 0 and path.is_dir())
    return sorted(found, key=checkpoint_step)


def checkpoint_step(path: Path) -> int:
    """N of a folder `checkpoint-N`; -1 for others."""
    match = re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)", path.name)
    return -1 if match is None else int(match[1])
