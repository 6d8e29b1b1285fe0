"""The average in a plain Accelerate loop: `register_average` puts it into what `save_state` and `load_state` move."""

from __future__ import annotations

import math
import warnings
import weakref
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate.utils import DistributedType, gather_object
from torch import nn

from hf_ema_scaling.ema.average import WeightAverage
from hf_ema_scaling.ema.folders import folder_name
from hf_ema_scaling.ema.half_precision import warn_of_half_precision
from hf_ema_scaling.ema.loop_files import (
    changed_tensors,
    checksums,
    delete_older,
    faults,
    load_student,
    student_file,
)
from hf_ema_scaling.ema.names import unwrap
from hf_ema_scaling.ema.storage import AverageStateError, OnMissing, load_average, read_state, save_average
from hf_ema_scaling.scaling.schedule import ReferenceClock

if TYPE_CHECKING:
    from accelerate import Accelerator

_REGISTERED: weakref.WeakKeyDictionary[Accelerator, set[str]] = weakref.WeakKeyDictionary()


class AverageRegistration:
    """What `register_average` returns; `remove` ends it.

    Args:
        accelerator: Where the average is registered.
        folder: Its folder in each checkpoint.
        handles: The hooks.
    """

    def __init__(self, accelerator: Accelerator, folder: str, handles: list[Any]) -> None:
        self.folder = folder
        self._accelerator = accelerator
        self._handles = handles

    def remove(self) -> None:
        """From now on `save_state` and `load_state` leave the average out."""
        for handle in self._handles:
            handle.remove()
        _REGISTERED[self._accelerator].discard(self.folder)


def register_average(
    accelerator: Accelerator,
    model: nn.Module,
    average: WeightAverage,
    clock: ReferenceClock,
    *,
    name: str | None = None,
    on_missing_average: OnMissing = "raise",
) -> AverageRegistration:
    """Makes `accelerator.save_state` save the average, and `accelerator.load_state` restore it, bit for bit.

    ```python
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    average, clock = WeightAverage(model), ReferenceClock(64)
    register_average(accelerator, model, average, clock)

    watch = SkipWatch()  # accelerate's own flag is wrong for fused optimizers

    for batch in loader:
        ...
        watch.before_step(optimizer)
        optimizer.step()
        kappa = clock.advance(samples_of_this_step_on_all_processes)
        if not watch.was_skipped(optimizer):
            average.update(model, momentum, kappa)
    accelerator.save_state(f"checkpoint-{step}.partial")
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        os.rename(f"checkpoint-{step}.partial", f"checkpoint-{step}")
    ```

    Save into a folder that is not there yet, as above: a save that is killed then costs nothing. In a folder with an
    older checkpoint, that is deleted first, so what is left of a killed save lacks files and is refused.

    `load_state` verifies every file that it will read before it restores anything: that none is missing or torn,
    that PyTorch's files (optimizers, schedulers, gradient scaler, random states, samplers and places of data loaders,
    objects of your own) have the CRC-32 of their records, and that the student's weights are bit for bit those that
    were saved with this average. A folder with the weights of two steps is refused, and so is a flipped bit. Not
    verified: models beside the student (safetensors has no checksums), and under FSDP and DeepSpeed, whose files
    accelerate reads first, everything but the distance between student and average. Hooks of your own that take
    models out of what accelerate saves and loads are registered before this.

    The average becomes the folder `ema` of the checkpoint: safetensors and JSON, complete or absent, and for a
    transformers model what `from_pretrained` loads. The number of updates and the clock's units go with it. With
    gradient accumulation, update where `accelerator.sync_gradients` is true, with the samples of all batches of the
    step. Build the average after `prepare`, and call this on every process.

    Args:
        accelerator: The loop's accelerator.
        model: The student as the loop uses it.
        average: Its average; restored in place, so a teacher over it stays valid.
        clock: Counts the data seen; its units are restored in place.
        name: Tells several averages of one run apart: the folder is then `ema-<name>`.
        on_missing_average: What `load_state` does when the average is missing or damaged: `"raise"`, or `"rebuild"` it
            from the student's weights in the checkpoint, with a warning. The clock's units are restored if
            `ema_state.json` can be read; else they stay, and are yours to set.

    Returns:
        A handle to undo it.

    Raises:
        ValueError: The name is taken, or is not a plain part of a file name; `on_missing_average` is not one of the
            two.
        AverageStateError: From `load_state`: the checkpoint has no such average, it is damaged or was not saved by
            this function, or another part of the checkpoint is missing, torn or of another step. Student and
            optimizer are then as before (not so under FSDP and DeepSpeed), and nothing is to be rebuilt from parts of
            two steps.
    """
    if on_missing_average not in ("raise", "rebuild"):
        raise ValueError(f"on_missing_average must be 'raise' or 'rebuild', got {on_missing_average!r}")
    folder = folder_name(name)
    taken = _REGISTERED.setdefault(accelerator, set())
    if folder in taken:
        raise ValueError(f"this accelerator already saves an average in the folder {folder!r}: give one another name=")

    warn_of_half_precision(model)

    def save(models: list[nn.Module], weights: list[Any], output_dir: str) -> None:
        on_each_node = accelerator.project_configuration.save_on_each_node
        writes = accelerator.is_local_main_process if on_each_node else accelerator.is_main_process
        state: dict[str, Any] = {
            "units_seen": clock.units,
            "reference_batch_size": clock.reference_batch_size,
            "processes": accelerator.num_processes,
        }
        index = _index(models, model)
        if weights and len(weights) == len(models):  # else accelerate, or a hook, has saved models by now
            delete_older(Path(output_dir), accelerator.process_index, writes=writes)
            if writes and index is not None:
                state["student"] = checksums(weights[index])
        elif math.isfinite(distance := average.distance(model)):
            state["student_distance"] = distance
        save_average(Path(output_dir) / folder, model, average, state=state, write=writes)

    def load(models: list[nn.Module], input_dir: str) -> None:
        checkpoint = Path(input_dir)
        to_load = models if len(models) == len(accelerator._models) else []
        problem: str | None = None
        saved: dict[str, Any] = {}
        try:
            saved = read_state(checkpoint / folder)
        except AverageStateError as error:
            problem = str(error)
        else:
            if not isinstance(saved.get("units_seen"), (int, float)):
                raise AverageStateError(f"{checkpoint / folder} has no units_seen: register_average did not write it.")
        index = _index(to_load, model)
        student = None if index is None else student_file(checkpoint, index)
        _refuse_incomplete(checkpoint, accelerator, len(to_load), saved)
        if student is not None:
            _refuse_other_student(checkpoint, folder, student, saved)
        if problem is None:
            try:
                load_average(checkpoint / folder, model, average)
            except AverageStateError as error:
                problem = str(error)
        if on_missing_average == "rebuild":
            # All processes do the same, though some may not see the folder.
            problem = next((text for text in gather_object([problem]) if text), None)
        if problem is not None and on_missing_average == "raise":
            raise AverageStateError(
                f"{problem} Set on_missing_average='rebuild' if the average was there and is lost."
            )
        if problem is not None:
            if index is not None and student is not None:
                load_student(to_load[index], student)  # accelerate does so after this
            _rebuild(model, average, checkpoint, problem, clock if "units_seen" not in saved else None)
        elif not to_load:
            _refuse_other_distance(checkpoint, folder, saved, average.distance(model))
        clock.units = float(saved.get("units_seen", clock.units))

    handles = [accelerator.register_save_state_pre_hook(save), accelerator.register_load_state_pre_hook(load)]
    taken.add(folder)
    return AverageRegistration(accelerator, folder, handles)


