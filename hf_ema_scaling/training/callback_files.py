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
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from hf_ema_scaling.ema import AverageStateError, WeightAverage, load_average
from hf_ema_scaling.ema.storage import STATE_NAME, check_average
from hf_ema_scaling.training.student_files import student_faults


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
    return student_faults(checkpoint, saved.get("student", {}))


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


def refuse_damaged_student(checkpoint: Path, saved: Mapping[str, Any]) -> None:
    """Compares the files of the student beside the average with those of the save; what is not there is passed over.

    Raises:
        AverageStateError: One has other bits.
    """
    there = {name: value for name, value in saved.get("student", {}).items() if (checkpoint / name).is_file()}
    found = student_faults(checkpoint, there)
    if found:
        raise AverageStateError(
            f"{checkpoint} cannot be resumed: {'; '.join(found)}. Resume from another checkpoint, or restore the file "
            "from a copy."
        )
