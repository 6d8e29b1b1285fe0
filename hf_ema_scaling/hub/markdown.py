"""Cards as Markdown: whatever a template prints is escaped unless it was made here."""

from __future__ import annotations

import re
import shlex
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from importlib.resources import files
from typing import Any
from urllib.parse import quote

from jinja2 import Environment, StrictUndefined

_ENTITIES = {"&": "&amp;", "<": "&lt;", ">": "&gt;"}
_MARKUP = re.compile(r"([\\`*_\[\]|~$])")
# What makes a list, a heading or a rule of a line; a number with a sign makes none of them.
_LINE_START = re.compile(r"^([-+=#](?=[-+=#\s]|$)|\d+(?=[.)](?:\s|$)))")


class Markdown(str):
    """Text that is Markdown already."""

    __slots__ = ()


def plain(value: object) -> str:
    """A value as one line of text: numbers to six digits, control characters and line ends as spaces."""
    if isinstance(value, float):
        return f"{value:.6g}"
    text = str(value).encode("utf-8", "replace").decode("utf-8")
    return "".join(" " if unicodedata.category(letter) in ("Cc", "Zl", "Zp") else letter for letter in text)


def escaped(value: object) -> Markdown:
    """A value as Markdown that shows it letter by letter, on one line, also within a table."""
    text = plain(value).strip()
    for letter, entity in _ENTITIES.items():
        text = text.replace(letter, entity)
    text = _MARKUP.sub(r"\\\1", text)
    # Numbers of lists are no punctuation, which alone may follow a backslash.
    return Markdown(_LINE_START.sub(lambda found: "".join(f"&#{ord(letter)};" for letter in found[1]), text))


def table(rows: Sequence[Sequence[object]]) -> Markdown:
    """A table; the first row is its head, the first column is aligned left, the others right."""
    head, *body = ["| " + " | ".join(_finalized(cell) for cell in row) + " |" for row in rows]
    rule = "|" + "|".join([":---", *["---:"] * (len(rows[0]) - 1)]) + "|"
    return Markdown("\n".join([head, rule, *body]))


def fenced(text: str, language: str = "") -> Markdown:
    """A code block whose fence is longer than any run of backticks in it."""
    lines = [plain(line).rstrip() for line in text.splitlines()]
    longest = max((len(run) for line in lines for run in re.findall("`+", line)), default=0)
    fence = "`" * max(3, longest + 1)
    return Markdown("\n".join([fence + language, *lines, fence]))


def image(path: str, title: str) -> Markdown:
    """A picture of the repository."""
    return Markdown(f"![{escaped(title)}]({quote(path.encode('utf-8', 'surrogateescape'))})")


def command(words: Iterable[str]) -> str:
    """A command as a shell reads it, one line per option."""
    lines: list[list[str]] = [[]]
    for word in words:
        if word.startswith("--") and lines[-1]:
            lines.append([])
        lines[-1].append(shlex.quote(word))
    return " \\\n    ".join(" ".join(line) for line in lines)


def render(template: str, values: Mapping[str, Any]) -> str:
    """A template of this package with its values."""
    environment = Environment(
        finalize=_finalized,
        undefined=StrictUndefined,
        autoescape=False,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    source = (files("hf_ema_scaling") / "templates" / template).read_text(encoding="utf-8")
    text = environment.from_string(source).render(**values)
    return re.sub(r"\n{3,}", "\n\n", text)


def _finalized(value: object) -> str:
    return value if isinstance(value, Markdown) else escaped(value)
