"""Frozen parameters: the average refers to the student's own parameters instead of keeping a copy of each."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def is_code(dtype: torch.dtype) -> bool:
    """Whether a dtype is a floating-point one of a byte or less: codes that only a scale beside them gives a value."""
    return dtype.is_floating_point and dtype.itemsize < 2


def shadow_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which the average keeps a tensor: float32 for half precision, others as they are."""
    return torch.float32 if dtype.is_floating_point and dtype != torch.float64 and not is_code(dtype) else dtype


def may_refer(tensor: Tensor, *, adapters: bool) -> bool:
    """Whether the average may use the student's own tensor in the place of a copy.

    It may where the tensor is a parameter that does not require gradients: what is not trained is its own average.
    In half precision only under adapters: their layers take a base of another dtype than their own, while other
    modules fail on it, so there the average keeps frozen parameters in float32 like all others.

    Args:
        tensor: A tensor of the student.
        adapters: Whether the student has adapters.
    """
    if not isinstance(tensor, nn.Parameter) or tensor.requires_grad:
        return False
    return adapters or tensor.dtype == shadow_dtype(tensor.dtype)


def refers(shadow: Tensor) -> bool:
    """Whether a tensor of the average is one of the student's own; those that the average owns are no parameters."""
    return isinstance(shadow, nn.Parameter)


def owned_copy(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy in this dtype that belongs to the average."""
    return tensor.detach().to(dtype, copy=True)
