"""What every family of labelers hands over."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor


@dataclass(frozen=True, slots=True)
class PseudoLabel:
    """The label a teacher gave one row, or the reason why it gave none that can be trained on."""

    ids: tuple[int, ...]
    """Label ids of the student's vocabulary, without padding, blanks or special ids."""
    confidence: float
    """In [0, 1]; how it is computed is the labeler's to say."""
    reason: str | None = None
    """None for a label that is kept, else a reason code of the ledger, such as "empty" or "too_long"."""

    @property
    def kept(self) -> bool:
        """Whether the row takes part in the loss."""
        return self.reason is None


class Labeler(Protocol):
    """Turns teacher output into training targets."""

    def label(self, teacher: Callable[..., Any], batch: Mapping[str, Tensor]) -> list[PseudoLabel]:
        """One `PseudoLabel` for each row of the padded `batch`, in order."""
        ...
