"""`tests/DEFECTS.md` names tests that exist, and has every defect of the published list."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TABLE = (ROOT / "tests/DEFECTS.md").read_text(encoding="utf-8")
ROWS = [
    line
    for line in TABLE.splitlines()
    if line.startswith("|") and not line.startswith(("|---", "| defect", "| check"))
]
NAMED = sorted(set(re.findall(r"`(tests/[\w/]+\.py::\w+)`", TABLE)))


@cache
def names_in(file: str) -> frozenset[str]:
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    return frozenset(node.name for node in tree.body if isinstance(node, ast.FunctionDef))


@pytest.mark.parametrize("named", NAMED)
def test_a_test_that_is_named_exists(named: str) -> None:
    file, _, name = named.partition("::")
    assert name.startswith("test_") and name in names_in(file)


def test_every_row_names_a_test_and_the_published_defects_are_all_there() -> None:
    for row in ROWS:
        assert re.search(r"`tests/[\w/]+\.py::test_\w+`", row), row
    numbers = [int(match[1]) for row in ROWS if (match := re.match(r"\| (\d+)\. ", row))]
    assert numbers == list(range(1, 32))


def test_no_name_is_written_in_another_form() -> None:
    assert len(re.findall(r"\.py::", TABLE)) == len(re.findall(r"`tests/[\w/]+\.py::\w+`", TABLE))
