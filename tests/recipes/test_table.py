"""The table in `recipes/README.md`: every configuration is in it, its commands parse, its numbers are the files'."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from accelerate.commands.launch import launch_command_parser
from dry_runs import CONFIGS, RECIPES, script_of

from hf_ema_scaling.recipe import parse
from hf_ema_scaling.recipe.config import read_mapping
from hf_ema_scaling.recipe.registry import kind_of_file
from hf_ema_scaling.sweep import lay_out_sweep

ROOT = RECIPES.parent
COLUMNS = ["task", "model", "data", "command", "time", "result"]
TEXT = (RECIPES / "README.md").read_text(encoding="utf-8")


def rows() -> dict[str, dict[str, str]]:
    """Cells by configuration and column, of the first table."""
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in TEXT.splitlines() if line[:1] == "|"]
    assert lines[0] == COLUMNS
    table = [line for line in lines if len(line) == len(COLUMNS)][2:]
    named = {re.findall(r"\(\[(\w+)\]\(configs/\1\.yaml\)\)", line[0])[0]: line for line in table}
    assert len(named) == len(table)
    return {name: dict(zip(COLUMNS, line, strict=True)) for name, line in named.items()}


ROWS = rows()


def header(name: str) -> str:
    lines = CONFIGS[name].read_text(encoding="utf-8").splitlines()
    return "\n".join(line for line in lines if line.startswith("#"))


def test_every_configuration_and_script_is_in_it() -> None:
    assert ROWS.keys() == CONFIGS.keys()
    scripts = {path.name for path in RECIPES.glob("*.py")}
    assert scripts == {f"{script_of(path).stem}.py" for path in CONFIGS.values()}
    for link in re.findall(r"\]\(([^)#]+)\)", TEXT):
        assert (RECIPES / link).exists(), link


@pytest.mark.parametrize("name", ROWS)
def test_its_command_parses(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    words = shlex.split(ROWS[name]["command"].strip("`"))
    config = Path("recipes/configs") / f"{name}.yaml"
    if words[:2] == ["accelerate", "launch"]:
        launched = launch_command_parser().parse_args(words[2:])
        assert Path(launched.training_script) == script_of(CONFIGS[name]).relative_to(ROOT)
        argv = [*launched.training_script_args, "--use_cpu", "true", "--bf16", "false"]
        assert argv[:2] == ["--config", str(config)]
        parsed = parse(kind_of_file(config).arguments, argv)
        assert any(str(getattr(found, "output_dir", "")).startswith("runs/") for found in parsed)
    else:
        assert words[:3] == ["python", "scripts/kappa_sweep.py", str(config)]
        assert words[3::2] == ["--metric", "--output_dir"] and words[6].startswith("runs/")
        jobs = lay_out_sweep(read_mapping(config), [0.5, 1, 2, 4, 8], [0, 1, 2], tmp_path)
        # The runs, beside the phase that those of a seed share.
        assert f"{len(jobs) - 3} runs" in ROWS[name]["time"]


@pytest.mark.parametrize("name", [name for name in ROWS if not name.startswith("sweep")])
def test_its_numbers_are_those_of_the_file(name: str) -> None:
    told = header(name)
    cells = f"{ROWS[name]['time']} {ROWS[name]['result']}"
    numbers = re.findall(r"\d+\.\d+|\d+(?= s\b| CPU| minutes)", cells)
    if re.search(r"^# NOT RUN", told, flags=re.MULTILINE):
        assert cells == "not run not run" and not numbers
    elif "NOT YET RUN" in told:
        assert cells == "not run to the end not run to the end"
    else:
        assert numbers and all(re.search(rf"(?<![\d.]){re.escape(number)}(?![\d.]*\d)", told) for number in numbers)
