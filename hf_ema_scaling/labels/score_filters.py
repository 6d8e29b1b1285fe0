"""Filters by fixed thresholds on what the labeler measured: its confidence and its scores."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from hf_ema_scaling.labels.base import CONFIDENCE
from hf_ema_scaling.labels.filter_base import Row, in_range

LOG_PROBABILITY = "log_probability"
"""Name of a score: mean log-probability per token, in nats."""
ENTROPY = "entropy"
"""Entropy of the classes over its largest value: 0 for a certain label, 1 for one that could be any class."""
NO_SPEECH = "no_speech"
"""Probability that nobody speaks."""
ENDED = "ended"
"""1 for a label that ended by itself, 0 for one that was cut off at a length limit."""
DISAGREEMENT = "disagreement"
"""Share of the label that another view of the row changes."""


@dataclass(frozen=True)
class Confidence:
    """`confidence`: below `minimum`. The labeler says what its confidence is."""

    minimum: float
    reason: ClassVar[str] = "confidence"
    needs_scores: ClassVar[frozenset[str]] = frozenset({CONFIDENCE})

    def __post_init__(self) -> None:
        in_range("confidence: minimum", self.minimum, 0, 1)

    def drops(self, row: Row) -> bool:
        """Whether the labeler is not sure enough."""
        return row.label.confidence < self.minimum


@dataclass(frozen=True)
class LogProbability:
    """`logprob`: mean log-probability per token below `minimum` (nats)."""

    minimum: float = -1.0
    reason: ClassVar[str] = "logprob"
    needs_scores: ClassVar[frozenset[str]] = frozenset({LOG_PROBABILITY})

    def __post_init__(self) -> None:
        in_range("logprob: minimum", self.minimum, -math.inf, 0)

    def drops(self, row: Row) -> bool:
        """Whether the tokens are too improbable."""
        # Not >=: a log-probability that is NaN is dropped.
        return not row.score(LOG_PROBABILITY) >= self.minimum


@dataclass(frozen=True)
class NoSpeech:
    """`no_speech`: the probability that nobody speaks is above `maximum`."""

    maximum: float = 0.6
    reason: ClassVar[str] = "no_speech"
    needs_scores: ClassVar[frozenset[str]] = frozenset({NO_SPEECH})

    def __post_init__(self) -> None:
        in_range("no_speech: maximum", self.maximum, 0, 1)

    def drops(self, row: Row) -> bool:
        """Whether nobody seems to speak."""
        return not row.score(NO_SPEECH) <= self.maximum


@dataclass(frozen=True)
class Entropy:
    """`entropy`: above `maximum`, as a share of the largest there can be."""

    maximum: float
    reason: ClassVar[str] = "entropy"
    needs_scores: ClassVar[frozenset[str]] = frozenset({ENTROPY})

    def __post_init__(self) -> None:
        in_range("entropy: maximum", self.maximum, 0, math.inf)

    def drops(self, row: Row) -> bool:
        """Whether the teacher hesitates."""
        return not row.score(ENTROPY) <= self.maximum


@dataclass(frozen=True)
class NoEnd:
    """`no_eos`: a label that did not end by itself but was cut off."""

    reason: ClassVar[str] = "no_eos"
    needs_scores: ClassVar[frozenset[str]] = frozenset({ENDED})

    def drops(self, row: Row) -> bool:
        """Whether the label was cut off."""
        return row.score(ENDED) < 0.5


@dataclass(frozen=True)
class Disagree:
    """`disagree`: two views of the row differ in more than `maximum` of the label (see `two_views`)."""

    maximum: float = 0.1
    reason: ClassVar[str] = "disagree"
    needs_scores: ClassVar[frozenset[str]] = frozenset({DISAGREEMENT})

    def __post_init__(self) -> None:
        in_range("disagree: maximum", self.maximum, 0, 1)

    def drops(self, row: Row) -> bool:
        """Whether the label depends on the view."""
        return row.score(DISAGREEMENT) > self.maximum
