"""The average in a plain Accelerate loop: `register_average` puts it into what `save_state` and `load_state` move."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from hf_ema_scaling.ema.average import WeightAverage
from hf_ema_scaling.ema.folders import folder_name
from hf_ema_scaling.ema.storage import AverageStateError, load_average, save_average
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

    Save into a folder that is not there yet, as above: accelerate writes student and average one after the other, and
    a process that is killed between them would leave those of two steps in an older folder. BatchNorm's statistics are
    each process's own here; give all processes those of one before updates, if the model has them.

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

    Returns:
        A handle to undo it.

    Raises:
        ValueError: The name is taken, or is not a plain part of a file name.
        AverageStateError: From `load_state`: the checkpoint has no such average, it is damaged, or was not saved by
            this function. Student and optimizer are then as before (not so under FSDP and DeepSpeed, whose models
            accelerate loads first). To go on from such a checkpoint on purpose, load it before the average is built
            and registered.
    """
    folder = folder_name(name)
    taken = _REGISTERED.setdefault(accelerator, set())
    if folder in taken:
        raise ValueError(f"this accelerator already saves an average in the folder {folder!r}: give one another name=")

    def save(models: list[nn.Module], weights: list[Any], output_dir: str) -> None:
        on_each_node = accelerator.project_configuration.save_on_each_node
        writes = accelerator.is_local_main_process if on_each_node else accelerator.is_main_process
        state = {"units_seen": clock.units, "reference_batch_size": clock.reference_batch_size}
        save_average(Path(output_dir) / folder, model, average, state=state, write=writes)

    def load(models: list[nn.Module], input_dir: str) -> None:
        saved = load_average(Path(input_dir) / folder, model, average)
        units = saved.get("units_seen")
        if not isinstance(units, (int, float)):
            raise AverageStateError(
                f"{Path(input_dir) / folder} has no units_seen: register_average did not write it."
            )
        clock.units = float(units)

    handles = [accelerator.register_save_state_pre_hook(save), accelerator.register_load_state_pre_hook(load)]
    taken.add(folder)
    return AverageRegistration(accelerator, folder, handles)
