"""What every family of labelers hands over."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Protocol, runtime_checkable

from torch import Tensor


class LabelKind(StrEnum):
    """What a label says, which decides how two of them are compared and what filters can ask of it."""

    TOKENS = "tokens"
    """A text: token ids in order."""
    CLASS = "class"
    """One class."""
    CLASSES = "classes"
    """Any number of classes; `values` hold a number for each."""
    NUMBERS = "numbers"
    """The numbers of a regression, in `values`."""
    WORDS = "words"
    """One class for each word in order; negative ids are words without a label."""


@dataclass(frozen=True, slots=True)
class PseudoLabel:
    """The label a teacher gave one row, or the reason why it gave none that can be trained on."""

    ids: tuple[int, ...]
    """Target ids of the student's vocabulary, without padding or blanks; of generated text with what was forced before
    it (a language) and its end, but not the token that starts the decoder."""
    confidence: float
    """In [0, 1]; how it is computed is the labeler's to say."""
    reason: str | None = None
    """None for a label that is kept, else a reason code of the ledger, such as "empty" or "too_long"."""
    values: tuple[float, ...] = ()
    """Soft targets: class probabilities, or the numbers of a regression; empty for hard labels."""
    scores: Mapping[str, float] = field(default_factory=dict, compare=False)
    """What filters judge by, beside the confidence: "log_probability", "entropy", ...; not kept by the label cache."""

    @property
    def kept(self) -> bool:
        """Whether the row takes part in the loss."""
        return self.reason is None


class Labeler(Protocol):
    """Turns teacher output into training targets.

    A labeler may also say what its labels are, so that a run that cannot work is refused when it is set up: `kind`, a
    `LabelKind`; `score_names`, the scores of its labels by which filters may judge, `CONFIDENCE` among them where
    the confidence says something; and `samples`, whether it draws random numbers (`draws`).
    """

    def label(self, teacher: Callable[..., Any], batch: Mapping[str, Tensor]) -> list[PseudoLabel]:
        """One `PseudoLabel` for each row of the padded `batch`, in order."""
        ...


@runtime_checkable
class MakesTargets(Protocol):
    """A labeler whose label is not simply the row's `labels`: class ids, labels by token, a prompt's continuation."""

    def with_targets(self, inputs: Mapping[str, Tensor], labels: Sequence[PseudoLabel]) -> dict[str, Tensor]:
        """The student's inputs with `labels` in them; rows of dropped labels have targets that are never looked at.

        Args:
            inputs: collated, padded inputs of the student, without `labels`.
            labels: one per row.
        """
        ...


@runtime_checkable
class ReadsLabelledRows(Protocol):
    """A labeler for whom the inputs of a labelled row are not those of the same row without its label."""

    def as_unlabelled(self, inputs: Mapping[str, Tensor], labels: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """What the rows would be if nobody had labelled them, and their labels.

        Args:
            inputs: collated, padded inputs of labelled rows, without `labels`.
            labels: theirs.

        Returns:
            Inputs for `label`, and labels, padded with negative ids, to compare with what it gives.
        """
        ...


@runtime_checkable
class LabelsByPosition(Protocol):
    """A labeler that draws random numbers: they belong to an item's place in the stream, not to a batch."""

    def at(self, positions: Sequence[int]) -> Labeler:
        """The labeler for a batch whose rows have these positions in the stream."""
        ...


def columns_of(labeler: Labeler) -> tuple[str, ...]:
    """Columns of the unlabelled data that a labeler needs beside the model's inputs: its `needs_columns`.

    They reach the labeler in its batches, and never the model.
    """
    return tuple(getattr(labeler, "needs_columns", ()))


CONFIDENCE = "confidence"
"""Among `score_names`: the confidence says how sure the teacher is."""


def kind_of(labeler: Labeler) -> LabelKind | None:
    """What the labeler's labels are; None where it does not say."""
    kind = getattr(labeler, "kind", None)
    return None if kind is None else LabelKind(kind)


def scores_of(labeler: Labeler) -> frozenset[str] | None:
    """Scores that the labeler gives; None where it does not say."""
    names = getattr(labeler, "score_names", None)
    return None if names is None else frozenset(names)


def draws(labeler: Labeler) -> bool:
    """Whether labels are drawn at random: what takes positions and does not say otherwise is taken to do so."""
    return bool(getattr(labeler, "samples", isinstance(labeler, LabelsByPosition)))
