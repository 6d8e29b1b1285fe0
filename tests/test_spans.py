"""Spans of BIO tags."""

from __future__ import annotations

import pytest

from hf_ema_scaling.spans import continuation_ids, is_bio, repaired, spans


@pytest.mark.parametrize(
    ("names", "bio"),
    [
        (["O", "B-a", "I-a", "B-b-c", "I-b-c"], True),
        (["B-a", "O"], True),
        (["O", "I-a"], False),
        (["O", "B-a", "I-b"], False),
        (["O", "B-a", "I-a", "E-a", "S-a"], False),
        (["LABEL_0", "LABEL_1"], False),
        (["O"], False),
    ],
)
def test_the_scheme_is_read_from_the_names(names: list[str], bio: bool) -> None:
    assert is_bio(names) is bio


@pytest.mark.parametrize(
    ("tags", "expected", "found"),
    [
        ("I-a I-a O", "B-a I-a O", [("a", 0, 2)]),
        ("O I-a B-a I-a", "O B-a B-a I-a", [("a", 1, 2), ("a", 2, 4)]),
        ("B-a I-b I-b", "B-a B-b I-b", [("a", 0, 1), ("b", 1, 3)]),
        ("B-a O I-a", "B-a O B-a", [("a", 0, 1), ("a", 2, 3)]),
        ("B-a B-a", "B-a B-a", [("a", 0, 1), ("a", 1, 2)]),
        ("I-b-c I-b", "B-b-c B-b", [("b-c", 0, 1), ("b", 1, 2)]),
        ("O O", "O O", []),
        ("", "", []),
    ],
)
def test_an_inside_without_a_begin_begins(tags: str, expected: str, found: list[tuple[str, int, int]]) -> None:
    given = tags.split()
    assert repaired(given) == expected.split()
    assert spans(given) == spans(expected.split()) == found
    assert repaired(expected.split()) == expected.split()


def test_later_sub_tokens_of_a_begin_are_inside() -> None:
    assert continuation_ids({0: "O", 1: "B-a", 2: "I-a", 3: "B-b"}) == {0: 0, 1: 2, 2: 2, 3: 3}
