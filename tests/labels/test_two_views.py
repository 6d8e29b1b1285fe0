"""Two labels of a row."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hf_ema_scaling.labels import LabelsByPosition, MakesTargets, PseudoLabel, columns_of
from hf_ema_scaling.labels.two_views import two_views


class Rounded:
    """Ids are the input, rounded."""

    def label(self, teacher: Any, batch: Any) -> list[PseudoLabel]:
        return [PseudoLabel(tuple(r.round().int().tolist()), 0.5, scores={"mine": 1.0}) for r in batch["input_values"]]


class WithTargets(Rounded):
    def with_targets(self, inputs: Any, labels: Any) -> dict[str, torch.Tensor]:
        return {"labels": torch.tensor([len(label.ids) for label in labels])}


def test_the_label_is_the_first_views_and_says_how_much_the_other_changes() -> None:
    batch = {"input_values": torch.tensor([[1.0, 2.0, 3.0], [1.0, 2.4, 3.4]])}
    labeler = two_views(Rounded(), lambda inputs: {"input_values": inputs["input_values"] + 0.2})
    labels = labeler.label(None, batch)  # type: ignore[arg-type]
    assert [label.ids for label in labels] == [(1, 2, 3), (1, 2, 3)]
    assert [label.scores for label in labels] == [
        {"mine": 1.0, "disagreement": 0.0},
        {"mine": 1.0, "disagreement": pytest.approx(2 / 3)},
    ]


def test_targets_are_the_labelers_own_where_it_makes_them() -> None:
    plain, own = two_views(Rounded(), lambda inputs: inputs), two_views(WithTargets(), lambda inputs: inputs)
    assert not isinstance(plain, MakesTargets) and isinstance(own, MakesTargets)
    assert own.with_targets({}, [PseudoLabel((1, 2), 1.0)])["labels"].tolist() == [2]


class Drawn(Rounded):
    needs_columns = ("word_ids",)

    def __init__(self, shift: int = 0) -> None:
        self.shift = shift

    def at(self, positions: Any) -> Drawn:
        return Drawn(positions[0])

    def label(self, teacher: Any, batch: Any) -> list[PseudoLabel]:
        return [PseudoLabel((self.shift,), 0.5)]


def test_columns_and_places_in_the_stream_reach_the_labeler() -> None:
    labeler = two_views(Drawn(), lambda inputs: inputs)
    assert columns_of(labeler) == ("word_ids",)
    assert isinstance(labeler, LabelsByPosition)
    assert labeler.at([7]).label(None, {})[0].ids == (7,)  # type: ignore[arg-type]
    plain = two_views(Rounded(), lambda inputs: inputs)
    assert isinstance(plain, LabelsByPosition) and plain.at([7]) is plain
