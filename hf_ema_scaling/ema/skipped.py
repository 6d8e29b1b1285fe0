"""Steps that fp16 loss scaling skipped: the average must not move at them."""

from __future__ import annotations

from typing import Any


def loss_scale(optimizer: Any) -> float | None:
    """The fp16 loss scale of a prepared optimizer; None without one."""
    scaler = getattr(optimizer, "scaler", None)
    return float(scaler.get_scale()) if scaler is not None and scaler.is_enabled() else None


class SkipWatch:
    """Tells whether an optimizer step was skipped by fp16 loss scaling, also in a loop of your own.

    ```python
    watch.before_step(optimizer)
    optimizer.step()
    if not watch.was_skipped(optimizer):
        average.update(model, momentum, kappa)
    ```

    accelerate's own flag stays False for optimizers that unscale inside their step, as fused AdamW does, the default
    (huggingface/accelerate#4242), so the scale is compared too: an overflow lowers it, nothing else does.
    """

    def __init__(self) -> None:
        self._scale: float | None = None

    def before_step(self, optimizer: Any) -> None:
        """Remembers the loss scale of a prepared optimizer."""
        self._scale = loss_scale(optimizer)

    def was_skipped(self, optimizer: Any) -> bool:
        """Whether the step since `before_step` was skipped."""
        after = loss_scale(optimizer)
        lowered = self._scale is not None and after is not None and after < self._scale
        return lowered or bool(getattr(optimizer, "step_was_skipped", False))
