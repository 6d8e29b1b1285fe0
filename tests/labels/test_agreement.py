"""How far labels are apart, by what they say; and two views of rows whose labels are numbers, classes or words."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hf_ema_scaling.labels import ClassLabeler, LabelKind, MultiLabelLabeler, PseudoLabel, RegressionLabeler
from hf_ema_scaling.labels.agreement import disagreement, errors
from hf_ema_scaling.labels.base import kind_of, scores_of
from hf_ema_scaling.labels.two_views import two_views


def numbers(*values: float) -> PseudoLabel:
    return PseudoLabel((), 1.0, values=values)


def ids(*ids: int, values: tuple[float, ...] = ()) -> PseudoLabel:
    return PseudoLabel(ids, 0.9, values=values)


@pytest.mark.parametrize(
    ("kind", "first", "second", "scales", "expected"),
    [
        (None, ids(1, 2, 3), ids(1, 3), (), 1 / 3),
        (LabelKind.TOKENS, ids(), ids(), (), 0.0),
        (LabelKind.CLASS, ids(4), ids(5), (), 1.0),
        # Of a hundred classes one is another: two of the two that either has.
        (LabelKind.CLASSES, ids(7, values=(0.0,) * 100), ids(8, values=(0.0,) * 100), (), 1.0),
        (LabelKind.CLASSES, ids(1, 2, 3), ids(2, 3, 4), (), 0.5),
        (LabelKind.CLASSES, ids(), ids(), (), 0.0),
        # In order, without shifts: edits would find one word too many and one too few.
        (LabelKind.WORDS, ids(1, 2, 3), ids(2, 3, 1), (), 1.0),
        # The second word has no label, and so none to change; the third has lost its.
        (LabelKind.WORDS, ids(1, -100, 2), ids(1, 5, -100), (), 0.5),
        (LabelKind.WORDS, ids(-100), ids(3), (), 0.0),
        (LabelKind.NUMBERS, numbers(2.0), numbers(2.5), (2.0,), 0.25),
        # The second number is further than its scale apart: that is 1, not 15.
        (LabelKind.NUMBERS, numbers(2.0, 0.0), numbers(2.5, 30.0), (2.0,), (0.25 + 1) / 2),
        (LabelKind.NUMBERS, numbers(2.0, 0.0), numbers(2.5, 30.0), (1.0, 60.0), 0.5),
    ],
)
def test_disagreement(
    kind: LabelKind | None, first: PseudoLabel, second: PseudoLabel, scales: tuple[float, ...], expected: float
) -> None:
    assert disagreement(first, second, kind, scales) == pytest.approx(expected)
    if kind is not LabelKind.WORDS:
        assert disagreement(second, first, kind, scales) == pytest.approx(expected)


def test_labels_that_cannot_be_compared() -> None:
    with pytest.raises(ValueError, match="2 and 1 words"):
        disagreement(ids(1, 2), ids(1), LabelKind.WORDS)
    with pytest.raises(ValueError, match="2 and 3 numbers and scales"):
        disagreement(numbers(1.0, 2.0), numbers(1.0, 2.0), LabelKind.NUMBERS, (1.0, 1.0, 1.0))


@pytest.mark.parametrize(
    ("kind", "label", "reference", "expected"),
    [
        (None, ids(1, 2, 4), [1, 2, 3, -100], (1, 3)),
        (LabelKind.CLASS, ids(2), 2, (0, 1)),
        (LabelKind.CLASS, ids(2), 3, (1, 1)),
        # Class 0 is missed, class 2 made up, 1 and 3 are right.
        (LabelKind.CLASSES, ids(1, 2, values=(0.2, 0.9, 0.6, 0.1)), [1.0, 1.0, 0.0, 0.0], (2, 4)),
        (LabelKind.CLASSES, ids(values=(0.0, 0.0)), [0, 0], (0, 2)),
        # Words in their places; the one that was withheld does not count, nor does a token that begins no word.
        (LabelKind.WORDS, ids(1, -100, 2, 0), [1, 2, -100, 3, 0], (1, 3)),
        (LabelKind.WORDS, ids(), [1, 2], (0, 0)),
        (LabelKind.NUMBERS, numbers(1.5), 2.0, (0.5, 1)),
        (LabelKind.NUMBERS, numbers(1.5, -3.0), [2.0, 1.0], (4.5, 2)),
    ],
)
def test_errors(kind: LabelKind | None, label: PseudoLabel, reference: Any, expected: tuple[float, int]) -> None:
    assert errors(label, reference, kind) == expected


def test_references_of_another_kind_are_refused() -> None:
    for kind, label, reference, message in (
        (LabelKind.CLASSES, ids(1, values=(0.1, 0.9)), [1.0, 0.0, 0.0], "2 and 3 classes"),
        (LabelKind.WORDS, ids(1, 2), [1, 2, 0], "2 and 3 words"),
        (LabelKind.NUMBERS, numbers(1.0), [1.0, 2.0], "1 and 2 numbers"),
    ):
        with pytest.raises(ValueError, match=message):
            errors(label, reference, kind)


class Logits:
    """A teacher whose logits are its input."""

    training = False

    def __call__(self, logits: torch.Tensor) -> Any:
        return type("Output", (), {"logits": logits})


def shifted(by: float) -> Any:
    return lambda batch: {"logits": batch["logits"] + by}


def test_two_views_of_numbers_disagree_by_the_difference_over_the_scale() -> None:
    labeler = two_views(RegressionLabeler(2), shifted(0.5), scale=(2.0, 5.0))
    (label,) = labeler.label(Logits(), {"logits": torch.tensor([[1.0, 2.0]])})
    assert label.values == (1.0, 2.0) and label.scores["disagreement"] == pytest.approx((0.25 + 0.1) / 2)
    assert kind_of(labeler) is LabelKind.NUMBERS and scores_of(labeler) == {"disagreement"}


def test_two_views_of_several_classes() -> None:
    labeler = two_views(MultiLabelLabeler(4), shifted(-1.0))
    first, second = labeler.label(Logits(), {"logits": torch.tensor([[3.0, 0.5, -4.0, -4.0], [3.0, 3.0, -4.0, 2.0]])})
    assert first.ids == (0, 1) and first.scores["disagreement"] == 0.5
    assert second.scores["disagreement"] == 0.0


def test_a_scale_is_for_numbers_and_must_be_stated() -> None:
    with pytest.raises(ValueError, match=r"labels of RegressionLabeler are numbers, .* give two_views scale="):
        two_views(RegressionLabeler(1), shifted(1.0))
    with pytest.raises(ValueError, match=r"scale=1\.0 is for numbers, and the labels of ClassLabeler are class"):
        two_views(ClassLabeler(3), shifted(1.0), scale=1.0)
    with pytest.raises(ValueError, match=r"scale must be above 0, got 0\.0"):
        two_views(RegressionLabeler(1), shifted(1.0), scale=0.0)

    class Own:
        """Does not say what its labels are."""

        def label(self, teacher: Any, batch: Any) -> list[PseudoLabel]:
            return [numbers(float(row[0])) for row in batch["logits"]]

    batch = {"logits": torch.tensor([[1.0]])}
    with pytest.raises(ValueError, match="Own does not say what its labels are"):
        two_views(Own(), shifted(1.0)).label(Logits(), batch)
    (label,) = two_views(Own(), shifted(1.0), scale=4.0).label(Logits(), batch)
    assert label.scores["disagreement"] == 0.25
