"""Folders of runs, and pages as their readers find them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from report_runs import Page, write_run


@pytest.fixture
def run_folder(tmp_path: Path) -> Callable[..., Path]:
    """Writes a run into the folder of that name."""
    return lambda name="run", **changes: write_run(tmp_path / name, **changes)


@pytest.fixture
def read_page() -> Callable[[str], Page]:
    """Parses a page, which must close what it opens."""
    return Page
