"""Filters by name, as recipes write them, and what they do to labels: the first one that fires gives the reason."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hf_ema_scaling.labels.alignment import LabelAlignment
from hf_ema_scaling.labels.base import PseudoLabel
from hf_ema_scaling.labels.filter_base import AdaptiveFilter, Filter, Row
from hf_ema_scaling.labels.score_filters import Confidence, Disagree, Entropy, LogProbability, NoEnd, NoSpeech
from hf_ema_scaling.labels.text_filters import (
    Compression,
    Copy,
    Duration,
    Empty,
    LengthRatio,
    LongWord,
    Phrase,
    Rate,
    Repeat,
    TooLong,
)
from hf_ema_scaling.labels.thresholds import AdaptiveConfidence, ConfidenceQuantile, LogProbabilityQuantile

FILTERS: dict[str, Callable[..., Filter]] = {
    "empty": Empty,
    "too_long": TooLong,
    "duration": Duration,
    "rate": Rate,
    "repeat": Repeat,
    "long_word": LongWord,
    "compression": Compression,
    "phrase": Phrase,
    "no_eos": NoEnd,
    "no_speech": NoSpeech,
    "length_ratio": LengthRatio,
    "copy": Copy,
    "logprob": LogProbability,
    "logprob_quantile": LogProbabilityQuantile,
    "entropy": Entropy,
    "disagree": Disagree,
    "confidence": Confidence,
    "confidence_quantile": ConfidenceQuantile,
    "confidence_adaptive": AdaptiveConfidence,
}
"""Filters by their names in recipes; a filter's reason may be that of several."""

FIT = "fit"
"""In the place of a filter's arguments: found on labelled data."""
FITTED = ("rate", "length_ratio")


def read_filters(written: str | Mapping[str, Any]) -> dict[str, Any]:
    """Filters as a recipe writes them: a mapping of names to arguments, or JSON of one.

    `{"repeat": {}, "compression": {"maximum": 2.4}, "rate": "fit"}`; null is for no arguments.

    Raises:
        ValueError: for text that is no JSON mapping, an unknown name or argument (with the names near it), a missing
            argument or a value out of range.
    """
    if isinstance(written, str):
        try:
            written = json.loads(written)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"filters={written!r} is no JSON ({error}): write filters as {{'repeat': {{}}}}"
            ) from None
    if not isinstance(written, Mapping):
        raise ValueError(f"filters must be a mapping of names to arguments, got {written!r}")
    filters = {str(name): {} if values is None else values for name, values in written.items()}
    for name, values in filters.items():
        if name not in FILTERS:
            raise ValueError(f"no filter is called {name!r}{_near(name, FILTERS)}; there are {', '.join(FILTERS)}")
        if values == FIT and name in FITTED:
            continue
        if not isinstance(values, Mapping):
            fit = f", or {FIT!r} to find them on labelled data" if name in FITTED else ""
            raise ValueError(f"the arguments of the filter {name} must be a mapping{fit}, got {values!r}")
        # The number of classes is the model's to say.
        _build(name, {"classes": 2, **values} if name == "confidence_adaptive" else values)
    return filters


def build_filters(
    written: str | Mapping[str, Any],
    *,
    classes: int | None = None,
    fit: Callable[[], Mapping[str, Mapping[str, float]]] | None = None,
) -> list[Filter]:
    """The filters that a recipe writes, in its order.

    Args:
        written: as for `read_filters`.
        classes: number of classes for `confidence_adaptive`, where it is not written.
        fit: gives the arguments of filters written as "fit" (`fit_filters`); called where there is one.

    Raises:
        ValueError: as `read_filters`; for "fit" where nothing can be fitted.
    """
    filters = read_filters(written)
    if FIT in filters.values():
        found = {} if fit is None else fit()
        for name in [name for name, values in filters.items() if values == FIT]:
            if name not in found:
                raise ValueError(
                    f"the filter {name} cannot be fitted: the labelled data does not have what it needs; write its "
                    "limits"
                )
            filters[name] = found[name]
    if "confidence_adaptive" in filters and classes is not None:
        filters["confidence_adaptive"] = {"classes": classes, **filters["confidence_adaptive"]}
    return [_build(name, values) for name, values in filters.items()]


