"""Whether the labels of a head have what filters ask for: known before the first label is made."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from hf_ema_scaling.labels.base import CONFIDENCE, Labeler, LabelKind, kind_of, scores_of
from hf_ema_scaling.labels.filter_base import TEXT
from hf_ema_scaling.labels.filters import FILTERS

SAID = {
    LabelKind.TOKENS: "texts",
    LabelKind.CLASS: "one class per row",
    LabelKind.CLASSES: "several classes per row",
    LabelKind.NUMBERS: "numbers",
    LabelKind.WORDS: "classes of words",
}


def check_served(filters: Mapping[str, Any], labeler: Labeler, head: str, given: Collection[str]) -> None:
    """Refuses filters that judge by what the labels of a head do not have.

    What a labeler does not say of its labels (`kind`, `score_names`) is not known here: see `check_scores`.

    Args:
        filters: filters, or the classes of them, by the names that the message uses.
        labeler: makes the labels.
        head: name of the model's class, for the message.
        given: what a row has in this run beside its label, of `TEXT`, `SECONDS` and `SOURCE`.

    Raises:
        ValueError: naming the filter, the head, and the filters that it can have.
    """
    for name, one in filters.items():
        problem = _problem(one, labeler)
        if problem is None:
            continue
        served = [
            known
            for known, kind in FILTERS.items()
            if _problem(kind, labeler) is None and set(getattr(kind, "needs", ())) <= set(given)
        ]
        raise ValueError(
            f"the filter {name} {problem} of {head} ({type(labeler).__name__}); filters that work here: "
            f"{', '.join(served) or 'none'}"
        )


def _problem(one: Any, labeler: Labeler) -> str | None:
    """Why a filter cannot judge the labels, as the middle of a sentence; None where it can, or nobody knows."""
    kind, scores = kind_of(labeler), scores_of(labeler)
    kinds = set(getattr(one, "kinds", LabelKind))
    if TEXT in getattr(one, "needs", ()):
        kinds &= {LabelKind.TOKENS}
    if kind is not None and kind not in kinds:
        wanted = " or ".join(SAID[each] for each in LabelKind if each in kinds)
        return f"judges labels that are {wanted}, which are not those ({SAID[kind]})"
    missing = sorted(set(getattr(one, "needs_scores", ())) - (scores or set()))
    if scores is None or not missing:
        return None
    if missing == [CONFIDENCE]:
        return "judges by the confidence, which says nothing with the labels"
    known = ", ".join(sorted(scores - {CONFIDENCE})) or "none"
    way_out = " (two_views(labeler, view) gives it)" if missing == ["disagreement"] else ""
    return f"judges by the score {missing[0]!r}{way_out}, which is not among those ({known}) of the labels"


def names_of(filters: Iterable[Any]) -> dict[str, Any]:
    """Filters by their names in recipes; others by the names of their classes."""
    names: dict[Any, str] = {kind: name for name, kind in FILTERS.items()}
    return {names.get(type(one), type(one).__name__): one for one in filters}
