"""The average as a folder for use, in the form in which the model's own library saves it."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from hf_ema_scaling.ema.average import WeightAverage
from hf_ema_scaling.ema.durable import flush, rename
from hf_ema_scaling.ema.names import unwrap
from hf_ema_scaling.ema.storage import save_average


def export_average(
    folder: str | Path,
    model: nn.Module,
    average: WeightAverage,
    *,
    state: Mapping[str, Any],
    processing_class: Any | None = None,
    write: bool = True,
) -> None:
    """Writes the average as a folder that the model's own library loads.

    A transformers model, one with PEFT adapters, and a module without `save_pretrained` is written by `save_average`,
    in float32. Any other model that has `save_pretrained` (sentence-transformers, say) writes itself while it holds
    the average: in its own layout and its own dtype, without `ema_state.json`. The folder is complete or absent.

    Args:
        folder: Where to write; an older folder of that name is replaced.
        model: The student, wrapped or not; its weights are the same bits afterwards.
        average: The average.
        state: As in `save_average`.
        processing_class: Tokenizer, feature extractor or processor to save along.
        write: False on the processes that only take part in gathering sharded tensors.

    Raises:
        RuntimeError: The model holds swapped-in weights.
        ValueError: Names or shapes do not match.
    """
    inner: Any = unwrap(model)
    ours = isinstance(inner, PreTrainedModel) or hasattr(inner, "peft_config") or not hasattr(inner, "save_pretrained")
    if ours:
        save_average(folder, model, average, state=state, processing_class=processing_class, write=write)
        return
    folder = Path(folder)
    with average.swapped(model):
        if not write:
            return
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial, old = folder.with_name(f".{folder.name}.partial"), folder.with_name(f".{folder.name}.old")
        for leftover in (partial, old):
            shutil.rmtree(leftover, ignore_errors=True)
        try:
            inner.save_pretrained(str(partial))
            if processing_class is not None:
                processing_class.save_pretrained(partial)
            flush(partial)
            if folder.exists():
                rename(folder, old)
            rename(partial, folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
