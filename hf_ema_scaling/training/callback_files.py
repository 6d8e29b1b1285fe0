"""Where `EMACallback` keeps its average in the stock Trainer's checkpoints, and what it checks on a resume."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainerState, TrainingArguments
from transformers.trainer import OPTIMIZER_NAME, OPTIMIZER_NAME_BIN, SCALER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from hf_ema_scaling.ema import AverageStateError, WeightAverage, load_average
from hf_ema_scaling.ema.durable import UNREADABLE_ZIP, check_zip
from hf_ema_scaling.ema.storage import STATE_NAME, check_average
from hf_ema_scaling.training.checkpoints import checkpoint_step, checkpoints_in
from hf_ema_scaling.training.student_files import (
    CHECKSUMS_NAME,
    RANDOM_STATES,
    checksum_faults,
    read_checksums,
    student_faults,
)

_OF_PYTORCH = (OPTIMIZER_NAME, OPTIMIZER_NAME_BIN, SCHEDULER_NAME, SCALER_NAME, RANDOM_STATES)


class NoAverageError(AverageStateError):
    """There is no average to resume, or what lies there cannot be read."""


def written_checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
    """The checkpoint that Trainer has just written for this state.

    A callback is not told the trial of a hyper-parameter search, whose checkpoints lie in a folder of their own. The
    right one is recognised by its `trainer_state.json`, which is exactly the state at hand.

    Raises:
        FileNotFoundError: There is none.
    """
    root, name = Path(str(args.output_dir)), f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
    if not state.is_hyper_param_search:
        checkpoint = root / name
        if checkpoint.is_dir():
            return checkpoint
        later = [other.name for other in checkpoints_in(root) if checkpoint_step(other) > state.global_step]
        if args.save_total_limit and later:
            raise FileNotFoundError(
                f"EMACallback saves the average into {checkpoint}, which save_total_limit={args.save_total_limit} has "
                f"deleted at once: {', '.join(later)} of an earlier run lie there and pass for newer. Move them away, "
                "or use another output_dir."
            )
        raise FileNotFoundError(
            f"EMACallback saves the average into {checkpoint}, which does not exist: it was deleted, or this Trainer "
            "writes its checkpoints elsewhere. Use save_strategy='no' and EMACallback.export()."
        )
    trials = [root / state.trial_name] if state.trial_name else sorted(root.iterdir()) if root.is_dir() else []
    found = [trial / name for trial in trials if holds_state(trial / name, state)]
    if not found:
        raise FileNotFoundError(
            f"EMACallback finds no folder of the trial {state.trial_params} with {name} of this state in {root}: it "
            "was deleted, or the search saves elsewhere. Use save_strategy='no' there and EMACallback.export()."
        )
    return max(found, key=lambda checkpoint: (checkpoint / TRAINER_STATE_NAME).stat().st_mtime_ns)


def holds_state(checkpoint: Path, state: TrainerState) -> bool:
    """Whether a checkpoint was written with exactly this state."""
    try:
        written = json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    # As text: a NaN among the logs is then equal to itself.
    return json.dumps(written, sort_keys=True) == json.dumps(dataclasses.asdict(state), sort_keys=True)


def average_to_resume(args: TrainingArguments, state: TrainerState, folder: str, resume_from: Path | None) -> Path:
    """Where the average of the step that is resumed should lie.

    Args:
        args: Trainer's arguments.
        state: The resumed state.
        folder: `folder_name` of the callback.
        resume_from: A checkpoint, or the folder of the average itself; None for the checkpoint in `output_dir`.
    """
    if resume_from is not None:
        return resume_from if (resume_from / STATE_NAME).is_file() else resume_from / folder
    trial = state.trial_name if state.is_hyper_param_search and state.trial_name else ""
    return Path(str(args.output_dir)) / trial / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}" / folder


def read_average(
    folder: Path, model: nn.Module, average: WeightAverage, *, step: int, keys: Iterable[str]
) -> dict[str, Any]:
    """Restores an average that the callback saved.

    Args:
        folder: `average_to_resume`.
        model: The student.
        average: Receives the saved average; unchanged where `NoAverageError` is raised.
        step: The optimizer step that training resumes at.
        keys: What the callback's state must have.

    Returns:
        The callback's state at the time of the save.

    Raises:
        NoAverageError: There is no folder, or it is damaged.
        AverageStateError: It was not written by the callback, or at another step.
    """
    try:
        saved = load_average(folder, model, average)
    except AverageStateError as error:
        others = sorted(other.parent.name for other in folder.parent.glob(f"*/{STATE_NAME}") if other.parent != folder)
        there = f" Other averages there, each belonging to a name=: {', '.join(others)}." if others else ""
        raise NoAverageError(f"training resumes at step {step}: {error}{there}") from error
    missing = sorted(set(keys) - saved.keys())
    if missing:
        raise AverageStateError(f"{folder} was not written by EMACallback: its state lacks {', '.join(missing)}.")
    if saved["global_step"] != step:
        raise AverageStateError(
            f"the average in {folder} is of step {saved['global_step']}, but training resumes at step {step}: resume "
            "both from the same checkpoint."
        )
    return saved


def average_faults(checkpoint: Path, folder: str) -> list[str]:
    """What keeps a run from resuming with the average in a checkpoint; empty when it is whole and of its step.

    Args:
        checkpoint: A checkpoint whose other files are complete.
        folder: `folder_name` of the callback.
    """
    try:
        saved = check_average(checkpoint / folder)
    except AverageStateError as error:
        return [str(error).split(". ")[0]]  # without the way out
    step = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME)).global_step
    if saved.get("global_step") != step:
        return [f"the average in its {folder!r} is of step {saved.get('global_step')}"]
    return _other_student(checkpoint, saved)


def files_faults(checkpoint: Path) -> list[str]:
    """What of Trainer's files in a checkpoint is torn, lost, or not as it was when the average was saved.

    Every record in PyTorch's files has a checksum; the other files have theirs in `checksums.json`. Without it (an
    older version wrote the checkpoint, or it was deleted to resume with files that were changed on purpose) it is the
    records alone.
    """
    found = []
    for path in sorted(path for pattern in _OF_PYTORCH for path in checkpoint.glob(pattern)):
        try:
            check_zip(path)
        except UNREADABLE_ZIP as error:
            found.append(f"{path.name} is not readable ({type(error).__name__}: {error})")
    return found or checksum_faults(checkpoint)


def _other_student(checkpoint: Path, saved: Mapping[str, Any]) -> list[str]:
    """Which of the student's weights in a checkpoint, whose files are whole, are not those that the average is of."""
    expected: dict[str, str] = saved.get("student", {})
    if not saved.get("checksums"):  # of an older version, where nothing else has verified them
        there = {name: value for name, value in expected.items() if (checkpoint / name).is_file()}
        return student_faults(checkpoint, there)
    record = read_checksums(checkpoint)
    now = {} if record is None else record["crc32"]
    return [
        f"{name} is of another save than the average: its CRC-32 is {now[name]}, and was {value} then"
        for name, value in expected.items()
        if now.get(name, value) != value
    ]


