"""What forward passes of a step write into a model, so that a step that is skipped leaves nothing of it behind."""

from __future__ import annotations

import torch
from torch import Tensor, nn

# An integer buffer of more elements holds the weights of a quantized layer, or a table, and no pass writes it.
LARGEST_COUNT = 4096


class ForwardState:
    """The persistent buffers of a model at the beginning of a step, to be put back should the step be skipped.

    Running statistics of BatchNorm and InstanceNorm, the vectors of spectral norm, observers of quantization, code
    books that follow their inputs, and whatever else a module keeps in its `state_dict` without a gradient. Buffers
    that are not persistent are caches, which may outlive a step. Costs a copy of these buffers while a step runs.
    """

    def __init__(self) -> None:
        self._kept: list[tuple[nn.Module, str, Tensor, Tensor]] = []

    def remember(self, model: nn.Module) -> None:
        """Copies the buffers as they are now."""
        self._kept = [
            (part, name, buffer, buffer.detach().clone())
            for part in model.modules()
            for name, buffer in part._buffers.items()
            if buffer is not None and name not in part._non_persistent_buffers_set and _may_be_written(buffer)
        ]

    @torch.no_grad()
    def restore(self) -> None:
        """Puts back the bits, and the tensors themselves where a module has put others in their place."""
        for part, name, buffer, value in self._kept:
            part._buffers[name] = buffer
            buffer.copy_(value)


def _may_be_written(buffer: Tensor) -> bool:
    return buffer.is_floating_point() or buffer.is_complex() or buffer.numel() <= LARGEST_COUNT
