"""Every module, function and test that the paper index names is there."""

from __future__ import annotations

import ast
import importlib
import re
from pathlib import Path

import pytest
from documents.blocks import GUIDES, ROOT

INDEX = GUIDES / "paper_index.md"
ROWS = [
    [cell.strip() for cell in line.strip("|").split(" | ")]
    for line in INDEX.read_text(encoding="utf-8").splitlines()
    if line.startswith("| ") and "`" in line
]


def resolve(name: str) -> object:
    """A module, or what it defines, by its dotted name; the module must be the one that defines it."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        try:
            found: object = importlib.import_module(".".join(parts[:length]))
        except ModuleNotFoundError:
            continue
        for part in parts[length:]:
            found = getattr(found, part)
        home = getattr(found, "__module__", None)
        assert length == len(parts) or home == ".".join(parts[:length]), f"{name} is defined in {home}"
        return found
    raise AssertionError(f"{name} is not there")


def functions_of(path: Path) -> set[str]:
    return {node.name for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("row", ROWS, ids=[row[0][:60] for row in ROWS])
def test_what_a_row_names_exists(row: list[str]) -> None:
    assert len(row) == 3, row
    code, tests = (re.findall(r"`(.*?)`", cell) for cell in row[1:])
    assert code and tests, row
    for name in code:
        if name.startswith("scripts/"):
            assert (ROOT / name).is_file(), name
        else:
            resolve(name)
    for name in tests:
        path, _, function = name.partition("::")
        assert function.startswith("test_") and function in functions_of(ROOT / path), name


def test_there_are_rows_and_a_wrong_name_is_noticed() -> None:
    assert len(ROWS) > 30
    for wrong in ("hf_ema_scaling.scaling.momentum.scale_momenta", "hf_ema_scaling.scalling"):
        with pytest.raises((AssertionError, AttributeError)):
            resolve(wrong)
    with pytest.raises(AssertionError):
        resolve("hf_ema_scaling.ema.WeightAverage")


def test_numbers_of_equations_are_those_of_the_docstrings() -> None:
    """A numbered place of a paper is named in a file of the code that the row names, or in its test."""
    numbered = [row for row in ROWS if re.search(r"\b(eq\.|section|definition|appendix) [A-Z\d]", row[0])]
    assert len(numbered) >= 8
    for row in numbered:
        places = re.findall(r"(?:eq\.|section|definition|appendix) [A-Z\d.]*\d(?: to \d+)?", row[0])
        texts = "".join(path.read_text() for path in sources(row)).lower()
        assert places and all(place.lower() in texts for place in places), (row[0], places)


def sources(row: list[str]) -> list[Path]:
    """The files that a row names."""
    found = [ROOT / name.partition("::")[0] for name in re.findall(r"`(tests/.*?)`", row[2])]
    for name in re.findall(r"`(hf_ema_scaling\..*?)`", row[1]):
        while not (path := ROOT / (name.replace(".", "/") + ".py")).is_file() and "." in name:
            name = name.rpartition(".")[0]
        found.append(path)
    return found
