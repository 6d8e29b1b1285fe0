"""Wheel and source distribution: what is in them, and that the package works from them without extras."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from dataclasses import dataclass
from email import message_from_string
from pathlib import Path

import pytest
from packaging.requirements import Requirement

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
STEM = f"hf_ema_scaling-{PROJECT['version']}"
INFO = f"{STEM}.dist-info"
MODULES = {"scikit-learn": "sklearn", "pillow": "PIL", "ema-pytorch": "ema_pytorch"}
OF_DEVELOPERS = {"hf-ema-scaling", "pytest", "pytest-xdist", "ruff", "mypy", "import-linter", "types-PyYAML"}
# Others that recipes and trackers may meet.
BLOCKED = {"trackio", "wandb", "torchvision", "librosa", "deepspeed", "bitsandbytes"} | {
    MODULES.get(name, name.replace("-", "_"))
    for lines in PROJECT["optional-dependencies"].values()
    for name in (Requirement(line).name for line in lines)
    if name not in OF_DEVELOPERS
}
# Nothing that is there is found: as if it were not installed, for `find_spec` too.
SITE = f"""
import sys
class Without:
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, *rest, **more):
        return None if name.partition(".")[0] in {BLOCKED!r} else self.finder.find_spec(name, *rest, **more)
    def __getattr__(self, name):
        return getattr(self.finder, name)
sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
"""
EVERY_MODULE = """
import importlib, json, pkgutil, sys
import hf_ema_scaling
names = [found.name for found in pkgutil.walk_packages(hf_ema_scaling.__path__, "hf_ema_scaling.")]
for name in names:
    importlib.import_module(name)
for name in hf_ema_scaling.__all__:
    getattr(hf_ema_scaling, name)
from importlib.metadata import version
tops = sorted({name.partition(".")[0] for name in sys.modules})
print(json.dumps([hf_ema_scaling.__file__, version("hf-ema-scaling"), names, tops]))
"""
BACKEND = "import os, sys; from setuptools import build_meta; print(getattr(build_meta, sys.argv[1])(sys.argv[2]))"


@dataclass
class Built:
    """Distributions of a copy of the repository."""

    wheel: Path
    sdist: Path
    installed: Path
    """Folder that pip installed the wheel into."""

    def run(self, *argv: str, status: int = 0) -> subprocess.CompletedProcess[str]:
        """A program that finds the installed wheel first and no extra at all."""
        (self.installed / "sitecustomize.py").write_text(SITE, encoding="utf-8")
        own = {"PYTHONPATH": str(self.installed), "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(
            argv, env=os.environ | own, cwd=self.installed.parent, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == status, done.stderr[-3000:]
        return done


def backend(hook: str, source: Path, output: Path) -> Path:
    """Calls the build backend as a front end does, without isolation, so without network."""
    output.mkdir(exist_ok=True)
    command = [sys.executable, "-c", BACKEND, hook, str(output)]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return output / done.stdout.splitlines()[-1]


def files(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    folder = tmp_path_factory.mktemp("build")
    # A copy: building writes into the tree, and tests and recipes must lie there to be left out.
    source = folder / "source"
    unwanted = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist", "runs", "data")
    shutil.copytree(
        ROOT, source, ignore=lambda at, names: unwanted(at, names) if Path(at) == ROOT else {"__pycache__"}
    )
    (source / "data").mkdir()
    (source / "data" / "labelled.jsonl").write_text("{}\n")
    sdist = backend("build_sdist", source, folder / "sdist")
    wheel = backend("build_wheel", source, folder / "wheel")
    target = folder / "installed"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(target)]
    subprocess.run([*pip, str(wheel)], check=True, timeout=300)
    return Built(wheel, sdist, target)


def test_the_wheel_holds_the_package_and_nothing_else(built: Built) -> None:
    package = ROOT / "hf_ema_scaling"
    wanted = {path.relative_to(ROOT).as_posix() for path in package.rglob("*") if path.is_file()}
    wanted = {name for name in wanted if "__pycache__" not in name}
    found = files(built.wheel)
    assert {name for name in found if not name.startswith(INFO)} == wanted
    assert {"hf_ema_scaling/py.typed", "hf_ema_scaling/templates/model_card.md.jinja"} <= wanted
    assert {name.removeprefix(f"{INFO}/") for name in found if name.startswith(INFO)} == {
        *("METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses/LICENSE", "top_level.txt")
    }
    assert found[f"{INFO}/entry_points.txt"].decode().split() == [
        *("[console_scripts]", "hf-ema-scaling", "=", "hf_ema_scaling.cli:main")
    ]


def test_the_wheel_says_what_it_needs(built: Built) -> None:
    metadata = message_from_string(files(built.wheel)[f"{INFO}/METADATA"].decode())
    assert (metadata["Version"], metadata["License-Expression"]) == (PROJECT["version"], "Apache-2.0")
    assert set(metadata.get_all("Provides-Extra")) == PROJECT["optional-dependencies"].keys()
    needed = [Requirement(line) for line in metadata.get_all("Requires-Dist")]
    always = {requirement.name: requirement.specifier for requirement in needed if requirement.marker is None}
    stated = {requirement.name: requirement.specifier for requirement in map(Requirement, PROJECT["dependencies"])}
    assert always == stated and all(str(specifier) for specifier in stated.values())


def test_the_source_distribution_builds_the_same_wheel(built: Built, tmp_path: Path) -> None:
    with tarfile.open(built.sdist) as archive:
        names = {name.removeprefix(f"{STEM}/") for name in archive.getnames()}
        archive.extractall(tmp_path, filter="data")
    tops = {name.partition("/")[0] for name in names}
    assert {"hf_ema_scaling", "pyproject.toml", "README.md", "LICENSE"} <= tops
    assert not {"tests", "data", "runs", "recipes", "scripts"} & tops
    again = files(backend("build_wheel", tmp_path / STEM, tmp_path / "wheel"))
    assert again == files(built.wheel)


def test_every_module_is_imported_without_extras(built: Built) -> None:
    done = built.run(sys.executable, "-c", EVERY_MODULE)
    place, version, names, tops = json.loads(done.stdout.splitlines()[-1])
    assert Path(place).is_relative_to(built.installed) and version == PROJECT["version"]
    assert len(names) > 100 and "hf_ema_scaling.training.trainer" in names
    assert {"peft", "trl", "timm", "diffusers", "espeakng_loader", "matplotlib", "av"} <= BLOCKED
    assert not BLOCKED & set(tops)


def test_the_command_runs_without_extras(built: Built) -> None:
    command = str(built.installed / "bin" / "hf-ema-scaling")
    helped = built.run(command, "--help").stdout
    assert all(name in helped for name in ("plan", "demo", "label", "report", "push", "check"))
    config = str(ROOT / "recipes" / "configs" / "librispeech_100_860.yaml")
    planned = json.loads(built.run(command, "plan", config, "--kappa", "4", "--json").stdout)
    assert planned["steps"] == 15_000 + 85_000 // 4


def test_what_an_extra_is_missing_for_is_said(built: Built) -> None:
    command = str(built.installed / "bin" / "hf-ema-scaling")
    done = built.run(command, "demo", "--output-dir", "out", status=1)
    assert 'pip install "hf-ema-scaling[report]"' in done.stderr and "Traceback" not in done.stderr
