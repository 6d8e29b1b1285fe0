from __future__ import annotations

from collections.abc import Iterator

import pytest
from crash_lives import Lives


@pytest.fixture(scope="session")
def lives() -> Iterator[Lives]:
    made = Lives()
    yield made
    assert made.end() == 0
