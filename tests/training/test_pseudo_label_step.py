"""From labels to targets."""

from __future__ import annotations

from typing import Any

import torch

from hf_ema_scaling.data.collator import MicroBatch
from hf_ema_scaling.data.stream import UNLABELLED
from hf_ema_scaling.labels import PseudoLabel
from hf_ema_scaling.training.diagnostics import LabelStatistics
from hf_ema_scaling.training.pseudo_label_step import label_rows, with_targets, without_targets

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


def test_a_confidence_at_the_threshold_is_kept_and_earlier_reasons_stay() -> None:
    labels = label_rows(Fixed(), "teacher", micro_batch()["inputs"], min_confidence=0.5)  # type: ignore[arg-type]
    assert [label.reason for label in labels] == [None, "empty", "confidence", "too_long"]
    assert [label.ids for label in labels] == [label.ids for label in LABELS]


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
    statistics = LabelStatistics()
    statistics.add(LABELS)
    statistics.add([PseudoLabel((1, 2, 3, 4, 5, 6, 7), 0.3)])
    state = statistics.state_dict()
    doubled = statistics.logs(lambda values: values * 2)
    assert doubled == {
        "pseudo/kept": 3 / 5,
        "pseudo/confidence": (0.5 + 0.9 + 0.49 + 0.8 + 0.3) / 5,
        "pseudo/tokens": 4.0,
        "pseudo/dropped_empty": 0.2,
        "pseudo/dropped_too_long": 0.2,
        "pseudo/dropped_no_eos": 0.0,
        "pseudo/dropped_confidence": 0.0,
    }
    assert statistics.logs(lambda values: values) == {}
    other = LabelStatistics()
    other.load_state_dict(state)
    assert other.logs(lambda values: values * 2) == doubled
