"""Filters by what a label says: its text, and that text against the row's duration or input."""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from rapidfuzz.distance import Levenshtein

from hf_ema_scaling.labels.base import LabelKind
from hf_ema_scaling.labels.filter_base import SECONDS, SOURCE, TEXT, Row, in_range

# What models of web speech say when they hear nothing.
PHRASES = (
    "thank you",
    "thanks for watching",
    "thank you for watching",
    "thank you so much for watching",
    "thanks for listening",
    "please subscribe",
    "please subscribe to my channel",
    "like and subscribe",
    "subtitles by the amara.org community",
    "see you in the next video",
    "bye bye",
    "music",
    "applause",
)


def _check_bounds(low_name: str, low: float, high_name: str, high: float) -> None:
    in_range(low_name, low, 0.0, math.inf)
    if not low <= high:
        raise ValueError(f"{low_name}={low:g} is above {high_name}={high:g}: nothing would be kept")


def _within(count: float, size: float, low: float, high: float) -> bool:
    """Whether `count / size` lies in [low, high]; a size of 0 has room for nothing, where there is a limit."""
    # Infinity times zero would be NaN.
    return low * size <= count and (high == math.inf or count <= high * size)


@dataclass(frozen=True)
class Empty:
    """`empty`: no text, white space aside; labels without ids are dropped before any filter."""

    reason: ClassVar[str] = "empty"
    needs: ClassVar[frozenset[str]] = frozenset({TEXT})

    def drops(self, row: Row) -> bool:
        """Whether there is no text."""
        return not row.text


@dataclass(frozen=True)
class TooLong:
    """`too_long`: more than `maximum` tokens. That CTC has the frames for a label is checked without a filter."""

    maximum: int
    reason: ClassVar[str] = "too_long"

    def __post_init__(self) -> None:
        in_range("too_long: maximum", self.maximum, 1, math.inf)

    def drops(self, row: Row) -> bool:
        """Whether the label has too many tokens."""
        return len(row.label.ids) > self.maximum


@dataclass(frozen=True)
class Duration:
    """`duration`: audio shorter than `minimum` or longer than `maximum` seconds."""

    minimum: float = 0.0
    maximum: float = math.inf
    reason: ClassVar[str] = "duration"
    needs: ClassVar[frozenset[str]] = frozenset({SECONDS})

    def __post_init__(self) -> None:
        _check_bounds("duration: minimum", self.minimum, "maximum", self.maximum)

    def drops(self, row: Row) -> bool:
        """Whether the audio is too short or too long."""
        return not self.minimum <= row.seconds <= self.maximum


@dataclass(frozen=True)
class Rate:
    """`rate`: characters or words per second outside their range; `fit_filters` finds ranges on labelled data."""

    min_characters: float = 0.0
    max_characters: float = math.inf
    min_words: float = 0.0
    max_words: float = math.inf
    reason: ClassVar[str] = "rate"
    needs: ClassVar[frozenset[str]] = frozenset({TEXT, SECONDS})

    def __post_init__(self) -> None:
        _check_bounds("rate: min_characters", self.min_characters, "max_characters", self.max_characters)
        _check_bounds("rate: min_words", self.min_words, "max_words", self.max_words)

    def drops(self, row: Row) -> bool:
        """Whether nobody speaks like this."""
        return not (
            _within(len(row.text), row.seconds, self.min_characters, self.max_characters)
            and _within(len(row.words), row.seconds, self.min_words, self.max_words)
        )


@dataclass(frozen=True)
class Repeat:
    """`repeat`: a loop.

    Args:
        size: longest n-gram, in words, whose repetitions in a row are counted.
        maximum: repetitions in a row that are kept, of n-grams of any length up to `size`.
        min_unique: smallest share of distinct words.
        min_words: texts with fewer words than this have no share of distinct words to speak of.
    """

    size: int = 4
    maximum: int = 4
    min_unique: float = 0.25
    min_words: int = 12
    reason: ClassVar[str] = "repeat"
    needs: ClassVar[frozenset[str]] = frozenset({TEXT})

    def __post_init__(self) -> None:
        in_range("repeat: size", self.size, 1, math.inf)
        in_range("repeat: maximum", self.maximum, 1, math.inf)
        in_range("repeat: min_unique", self.min_unique, 0, 1)

    def drops(self, row: Row) -> bool:
        """Whether the text goes round in circles."""
        words = row.words
        if len(words) >= max(1, self.min_words) and len(set(words)) < self.min_unique * len(words):
            return True
        return longest_run(words, self.size) > self.maximum


