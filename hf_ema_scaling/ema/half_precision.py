"""What a student in half precision loses."""

from __future__ import annotations

import warnings

import torch
from torch import nn

from hf_ema_scaling.ema.teacher import HALF_PRECISION


def warn_of_half_precision(model: nn.Module) -> None:
    """Warns if trainable parameters are in half precision, saying what is lost and the way out."""
    half = {p.dtype: name for name, p in model.named_parameters() if p.requires_grad and p.dtype in HALF_PRECISION}
    for dtype, name in half.items():
        bits = {torch.bfloat16: 8, torch.float16: 11}[dtype]
        warnings.warn(
            f"trainable parameters are {dtype} (for example {name!r}): a step that changes a weight by less than "
            f"1 part in {2 ** (bits + 1)} of it is rounded away, so a small learning rate trains only some of the "
            "weights, and the optimizer keeps its moments in that dtype too. from_pretrained keeps the dtype of a "
            "checkpoint: pass dtype=torch.float32 to it and let TrainingArguments(bf16=True) compute in half "
            "precision. (The average is kept in full precision, but can only follow these weights.)",
            stacklevel=3,
        )
