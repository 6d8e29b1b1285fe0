"""From labels to targets."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from hf_ema_scaling.data.collator import MicroBatch
from hf_ema_scaling.data.stream import UNLABELLED
from hf_ema_scaling.labels import PseudoLabel
from hf_ema_scaling.training.diagnostics import LabelStatistics
from hf_ema_scaling.training.pseudo_label_step import with_targets, without_targets

LABELS = [
    PseudoLabel((3, 1), 0.5),
    PseudoLabel((), 0.9, "empty"),
    PseudoLabel((2, 2, 4), 0.49),
    PseudoLabel((7,) * 9, 0.8, "too_long"),
]


def micro_batch() -> MicroBatch:
    inputs = {"input_values": torch.arange(8.0).reshape(4, 2)}
    return MicroBatch(source=UNLABELLED, inputs=inputs, positions=[4, 5, 6, 9], indices=[0, 1, 2, 3], weight=1.0)


class Fixed:
    def label(self, teacher: Any, batch: Any) -> list[PseudoLabel]:
        assert teacher == "teacher" and set(batch) == {"input_values"}
        return list(LABELS)


def test_targets_and_weights_of_kept_and_dropped_rows() -> None:
    before = micro_batch()
    result = with_targets(before, Fixed(), LABELS, 0.25)
    assert result["inputs"]["labels"].tolist() == [[3, 1, -100], [-100] * 3, [2, 2, 4], [-100] * 3]
    assert result["example_weights"].tolist() == [0.25, 0.0, 0.25, 0.0]
    assert torch.equal(result["inputs"]["input_values"], before["inputs"]["input_values"])
    assert "labels" not in before["inputs"] and "example_weights" not in before
    assert result["positions"] == [4, 5, 6, 9]


class ClassLabels(Fixed):
    """Has targets of its own: one class per row, and inputs that depend on it."""

    def with_targets(self, inputs: Any, labels: Any) -> dict[str, torch.Tensor]:
        classes = torch.tensor([label.ids[0] if label.kept else 0 for label in labels])
        return {"input_values": inputs["input_values"] + classes[:, None], "labels": classes}


def test_a_labeler_may_make_targets_and_inputs_of_its_own() -> None:
    result = with_targets(micro_batch(), ClassLabels(), LABELS, 0.5)
    assert result["inputs"]["labels"].tolist() == [3, 0, 2, 0]
    assert result["inputs"]["input_values"].tolist() == [[3, 4], [2, 3], [6, 7], [6, 7]]
    assert result["example_weights"].tolist() == [0.5, 0.0, 0.5, 0.0]
    padding = without_targets(micro_batch(), ClassLabels())
    assert padding["inputs"]["labels"].tolist() == [0] * 4 and padding["example_weights"].tolist() == [0.0] * 4


def test_padding_has_no_targets() -> None:
    result = without_targets(micro_batch(), Fixed())
    assert result["inputs"]["labels"].tolist() == [[-100]] * 4 and result["example_weights"].tolist() == [0.0] * 4


def test_statistics_are_shares_of_all_rows_and_start_anew_at_a_log() -> None:
    statistics = LabelStatistics(["mine"])
    statistics.add(LABELS)
    statistics.add([PseudoLabel((1, 2, 3, 4, 5, 6, 7), 0.3)])
    state = json.loads(json.dumps(statistics.state_dict()))
    _, doubled = statistics.take_log(lambda one: [one, one])
    shares = {name: value for name, value in doubled.items() if name.startswith("pseudo/")}
    assert shares == {
        "pseudo/kept": 3 / 5,
        "pseudo/confidence": pytest.approx((0.5 + 0.9 + 0.49 + 0.8 + 0.3) / 5, rel=1e-9),
        "pseudo/tokens": 4.0,
        "pseudo/distinct": pytest.approx(0.5, rel=1e-3),
        "pseudo/dropped_empty": 0.2,
        "pseudo/dropped_too_long": 0.2,
        "pseudo/dropped_confidence": 0.0,
        "pseudo/dropped_mine": 0.0,
    }
    assert [doubled[f"confidence/0.{place}"] for place in range(10)] == [0, 0, 0, 0.2, 0.2, 0.2, 0, 0, 0.2, 0.2]
    assert statistics.take_log(lambda one: [one])[1] == {}
    other = LabelStatistics()
    other.load_state_dict(state)
    assert other.take_log(lambda one: [one, one])[1] == doubled
    # The window of the guard is one of its own.
    assert statistics.take_window(lambda one: [one, one])[1] == doubled


def test_a_new_reason_is_told_of_from_then_on_also_where_another_process_met_it() -> None:
    one, other = LabelStatistics(), LabelStatistics()
    other.add([PseudoLabel((1,), 0.5, "theirs")])
    other.end_step()
    theirs = [other.since_log.state_dict(), other.gold.state_dict(), list(other.reasons)]
    one.add([PseudoLabel((1,), 0.5)])
    assert one.take_log(lambda mine: [mine, theirs])[1]["pseudo/dropped_theirs"] == 0.5
    one.add([PseudoLabel((1,), 0.5)])
    assert one.take_log(lambda mine: [mine])[1]["pseudo/dropped_theirs"] == 0.0
