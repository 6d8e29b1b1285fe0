from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path
from types import ModuleType

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parents[2]
PYPROJECT = ROOT / "pyproject.toml"
EXTRAS = ("demo", "report", "asterisk", "byol", "peft")
"""What users install."""


def load() -> ModuleType:
    path = ROOT / "scripts" / "lowest_versions.py"
    spec = importlib.util.spec_from_file_location("lowest_versions", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


script = load()


def test_pins_are_the_lowest_versions_that_pyproject_allows() -> None:
    project = tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))["project"]
    lines = project["dependencies"] + [line for extra in EXTRAS for line in project["optional-dependencies"][extra]]
    pins = script.lowest_versions(extras=EXTRAS)
    assert len(pins) == len(lines) >= 20
    for requirement in map(Requirement, lines):
        lowest = Version(pins[requirement.name])
        assert requirement.specifier.contains(lowest), requirement
        # Any version before it is not allowed.
        assert not requirement.specifier.contains(f"{lowest}.dev0", prereleases=True), requirement


def test_what_is_installed_is_allowed() -> None:
    for name, lowest in script.lowest_versions().items():
        assert Version(version(name)) >= Version(lowest), name


def test_the_program_prints_constraints() -> None:
    def printed(*argv: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-I", str(ROOT / "scripts" / "lowest_versions.py"), *argv]
        return subprocess.run(command, capture_output=True, text=True)

    lines = printed("--extras", "peft").stdout.splitlines()
    assert all(re.fullmatch(r"[A-Za-z0-9_-]+==[0-9.]+", line) for line in lines)
    assert lines == [f"{name}=={lowest}" for name, lowest in script.lowest_versions(extras=["peft"]).items()]
    refused = printed("--extras", "pefd")
    assert refused.returncode == 1 and "there is no extra pefd: known are demo" in refused.stderr


def test_make_installs_them_with_the_extras_of_users() -> None:
    made = subprocess.run(
        ["make", "-n", "test-lowest", "LOWEST=not/there"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert f"scripts/lowest_versions.py --extras {','.join(EXTRAS)} > not/there/lowest.txt" in made
    assert "-r not/there/lowest.txt" in made


@pytest.mark.parametrize("line", ["numpy", "numpy<3", "numpy>=1,>=2", "numpy @ file:///x"])
def test_a_requirement_without_one_lower_bound_is_refused(line: str, tmp_path: Path) -> None:
    path = tmp_path / "pyproject.toml"
    path.write_text(f"[project]\ndependencies = [{line!r}]\n[project.optional-dependencies]\n", encoding="utf-8")
    with pytest.raises(ValueError, match="one lower bound, name>=version, is expected"):
        script.lowest_versions(path)
