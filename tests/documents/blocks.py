"""The fenced blocks of the documents, and what HTML comments before them say about running them.

A block is Python (`python`), commands (`bash`, or no language), a file (`yaml`, with its name), or output (`text`),
which is not run. On the line before its fence may stand, one after the other:

    <!-- needs: NAME, NAME -->      set-ups of `documents.setups`, whose names the block may use
    <!-- packages: NAME, NAME -->   it is skipped where one of them is not installed
    <!-- small: 20_000 -> 4 -->      what is put in the place of a text of the block when it is run
    <!-- process -->                it runs in a process of its own, as a user's program that knows the Hub alone
    <!-- train -->                  `trainer.train()` follows each assignment to `trainer`
    <!-- file: NAME -->             what the block holds is written to a file of this name
"""

from __future__ import annotations

import ast
import importlib.util
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

import hf_ema_scaling

ROOT = Path(hf_ema_scaling.__file__).parents[1]
GUIDES = ROOT / "recipes" / "guides"
DOCUMENTS = {
    "README": ROOT / "README.md",
    "recipes": ROOT / "recipes" / "README.md",
    "model_cards": ROOT / "model_cards" / "README.md",
} | {path.stem: path for path in sorted(GUIDES.glob("*.md"))}
SHELL, PYTHON, FILE, OUTPUT = "bash", "python", "yaml", "text"
COMMENT = re.compile(r"<!-- ([a-z]+)(?:: (.*?))? -->")
FENCE = re.compile(r"^```(\w*)\s*$")
DIRECTIVES = ("needs", "packages", "small", "process", "train", "file")


@dataclass(frozen=True)
class Block:
    """A fenced block.

    Args:
        place: document and line of its fence, for messages.
        language: one of `SHELL`, `PYTHON`, `FILE`, `OUTPUT`.
        text: as it stands there.
        directives: what the comments before it say, by name.
    """

    place: str
    language: str
    text: str
    directives: dict[str, str] = field(default_factory=dict)

    def listed(self, name: str) -> list[str]:
        return [part.strip() for part in self.directives.get(name, "").split(",") if part.strip()]

    def small(self) -> str:
        """The text with what is put in its place."""
        text = self.text
        for pair in self.listed("small"):
            before, _, after = pair.partition(" -> ")
            assert before in text, f"{self.place}: {before!r} is not in the block"
            text = text.replace(before, after)
        return text

    def missing(self) -> list[str]:
        """Packages that it needs and that are not installed."""
        return [name for name in self.listed("packages") if importlib.util.find_spec(name) is None]

    def statements(self) -> Iterator[ast.stmt]:
        """Those of Python code, in order, with the lines of the document."""
        tree = ast.parse(self.small(), self.place)
        trained = ast.parse("trainer.train()").body
        for statement in ast.increment_lineno(tree, int(self.place.rpartition(":")[2])).body:
            yield statement
            targets = statement.targets if isinstance(statement, ast.Assign) else []
            if "train" in self.directives and "trainer" in [getattr(target, "id", "") for target in targets]:
                yield from trained

    def commands(self) -> list[list[str]]:
        """The words of each command; comments are left out, and lines that end in a backslash joined."""
        lines = self.text.replace("\\\n", " ").splitlines()
        return [words for line in lines if (words := shlex.split(line, comments=True))]


def blocks(path: Path) -> list[Block]:
    """All blocks of a document, in order.

    Raises:
        ValueError: for a language or a comment that is not known, or a fence that is not closed.
    """
    found: list[Block] = []
    directives: dict[str, str] = {}
    start, language, inside = 0, "", []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        place = f"{path.name}:{number}"
        fence = FENCE.match(line)
        if start and line.strip() == "```":
            found.append(Block(f"{path.name}:{start}", language, "\n".join(inside) + "\n", directives))
            start, directives, inside = 0, {}, []
        elif start:
            inside.append(line)
        elif fence:
            start, language = number, fence[1] or SHELL
            if language not in (SHELL, PYTHON, FILE, OUTPUT):
                raise ValueError(f"{place}: a block of {language!r}")
        elif comment := COMMENT.fullmatch(line.strip()):
            if comment[1] not in DIRECTIVES:
                raise ValueError(f"{place}: no directive is called {comment[1]!r}")
            directives[comment[1]] = comment[2] or ""
        elif line.strip():
            directives = {}
    if start:
        raise ValueError(f"{path.name}:{start}: the block is not closed")
    return found


def skip_without(packages: list[str]) -> None:
    """Skips the test where one of the packages is not installed."""
    if packages:
        pytest.skip(f"not installed: {', '.join(packages)}")
