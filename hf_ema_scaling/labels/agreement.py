"""How far two labels of a row are apart, and how much of a label is wrong, by what the labels say."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from rapidfuzz.distance import Levenshtein

from hf_ema_scaling.labels.base import LabelKind, PseudoLabel

YES = 0.5
"""A class of a row with several is one of its own where its number is at least this."""


def disagreement(
    first: PseudoLabel, second: PseudoLabel, kind: LabelKind | None = None, scales: Sequence[float] = ()
) -> float:
    """How much of a label another one of the same row changes: 0 for the same, 1 where nothing agrees.

    - tokens (also where the kind is not known), one class: edits over the length of the longer label.
    - several classes: classes that one of both has, over those that any has (Jaccard distance). Classes that neither
      has do not count, or two labels of a hundred classes would always agree.
    - words: the share of the first label's words with a class that the second gives another class or none.
    - numbers: the mean over numbers of |first - second| / scale, each at most 1.

    Args:
        first: the label that is used.
        second: the other one.
        kind: what they say.
        scales: for numbers, one above 0 for each, or one for all.

    Raises:
        ValueError: for labels of different lengths where these must be the same.
    """
    if kind is LabelKind.CLASSES:
        either = len({*first.ids} | {*second.ids})
        return len({*first.ids} ^ {*second.ids}) / either if either else 0.0
    if kind is LabelKind.WORDS:
        _same_length(first.ids, second.ids, "words")
        changed = [one != other for one, other in zip(first.ids, second.ids, strict=True) if one >= 0]
        return sum(changed) / len(changed) if changed else 0.0
    if kind is LabelKind.NUMBERS:
        _same_length(first.values, second.values, "numbers")
        every = scales if len(scales) != 1 else [*scales] * len(first.values)
        _same_length(first.values, every, "numbers and scales")
        apart = [min(1.0, abs(a - b) / s) for a, b, s in zip(first.values, second.values, every, strict=True)]
        return sum(apart) / len(apart)
    return float(Levenshtein.normalized_distance(first.ids, second.ids))


def errors(label: PseudoLabel, reference: Any, kind: LabelKind | None) -> tuple[float, int]:
    """What is wrong in a label, and out of how much.

    - tokens: edits, over the tokens of the reference.
    - one class: 0 or 1, over 1.
    - several classes: classes judged wrongly, present or absent, over all classes. The reference has a number
      for each.
    - words: words with another class, over the words that have one in both: a word without a label is not trained on,
      and so neither right nor wrong. Negative numbers of the reference are tokens that begin no word.
    - numbers: the sum of absolute differences, over their count.

    Args:
        label: the label.
        reference: the truth: a number, or a sequence of them.
        kind: what the label says; None is compared as tokens.

    Raises:
        ValueError: for a reference that is of another kind or length than the label.
    """
    if kind is LabelKind.NUMBERS:
        wanted = [float(one) for one in _listed(reference)]
        _same_length(label.values, wanted, "numbers")
        return math.fsum(abs(a - b) for a, b in zip(label.values, wanted, strict=True)), len(wanted)
    if kind is LabelKind.CLASSES:
        present = {place for place, one in enumerate(_listed(reference)) if float(one) >= YES}
        classes = len(_listed(reference))
        if label.values:
            _same_length(label.values, range(classes), "classes")
        return len(present ^ {*label.ids}), classes
    ids = [int(one) for one in _listed(reference) if int(one) >= 0]
    if kind is LabelKind.WORDS:
        # Of a row without words, or one that was dropped as a whole, there is nothing to compare.
        if not label.ids:
            return 0, 0
        _same_length(label.ids, ids, "words")
        pairs = [(one, other) for one, other in zip(label.ids, ids, strict=True) if one >= 0]
        return sum(one != other for one, other in pairs), len(pairs)
    if kind is LabelKind.CLASS:
        return int(list(label.ids) != ids), 1
    return Levenshtein.distance(list(label.ids), ids), len(ids)


def _listed(reference: Any) -> Sequence[Any]:
    return reference if isinstance(reference, Sequence) else [reference]


def _same_length(first: Sequence[Any], second: Sequence[Any], what: str) -> None:
    if len(first) != len(second):
        raise ValueError(f"two labels of a row have {len(first)} and {len(second)} {what}: they cannot be compared")
