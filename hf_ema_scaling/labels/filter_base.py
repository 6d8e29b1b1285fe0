"""What a filter is asked: a label, and what is known of its row without a reference."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from hf_ema_scaling.labels.base import PseudoLabel

Decode = Callable[[Sequence[int]], str]
"""Ids to text; for CTC without merging repeats, for in a label a doubled letter is two tokens."""

TEXT, SECONDS, SOURCE = "text", "seconds", "source"
"""What a filter may need of a row beside its label (`Filter.needs`)."""


class Row:
    """A label with its row, as filters see it; text is decoded when the first filter asks for it.

    Args:
        label: the label; its reason is None.
        decode: ids to text; None where labels are no text.
        seconds: duration of the row's audio.
        source_ids: ids of the row's input, without padding, where that is text.
        decode_source: `source_ids` to text.
        age: reference steps from the row's place in the stream to the end of the step that labels it.
    """

    def __init__(
        self,
        label: PseudoLabel,
        *,
        decode: Decode | None = None,
        seconds: float | None = None,
        source_ids: Sequence[int] | None = None,
        decode_source: Decode | None = None,
        age: float = 0.0,
    ) -> None:
        self.label = label
        self.age = age
        self._decode = decode
        self._seconds = seconds
        self._source_ids = source_ids
        self._decode_source = decode_source

    @cached_property
    def text(self) -> str:
        """The label as text.

        Raises:
            ValueError: when labels are no text here.
        """
        if self._decode is None:
            raise ValueError("a filter asks for the text of a label, but nothing decodes labels: pass decode")
        return self._decode(self.label.ids).strip()

    @cached_property
    def words(self) -> list[str]:
        """The words of the text."""
        return self.text.split()

    @property
    def seconds(self) -> float:
        """Duration of the row.

        Raises:
            ValueError: when it is not known.
        """
        if self._seconds is None:
            raise ValueError("a filter asks for the duration of a row, which is not known: add a duration column")
        return self._seconds

    @property
    def source_ids(self) -> Sequence[int]:
        """Ids of the input text.

        Raises:
            ValueError: when the input is no text.
        """
        if self._source_ids is None:
            raise ValueError("a filter asks for the ids of a row's input, which has none (input_ids)")
        return self._source_ids

    @cached_property
    def source_text(self) -> str:
        """The input text.

        Raises:
            ValueError: when the input is no text, or nothing decodes it.
        """
        decode = self._decode_source or self._decode
        if decode is None:
            raise ValueError("a filter asks for the text of a row's input, but nothing decodes it: pass decode")
        return decode(self.source_ids).strip()

    def score(self, name: str) -> float:
        """What the labeler measured.

        Raises:
            ValueError: when it does not measure this.
        """
        try:
            return self.label.scores[name]
        except KeyError:
            known = ", ".join(self.label.scores) or "none"
            raise ValueError(
                f"a filter asks for the score '{name}', which this labeler does not give (its scores: {known}): take "
                "the filter out, or use a labeler that gives it (disagreement comes of second_view)"
            ) from None


class Filter(Protocol):
    """Says which labels are not trained on. It sees no reference, and judges a row by itself.

    A filter may also say what it asks for, so that a run that cannot give it is refused when it is set up: `needs`, a
    set of `TEXT`, `SECONDS` and `SOURCE`; `needs_scores`, scores of the labeler (`score_names`); and `kinds`, the
    `LabelKind`s that it can judge, where these are not all.
    """

    @property
    def reason(self) -> str:
        """Code of the ledger for what it drops; a class attribute will do."""
        ...

    def drops(self, row: Row) -> bool:
        """Whether the label is dropped."""
        ...


@runtime_checkable
class AdaptiveFilter(Protocol):
    """A filter whose threshold follows the labels of the steps before.

    What it measures on the rows of a step is summed over all processes as integers, so neither the order of rows nor
    their split into micro-batches and processes changes a bit of it.
    """

    @property
    def reason(self) -> str:
        """Code of the ledger for what it drops; a class attribute will do."""
        ...

    def drops(self, row: Row) -> bool:
        """Whether the label is dropped, by the statistics of the steps before."""
        ...

    def observe(self, row: Row) -> None:
        """Measure a row of this step; all that reach the filter, dropped or not."""
        ...

    def measured(self) -> NDArray[np.int64]:
        """What this process measured in the step; the same length on every process."""
        ...

    def end_step(self, measured: NDArray[np.int64], length: float) -> None:
        """Take in what all processes measured in a step of `length` reference steps, and begin the next."""
        ...

    def state_dict(self) -> dict[str, object]:
        """The statistics, as JSON values."""
        ...

    def load_state_dict(self, state: dict[str, object]) -> None:
        """Restore them; an empty dictionary starts anew."""
        ...


def in_range(name: str, value: float, low: float, high: float) -> None:
    """Refuses a value of an argument outside [low, high].

    Raises:
        ValueError: naming it.
    """
    if not low <= value <= high:
        raise ValueError(f"{name} must lie in [{low:g}, {high:g}], got {value!r}")
