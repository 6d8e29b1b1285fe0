from __future__ import annotations

import dataclasses

import pytest

from hf_ema_scaling.labels import PseudoLabel


def test_kept_follows_the_reason_and_a_label_cannot_be_edited() -> None:
    kept, dropped = PseudoLabel((1, 2), 0.5), PseudoLabel((), 0.9, "empty")
    assert (kept.kept, dropped.kept) == (True, False)
    with pytest.raises(dataclasses.FrozenInstanceError):
        kept.reason = "empty"  # type: ignore[misc]
