"""At the end, how far runs over several processes were from the same runs on one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import apart
import pytest

PROPERTY = "largest differences"


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    """Puts what a test noted into its report, which processes of pytest-xdist hand on."""
    if call.when == "setup":
        apart.LARGEST.clear()
    elif call.when == "call" and apart.LARGEST:
        item.user_properties.append((PROPERTY, dict(apart.LARGEST)))
    yield


def pytest_terminal_summary(terminalreporter: Any) -> None:
    rows = [
        (report.nodeid, value)
        for report in terminalreporter.getreports("passed")
        if report.when == "call"
        for name, value in report.user_properties
        if name == PROPERTY
    ]
    if not rows:
        return
    terminalreporter.section("relative differences between one process and several", sep="-")
    for nodeid, value in rows:
        listed = ", ".join(f"{kind} {apart:.1e}" for kind, apart in value.items())
        terminalreporter.write_line(f"{nodeid.rpartition('/')[2]}: {listed}")
