"""Links of README and guides lead to files and headings that are there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from documents.blocks import DOCUMENTS, ROOT

LINK = re.compile(r"\]\(([^)\s]+)\)")


def anchors(path: Path) -> set[str]:
    """Those of the headings of a document, as GitHub makes them."""
    text = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.M | re.S)
    headings = re.findall(r"^#+ (.*)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken(path: Path, text: str) -> list[str]:
    """Links of a document, by its place and text, that lead nowhere."""
    found = []
    for link in LINK.findall(text):
        target, _, anchor = link.partition("#")
        if "://" in target:
            continue
        file = (path.parent / target).resolve() if target else path
        if not file.exists() or (anchor and anchor not in anchors(file)):
            found.append(link)
    return found


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links_lead_somewhere(name: str) -> None:
    assert broken(DOCUMENTS[name], DOCUMENTS[name].read_text(encoding="utf-8")) == []


def test_broken_links_are_found() -> None:
    text = "[a](recipes/guides/nowhere.md) [b](#nothing) [c](#supported-and-not-yet) [d](LICENSE) [e](https://x.y/z)"
    assert broken(ROOT / "README.md", text) == ["recipes/guides/nowhere.md", "#nothing"]
