"""The teacher's forward pass, as every labeler makes it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor


def teacher_logits(teacher: Callable[..., Any], batch: Mapping[str, Tensor], without: Collection[str] = ()) -> Tensor:
    """What the teacher makes of the inputs in `batch`, without a graph.

    Args:
        teacher: a model in eval mode, possibly wrapped, whose output has `logits`.
        batch: collated, padded inputs.
        without: what of the batch is no input of the model; `labels` never is.

    Raises:
        RuntimeError: when the teacher is in train mode.
    """
    if getattr(teacher, "training", False):
        raise RuntimeError("the teacher is in train mode, so its labels are random: call teacher.eval() first")
    hidden = {"labels", *without}
    with torch.no_grad():
        logits: Tensor = teacher(**{name: value for name, value in batch.items() if name not in hidden}).logits
    return logits


def refuse_rows(broken: Tensor) -> None:
    """Raises for a teacher that has diverged.

    Args:
        broken: bool `(rows,)`.

    Raises:
        ValueError: naming the rows where it is True.
    """
    rows = broken.nonzero().flatten().tolist()
    if rows:
        raise ValueError(f"the teacher's logits are not finite in rows {rows} of the batch: it has diverged")
