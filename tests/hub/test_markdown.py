"""Whatever text a card is given is shown letter by letter, and does nothing else."""

from __future__ import annotations

import re
import shlex
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from hf_ema_scaling.hub.markdown import command, escaped, fenced, image, plain, table

HOSTILE = [
    "</script><script>alert(1)</script>",
    "a|b|c",
    "one\ntwo\r\nthree\u2028four",
    "``` code ``` and `code`",
    "# heading",
    "- item",
    "1. item",
    "1) item",
    "===",
    "---",
    "+ item",
    "[link](javascript:alert(1))",
    "![picture](x.png)",
    "<img src=x onerror=alert(1)>",
    "&lt;b&gt; &amp; &#60;",
    "**bold** _italic_ ~~gone~~ $$x^2$$",
    "back\\slash \\| and \\\\",
    "key: value\n--- {a: [1, 2]} # comment",
    "{{ 7 * 7 }} {% raw %}",
    "<!-- comment -->",
    "\udcff lone surrogate",
    "    indented",
    "> quote",
    "http://example.org/_a_",
]


class _Seen(HTMLParser):
    """Text and elements of a page."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.text: list[str] = []
        self.elements: list[str] = []

    def handle_starttag(self, tag: str, attributes: object) -> None:
        self.elements.append(tag)

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def seen(markdown: str) -> tuple[str, list[str]]:
    """What a reader of Markdown sees of it, in one line, and its elements; HTML in it counts as HTML."""
    page = _Seen()
    page.feed(MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]).render(markdown))
    return " ".join("".join(page.text).split()), page.elements


def one_line(text: str) -> str:
    return " ".join(plain(text).split())


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_is_only_text(text: str) -> None:
    assert seen(escaped(text)) == (one_line(text), ["p"])
    assert seen(f"- {escaped(text)}") == (one_line(text), ["ul", "li"])
    told, elements = seen(table([["head", text], [text, 1.0]]))
    assert told == f"head {one_line(text)} {one_line(text)} 1"
    assert elements == ["table", "thead", "tr", "th", "th", "tbody", "tr", "td", "td"]
    shown, elements = seen(fenced(text, "bash"))
    assert elements == ["pre", "code"] and one_line(shown) == one_line(text)
    assert seen(image("a b(1).png", text))[1] == ["p", "img"]


@given(st.text(max_size=30))
def test_any_text_is_only_text(text: str) -> None:
    expected = one_line(text)
    assert seen(f"x {escaped(text)}") == (f"x {expected}".strip(), ["p"])
    assert seen(table([["a", "b"], ["x", text]]))[0] == f"a b x {expected}".strip()


@pytest.mark.parametrize(
    ("value", "shown"), [(0.5, "0.5"), (-0.25, "-0.25"), (1e-8, "1e-08"), (3, "3"), (2**30, None)]
)
def test_numbers(value: float, shown: str) -> None:
    assert escaped(value) == (shown or str(value))


def test_commands_are_what_a_shell_reads() -> None:
    words = ["python", "a b.py", "--config", "x'y.yaml", "--n", "$HOME", "--text", "`id`"]
    assert shlex.split(command(words).replace("\\\n", "")) == words
    assert command(words).count("\n") == 3


def test_paths_of_pictures_are_quoted() -> None:
    assert re.fullmatch(r"!\[t\]\(figures/a%20b%29%3C%3E\.png\)", image(Path("figures/a b)<>.png").as_posix(), "t"))
