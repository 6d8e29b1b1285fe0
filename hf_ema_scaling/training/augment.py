"""Augmentation of the student's input, the same for an item at every batch size."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hf_ema_scaling.data.views import Augmentation, changes_length
from hf_ema_scaling.labels.ctc import ctc_frame_lengths
from hf_ema_scaling.training.checks import ctc_target_frames
from hf_ema_scaling.training.losses import labels_by_token

# Seeds of one run do not meet those of another as long as a run draws fewer items than this.
SEEDS_PER_RUN = 2**40


def augment(
    augmentation: Augmentation, inputs: dict[str, Any], positions: list[int], begun: int, seed: int
) -> dict[str, Any]:
    """The inputs with the rows augmented that lie at or past stream position `begun`.

    An augmentation may make rows longer or shorter: rows of both kinds in one batch are filled up with zeros.

    Args:
        augmentation: what changes the inputs.
        inputs: padded inputs of a micro-batch; left as they are.
        positions: place of each row in the reference stream, which seeds its augmentation.
        begun: first position to be augmented.
        seed: of the run.

    Raises:
        ValueError: when the augmentation returns another number of rows, or an input that was not there.
    """
    late = [row for row, position in enumerate(positions) if position >= begun]
    if not late:
        return inputs
    given = {name: value[late] if isinstance(value, Tensor) else value for name, value in inputs.items()}
    changed = augmentation(given, [seed * SEEDS_PER_RUN + positions[row] for row in late])
    for name, value in changed.items():
        if name not in inputs or len(value) != len(late):
            raise ValueError(
                f"the augmentation returned {name!r} with {len(value)} rows, got {sorted(inputs)} with {len(late)}: "
                "it may change inputs, but neither add any nor change their rows' number"
            )
    return {**inputs, **{name: _merged(inputs[name], value, late) for name, value in changed.items()}}


def refuse_augmentation(augmentation: Augmentation | None, model: nn.Module) -> None:
    """Refuses a view that moves tokens, where labels are by token: of token classifiers and causal language models.

    Raises:
        ValueError: see above.
    """
    if augmentation is not None and changes_length(augmentation) and labels_by_token(model):
        raise ValueError(
            f"{type(augmentation).__name__} drops or moves tokens, and the labels of {type(model).__name__} are by "
            "token: use a view that keeps every token in its place, such as TokenMasking"
        )


def keep_fitting(model: nn.Module, clean: dict[str, Any], augmented: dict[str, Any], labels: Tensor) -> dict[str, Any]:
    """The augmented inputs, but for rows that a CTC model then makes too few frames of: those are as they were.

    A view sees no labels, so one that makes speech faster cannot know whether a label still fits. Which rows go back
    depends on the row, its seed and its label (of unlabelled rows the teacher's), not on the batch.

    Args:
        model: a CTC model, wrapped or not.
        clean: inputs before the augmentation.
        augmented: inputs after it.
        labels: int64 `(rows, tokens)`, padded with -100; a row without tokens fits one frame.
    """
    if augmented is clean:
        return clean
    needed = ctc_target_frames(labels)
    frames = ctc_frame_lengths(model, augmented).to(needed.device)
    rows = (frames < needed.clamp(min=1)).nonzero().flatten().tolist()
    if not rows:
        return augmented
    changed = {name: value for name, value in clean.items() if value is not augmented[name]}
    return {**augmented, **{name: _merged(augmented[name], value[rows], rows) for name, value in changed.items()}}


def _merged(before: Tensor, changed: Tensor, rows: list[int]) -> Tensor:
    """`before` with `changed` in the place of `rows`."""
    if before.ndim > 1:
        width = max(before.shape[1], changed.shape[1])
        before, changed = (_widened(tensor, width) for tensor in (before, changed))
    merged = before.clone()
    merged[torch.tensor(rows, device=merged.device)] = changed
    return merged


def _widened(tensor: Tensor, width: int) -> Tensor:
    missing = width - tensor.shape[1]
    return F.pad(tensor, [0, 0] * (tensor.ndim - 2) + [0, missing]) if missing else tensor