def longest_run(words: Sequence[str], size: int) -> int:
    """Most repetitions in a row of any n-gram of up to `size` words; 1 where nothing is repeated, 0 without words."""
    most = min(1, len(words))
    for n in range(1, size + 1):
        same = 0
        for i in range(n, len(words)):
            # n-grams repeat where each word is the one n places before, n words long.
            same = same + 1 if words[i] == words[i - n] else 0
            most = max(most, 1 + same // n)
    return most


@dataclass(frozen=True)
class LongWord:
    """`long_word`: a word of more than `maximum` characters."""

    maximum: int = 24
    reason: ClassVar[str] = "long_word"
    needs: ClassVar[frozenset[str]] = frozenset({TEXT})

    def __post_init__(self) -> None:
        in_range("long_word: maximum", self.maximum, 1, math.inf)

    def drops(self, row: Row) -> bool:
        """Whether a word is too long."""
        return any(len(word) > self.maximum for word in row.words)


@dataclass(frozen=True)
class Compression:
    """`compression`: UTF-8 bytes over their size after zlib above `maximum`, as in Whisper's own check."""

    maximum: float = 2.4
    reason: ClassVar[str] = "compression"
    needs: ClassVar[frozenset[str]] = frozenset({TEXT})

    def __post_init__(self) -> None:
        in_range("compression: maximum", self.maximum, 0, math.inf)

    def drops(self, row: Row) -> bool:
        """Whether the text says too little for its length."""
        return compression_ratio(row.text) > self.maximum


def compression_ratio(text: str) -> float:
    """UTF-8 bytes over their size after zlib; 0 for an empty text."""
    content = text.encode()
    return len(content) / len(zlib.compress(content))


@dataclass(frozen=True)
class Phrase:
    """`phrase`: the whole text is one that models are known to make up; case, punctuation and brackets aside.

    Args:
        phrases: the phrases; `PHRASES` for English by default.
    """

    phrases: tuple[str, ...] = PHRASES
    reason: ClassVar[str] = "phrase"
    needs: ClassVar[frozenset[str]] = frozenset({TEXT})

    def __post_init__(self) -> None:
        if isinstance(self.phrases, str) or not all(isinstance(phrase, str) for phrase in self.phrases):
            raise ValueError(f"phrase: phrases must be a list of texts, got {self.phrases!r}")
        object.__setattr__(self, "phrases", tuple(self.phrases))
        object.__setattr__(self, "_known", frozenset(map(plain, self.phrases)) - {""})

    def drops(self, row: Row) -> bool:
        """Whether the text is one of the phrases."""
        known: frozenset[str] = self._known  # type: ignore[attr-defined]
        return plain(row.text) in known


def plain(text: str) -> str:
    """Letters and digits of a text in lower case, its words separated by single spaces."""
    return " ".join("".join(c if c.isalnum() else " " for c in text.casefold()).split())


@dataclass(frozen=True)
class LengthRatio:
    """`length_ratio`: tokens of the label over tokens of the input text outside [`minimum`, `maximum`]."""

    minimum: float = 0.0
    maximum: float = math.inf
    reason: ClassVar[str] = "length_ratio"
    needs: ClassVar[frozenset[str]] = frozenset({SOURCE})
    kinds: ClassVar[frozenset[LabelKind]] = frozenset({LabelKind.TOKENS})

    def __post_init__(self) -> None:
        _check_bounds("length_ratio: minimum", self.minimum, "maximum", self.maximum)

    def drops(self, row: Row) -> bool:
        """Whether the label is too short or too long for its input."""
        return not _within(len(row.label.ids), len(row.source_ids), self.minimum, self.maximum)


@dataclass(frozen=True)
class Copy:
    """`copy`: the label repeats its input: their similarity, 1 - edits / longer length in characters, is above
    `maximum`; case and punctuation aside.
    """

    maximum: float = 0.9
    reason: ClassVar[str] = "copy"
    needs: ClassVar[frozenset[str]] = frozenset({TEXT, SOURCE})

    def __post_init__(self) -> None:
        in_range("copy: maximum", self.maximum, 0, 1)

    def drops(self, row: Row) -> bool:
        """Whether the label is a copy."""
        text, source = plain(row.text), plain(row.source_text)
        # Two texts of punctuation alone are alike in nothing.
        if not text or not source:
            return False
        return Levenshtein.normalized_similarity(text, source) > self.maximum