def _build(name: str, values: Mapping[str, Any]) -> Filter:
    kind = FILTERS[name]
    known = list(inspect.signature(kind).parameters)
    for argument in values:
        if argument not in known:
            takes = f"it takes {', '.join(known)}" if known else "it takes none"
            raise ValueError(f"the filter {name} has no argument {argument!r}{_near(str(argument), known)}; {takes}")
    try:
        return kind(**values)
    except TypeError as error:
        raise ValueError(f"the arguments {dict(values)} of the filter {name} do not fit: {error}") from error


def _near(name: str, known: Iterable[str]) -> str:
    matches = difflib.get_close_matches(name, list(known))
    return f"; did you mean {' or '.join(matches)}?" if matches else ""


class FilterChain:
    """Filters one after another; a label is dropped with the reason of the first one that fires.

    Labels that already have a reason stay as they are. Before all filters comes `empty`: a label without ids and
    without values is no target for any loss.

    Args:
        filters: in order.
        alignment: corrects labels before they come here; its means are kept with the statistics of filters.

    Raises:
        ValueError: for two adaptive filters that are the same.
    """

    def __init__(self, filters: Iterable[Filter], alignment: LabelAlignment | None = None) -> None:
        self.filters = list(filters)
        adaptive = [one for one in self.filters if isinstance(one, AdaptiveFilter)]
        self.adaptive: dict[str, AdaptiveFilter | LabelAlignment] = {repr(one): one for one in adaptive}
        if len(self.adaptive) < len(adaptive):
            raise ValueError(f"an adaptive filter is given twice: {', '.join(self.adaptive)}")
        if alignment is not None:
            self.adaptive[repr(alignment)] = alignment
        # To ask a protocol about every row would take longer than to judge it.
        self._pairs = [(one, one if isinstance(one, AdaptiveFilter) else None) for one in self.filters]

    @property
    def reasons(self) -> tuple[str, ...]:
        """The reasons that these filters give."""
        return tuple(dict.fromkeys(one.reason for one in self.filters))

    @property
    def needs(self) -> dict[str, list[str]]:
        """What the filters need of a row, and the names of those that need it."""
        needed: dict[str, list[str]] = {}
        for one in self.filters:
            for what in getattr(one, "needs", ()):
                needed.setdefault(what, []).append(type(one).__name__)
        return needed

    @property
    def needs_scores(self) -> set[str]:
        """Scores that the filters judge by."""
        return {score for one in self.filters for score in getattr(one, "needs_scores", ())}

    def judge(self, labels: Sequence[PseudoLabel], row: Callable[[int], Row]) -> list[PseudoLabel]:
        """The labels, those that a filter drops with its reason; adaptive filters measure what reaches them.

        Args:
            labels: of a batch.
            row: what is known of the label with this number; asked only where there is a filter to judge it.
        """
        judged = []
        for number, label in enumerate(labels):
            reason = label.reason
            if label.kept and not label.ids and not label.values:
                reason = "empty"
            elif label.kept and self.filters:
                reason = self._reason(row(number))
            judged.append(label if reason == label.reason else dataclasses.replace(label, reason=reason))
        return judged

    def _reason(self, row: Row) -> str | None:
        for one, adaptive in self._pairs:
            if adaptive is not None:
                adaptive.observe(row)
            if one.drops(row):
                return one.reason
        return None

    def end_step(self, total: Callable[[NDArray[np.int64]], NDArray[np.int64]], length: float) -> None:
        """Let adaptive filters take in a step; called on every process, with one sum over them.

        Args:
            total: sums an int64 vector over the processes.
            length: reference steps of the step.
        """
        if not self.adaptive:
            return
        measured = [one.measured() for one in self.adaptive.values()]
        summed = total(np.concatenate(measured))
        ends = np.cumsum([len(part) for part in measured])
        for one, part in zip(self.adaptive.values(), np.split(summed, ends[:-1]), strict=True):
            one.end_step(part, length)

    def state_dict(self) -> dict[str, Any]:
        """The statistics of adaptive filters by what each is, as JSON values; the same on every process."""
        return {name: one.state_dict() for name, one in self.adaptive.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore them; a filter that the checkpoint does not know starts anew."""
        for name, one in self.adaptive.items():
            one.load_state_dict(state.get(name, {}))
