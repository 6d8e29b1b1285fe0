"""The package's front door: every public name resolves, and importing it loads nothing heavy."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import version

import pytest

import hf_ema_scaling


@pytest.mark.parametrize("name", [name for name in hf_ema_scaling.__all__ if name != "__version__"])
def test_public_names_come_from_their_home(name: str) -> None:
    assert getattr(hf_ema_scaling, name).__name__ == name


def test_version_is_that_of_the_distribution() -> None:
    assert hf_ema_scaling.__version__ == version("hf-ema-scaling")


def test_unknown_names_are_refused_by_name() -> None:
    with pytest.raises(AttributeError, match="EMACallbak"):
        hf_ema_scaling.EMACallbak  # noqa: B018


def test_importing_the_package_loads_neither_torch_nor_transformers() -> None:
    code = "import sys, hf_ema_scaling, hf_ema_scaling.scaling, hf_ema_scaling.cli; print(*sorted(sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "transformers", "datasets"} & set(loaded)
