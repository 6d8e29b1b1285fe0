"""Items of a data set that cannot be used: an error that names the item, or skipped, counted by reason and named."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable
from typing import Any

RAISE, SKIP = "raise", "skip"
CHOICES = (RAISE, SKIP)
UNWANTED = ("too_short", "too_long", "empty_text", "too_many_tokens", "silent", "no_features")
"""Reasons of rows that are in order and still of no use: dropped and counted whatever `on_bad_item` says."""
NAMED = 5
"""How many skipped items a log names."""


class BadItemError(ValueError):
    """An item that cannot be used: the message names it and says why.

    Args:
        message: what is wrong, and what to do.
        reason: the code that it is counted by.
        size: of the item, in seconds or tokens, 0 where it is not known.
    """

    def __init__(self, message: str, reason: str = "unusable", size: float = 0.0) -> None:
        super().__init__(message)
        self.reason = reason
        self.size = size

    def __reduce__(self) -> tuple[Any, ...]:
        # An exception that cannot be unpickled hangs the pool of `Dataset.map(num_proc=...)`.
        return type(self), (str(self), self.reason, self.size)

    def of(self, item: str) -> BadItemError:
        """The same error with the item's name in front, such as `row 3`."""
        return type(self)(f"{item}: {self}", self.reason, self.size)


def check_choice(on_bad_item: str) -> str:
    """`on_bad_item` as it is.

    Raises:
        ValueError: when it is neither `raise` nor `skip`.
    """
    if on_bad_item not in CHOICES:
        raise ValueError(f"on_bad_item must be {' or '.join(CHOICES)}, got {on_bad_item!r}")
    return on_bad_item


class BadItems:
    """Raises what is wrong with an item, or skips the item: counted by reason, the first few remembered by name.

    Args:
        on_bad_item: `raise` or `skip`.
    """

    def __init__(self, on_bad_item: str = RAISE) -> None:
        self.on_bad_item = check_choice(on_bad_item)
        self.counts: Counter[str] = Counter()
        self.named: list[str] = []

    def add(self, error: BadItemError) -> None:
        """Take note of one item that is skipped.

        Raises:
            BadItemError: the error itself, unless items are skipped.
        """
        if self.on_bad_item == RAISE:
            raise error
        self.counts[error.reason] += 1
        if len(self.named) < NAMED:
            self.named.append(str(error))

    def log(self, logger: logging.Logger, what: str, total: int) -> None:
        """One warning with the counts and the first names, if anything was skipped.

        Args:
            logger: of the caller.
            what: where the items come from.
            total: items there were, skipped ones included.

        Raises:
            ValueError: when nothing is left.
        """
        if not self.counts:
            return
        if self.counts.total() >= total:
            raise ValueError(f"nothing is left: {self.told(what, total)}")
        logger.warning("%s", self.told(what, total))

    def told(self, what: str, total: int) -> str:
        """The counts and the first names in one line."""
        counts = f"{what}: skipped {self.counts.total()} of {total} rows ({counted(self.counts)})"
        return f"{counts}; {listed(self.named, self.counts.total())}"


def counted(counts: Counter[str]) -> str:
    """`2 silent, 1 too_long`, in alphabetical order of the reasons."""
    return ", ".join(f"{count} {reason}" for reason, count in sorted(counts.items()))


def listed(names: Iterable[str], total: int) -> str:
    """The first names, and how many more there are."""
    names = list(names)[:NAMED]
    more = total - len(names)
    return "first: " + "; ".join(names) + (f"; and {more} more" if more > 0 else "")


def text_of(value: Any, column: str) -> str:
    """The value if it is a text that can be written down.

    Raises:
        BadItemError: for null, for what is no string, and for lone surrogates, which no UTF-8 file can hold.
    """
    if value is None:
        raise BadItemError(f"{column} is null: leave such rows out", "no_text")
    if not isinstance(value, str):
        raise BadItemError(f"{column} is {value!r:.60}, not a string", "no_text")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadItemError(
            f"{column} has a lone surrogate at character {error.start + 1}, which is half of a character: decode the "
            "text again",
            "not_utf8",
        ) from error
    return str(value)


def words_of(value: Any, column: str) -> list[str]:
    """The value if it is a list of words, each a text with something in it.

    Raises:
        BadItemError: for no list or an empty one ("no_text"), a word that is no text or blank ("empty_word"), and lone
            surrogates ("not_utf8").
    """
    if not isinstance(value, list) or not value:
        raise BadItemError(f"{column} is {value!r:.60}, not a list of words", "no_text")
    for word in value:
        if not isinstance(word, str) or not text_of(word, column).strip():
            raise BadItemError(f"the word {word!r:.60} is empty or no string", "empty_word")
    return value
