"""Spans in tags by word: the BIO scheme (IOB2), and sequences of tags that follow it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

OUTSIDE = "O"
Span = tuple[str, int, int]
"""Type, first word, and the word behind the last one."""


def is_bio(names: Sequence[str]) -> bool:
    """Whether tags are those of the BIO scheme: `O`, `B-x`, `I-x`, where each type with `I-` has `B-` too."""
    kinds = {name for name in names if name != OUTSIDE}
    inside = {name[2:] for name in kinds if name.startswith("I-")}
    begun = {name[2:] for name in kinds if name.startswith("B-")}
    return bool(begun) and inside <= begun and all(name.startswith(("B-", "I-")) for name in kinds)


def repaired(tags: Sequence[str]) -> list[str]:
    """The tags with `B-x` for every `I-x` that follows neither `B-x` nor `I-x`: a span begins there."""
    result: list[str] = []
    for tag in tags:
        goes_on = bool(result) and result[-1] != OUTSIDE and result[-1][2:] == tag[2:]
        result.append(f"B-{tag[2:]}" if tag.startswith("I-") and not goes_on else tag)
    return result


def spans(tags: Sequence[str]) -> list[Span]:
    """Spans of BIO tags, in order; tags that do not follow the scheme are read as `repaired` ones."""
    found: list[Span] = []
    for place, tag in enumerate(repaired(tags)):
        if tag.startswith("B-"):
            found.append((tag[2:], place, place + 1))
        elif tag.startswith("I-"):
            kind, first, _ = found[-1]
            found[-1] = (kind, first, place + 1)
    return found


def continuation_ids(id2label: Mapping[int, str]) -> dict[int, int]:
    """For each label id, the id that later sub-tokens of a word with it have: `I-x` for `B-x`, else the same."""
    ids = {name: index for index, name in id2label.items()}
    return {
        index: ids.get(f"I-{name[2:]}", index) if name.startswith("B-") else index for index, name in id2label.items()
    }