def check_same_run(folder: Path, saved: Mapping[str, Any], model: nn.Module, average: WeightAverage) -> None:
    """Compares the distance between average and student with that of the save.

    Raises:
        AverageStateError: They differ: average and student are of different runs.
    """
    then, now = saved.get("student_distance"), average.distance(model)
    if then is not None and not math.isclose(then, now, rel_tol=1e-3, abs_tol=1e-6):
        raise AverageStateError(
            f"the average in {folder} is of another run: its distance to the student was {then:.6g} when it was saved "
            f"and is {now:.6g} to the weights that are resumed. Name the right folder in resume_from."
        )


def refuse_damaged_files(checkpoint: Path, found: list[str]) -> None:
    """Refuses to go on from a checkpoint in which something is wrong.

    Args:
        checkpoint: The folder that Trainer is believed to have resumed from.
        found: `files_faults` of it.

    Raises:
        AverageStateError: `found` is not empty.
    """
    if found:
        raise AverageStateError(
            f"{checkpoint} cannot be resumed: {'; '.join(found)}. Resume from another checkpoint "
            f"(callback.newest_checkpoint({str(checkpoint.parent)!r}) finds the newest whole one), or restore the "
            "file from a copy."
        )


def best_faults(best: Path) -> list[str]:
    """What of the best checkpoint, whose student is about to be loaded, is not as it was saved."""
    return checksum_faults(best) if best.is_dir() else ["there is no such folder"]


def refuse_best(best: str, found: list[str]) -> None:
    """Refuses to go on with other weights than the best ones.

    Args:
        best: The checkpoint.
        found: `best_faults` of it.

    Raises:
        AverageStateError: `found` is not empty.
    """
    if found:
        raise AverageStateError(
            f"The best model, {best}, cannot be loaded: {'; '.join(sorted(set(found)))}. Training is done, and no "
            "checkpoint was deleted: restore the file from a copy, or take another checkpoint."
        )


def refuse_other_student(checkpoint: Path, folder: str, saved: Mapping[str, Any]) -> None:
    """Compares the student beside the average with that of the save; what is not there is passed over.

    Raises:
        AverageStateError: They are not of one save.
    """
    found = _other_student(checkpoint, saved)
    if found:
        raise AverageStateError(
            f"{checkpoint} cannot be resumed: {'; '.join(found)}. Resume from another checkpoint, or restore the file "
            f"from a copy. If the student was changed on purpose: delete {CHECKSUMS_NAME} and {folder!r} in the "
            "checkpoint, and begin a new average of it by on_missing_average='rebuild'."
        )
