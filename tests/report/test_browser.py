"""The page in a real browser, without a window: drawn in the colours of both schemes, narrow and wide."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from report_runs import colours

from hf_ema_scaling.report import read_runs, write_report

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine: apt-get install chromium"),
]
SCHEMES = {"light": 1, "dark": 0}


def screenshot(page: Path, scheme: str, width: int, height: int) -> np.ndarray:
    image = pytest.importorskip("matplotlib.image")
    path = page.with_name(f"{scheme}-{width}.png")
    command = [str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
               f"--user-data-dir={page.parent / 'profile'}",
               f"--blink-settings=preferredColorScheme={SCHEMES[scheme]}",
               f"--window-size={width},{height}", f"--screenshot={path}", page.as_uri()]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    return np.rint(image.imread(path)[..., :3] * 255).astype(int)


def share(pixels: np.ndarray, colour: tuple[int, ...]) -> float:
    return float((np.abs(pixels - np.array(colour)).max(-1) <= 2).mean())


@pytest.mark.parametrize("scheme", SCHEMES)
def test_it_is_drawn_in_the_colours_of_the_scheme(scheme: str, run_folder: Callable[..., Path]) -> None:
    page = write_report(read_runs([run_folder("a"), run_folder("b")]), run_folder("page") / "r.html", figures=False)[0]
    pixels, wanted = screenshot(page, scheme, 1280, 3600), colours(scheme)
    assert pixels.shape == (3600, 1280, 3)
    assert share(pixels, wanted["page"]) + share(pixels, wanted["panel"]) > 0.85
    # Headings, and the curves of both runs.
    assert share(pixels, wanted["ink"]) > 1e-3
    assert share(pixels, wanted["run1"]) > 2e-4
    other = colours("dark" if scheme == "light" else "light")
    assert share(pixels, other["page"]) < 1e-3


def test_a_narrow_page_is_no_wider_than_its_window(run_folder: Callable[..., Path]) -> None:
    page = write_report(read_runs([run_folder()]), run_folder("page") / "r.html", figures=False)[0]
    pixels, wanted = screenshot(page, "light", 500, 6000), colours("light")
    # Panels end before the margin, which is empty all the way down.
    assert share(pixels[:, -20:], wanted["page"]) > 0.999
    assert share(pixels[:, -60:-30], wanted["panel"]) > 0.2
