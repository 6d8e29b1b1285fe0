"""Importing costs little: the package beyond torch and transformers, the command line without them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LIMIT = 1.0
# What users of transformers' Trainer import anyway.
BEFORE = "import torch, transformers, transformers.trainer, transformers.trainer_callback"
EVERYTHING = "import hf_ema_scaling as package; [getattr(package, name) for name in package.__all__]"


def python(code: str, *options: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, *options, "-c", code]
    return subprocess.run(command, env=environment, check=True, capture_output=True, text=True, timeout=120).stderr


def seconds(code: str, *, after: str = "") -> dict[str, float]:
    """Own time of every module that `code` imports, by name, without those that `after` had imported."""
    marker = "THE IMPORTS OF THE PACKAGE"
    text = python(f"{after}\nimport sys\nprint({marker!r}, file=sys.stderr)\n{code}", "-X", "importtime")
    found = re.findall(r"import time:\s+(\d+) \|\s+\d+ \|\s*(\S+)", text.split(marker)[1])
    return {name: int(own) / 1e6 for own, name in found}


def loaded(code: str) -> set[str]:
    """Top-level modules there are after `code`."""
    return set(
        python(
            f"{code}\nimport sys\nprint(*{{name.partition('.')[0] for name in sys.modules}}, file=sys.stderr)"
        ).split()
    )


def quickest(code: str, after: str = "") -> tuple[float, dict[str, float]]:
    """The least of three times: others may use the processor meanwhile."""
    times = []
    for _ in range(3):
        times.append(seconds(code, after=after))
        if sum(times[-1].values()) < LIMIT / 2:
            break
    least = min(times, key=lambda time: sum(time.values()))
    return sum(least.values()), least


def test_the_package_imports_nothing_heavy() -> None:
    heavy = {"torch", "transformers", "numpy", "datasets", "accelerate", "matplotlib", "jinja2"}
    assert not heavy & loaded("import hf_ema_scaling")
    total, modules = quickest("import hf_ema_scaling")
    assert "hf_ema_scaling" in modules and total < 0.1, modules


@pytest.mark.slow
def test_all_public_names_take_less_than_a_second_beyond_torch_and_transformers() -> None:
    total, modules = quickest(EVERYTHING, BEFORE)
    assert {"hf_ema_scaling.training.trainer", "hf_ema_scaling.ema.average", "hf_ema_scaling.labels.ctc"} <= set(
        modules
    )
    worst = sorted(modules.items(), key=lambda entry: -entry[1])[:10]
    assert total < LIMIT, f"{total:.2f} s, most of it {worst}"


def test_the_command_line_starts_without_torch() -> None:
    heavy = {"torch", "transformers", "datasets", "accelerate"}
    helped = "from typer.testing import CliRunner; from hf_ema_scaling.cli import main; "
    helped += "assert CliRunner().invoke(main, ['--help']).exit_code == 0"
    assert not heavy & loaded(helped)


def test_a_report_is_made_without_torch(tmp_path: Path) -> None:
    (tmp_path / "trainer_state.json").write_text('{"global_step": 1, "log_history": [{"loss": 1.0, "step": 1}]}')
    code = "from pathlib import Path; from hf_ema_scaling.report import read_runs, write_report; "
    code += f"write_report(read_runs([{str(tmp_path)!r}]), Path({str(tmp_path / 'r.html')!r}), figures=False)"
    assert not {"torch", "transformers", "datasets", "accelerate", "matplotlib"} & loaded(code)
    assert (tmp_path / "r.html").exists()