def _index(models: list[nn.Module], model: nn.Module) -> int | None:
    """The number of a model among accelerate's; None where it is not one of them."""
    inner = unwrap(model)
    return next((index for index, other in enumerate(models) if unwrap(other) is inner), None)


def _refuse_incomplete(checkpoint: Path, accelerator: Accelerator, models: int, saved: dict[str, Any]) -> None:
    if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
        return  # files of their own, which are loaded by now
    found = faults(checkpoint, accelerator, models=models, processes=saved.get("processes"))
    if found:
        raise AverageStateError(
            f"{checkpoint} cannot be loaded: {'; '.join(found)}. If its saving was killed, load the checkpoint before "
            "it."
        )


def _refuse_other_student(checkpoint: Path, folder: str, student: Path, saved: dict[str, Any]) -> None:
    expected = saved.get("student")
    changed = [] if expected is None else changed_tensors(student, expected)
    if changed:
        raise AverageStateError(
            f"{student.name} in {checkpoint} holds other weights than those that were saved with the average in its "
            f"{folder!r} ({len(changed)} tensors, first {changed[0]!r}): they are of two steps, as when a save into "
            "an older checkpoint is killed, or damaged. Load the checkpoint before it."
        )


def _refuse_other_distance(checkpoint: Path, folder: str, saved: dict[str, Any], now: float) -> None:
    then = saved.get("student_distance")
    if then is not None and not math.isclose(then, now, rel_tol=1e-3, abs_tol=1e-6):
        raise AverageStateError(
            f"the student in {checkpoint} and the average in its {folder!r} are of two steps: their distance was "
            f"{then:.6g} when the average was saved and is {now:.6g}. Load the checkpoint before it."
        )


def _rebuild(
    model: nn.Module, average: WeightAverage, checkpoint: Path, problem: str, unknown: ReferenceClock | None
) -> None:
    average.blend(model, 1.0)
    average.num_updates = 0
    clock = (
        "" if unknown is None else f" Its clock is not known and stays at {unknown.units:g} units: set clock.units."
    )
    warnings.warn(
        f"register_average: the average is rebuilt from the student's weights in {checkpoint}.{clock} {problem}",
        stacklevel=4,
    )
