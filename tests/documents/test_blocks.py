"""Every block of READMEs and guides: Python code runs, commands are read by their parsers and run on tiny data."""

from __future__ import annotations

import ast
import gc
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import zip_longest
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub.constants
import pytest
import torch
import transformers.utils.hub
from accelerate.state import AcceleratorState
from documents import commands
from documents.blocks import DOCUMENTS, FILE, OUTPUT, PYTHON, SHELL, Block, blocks, skip_without
from documents.setups import SETUPS
from hub.loopback import TOKEN, Hub, loopback
from transformers.utils.hub import HfApi

from hf_ema_scaling.training import EMACallback

BLOCKS = {name: blocks(path) for name, path in DOCUMENTS.items()}
CODE_ALONE = ("README", "api", "which_weights_am_i_getting", "migrating")
"""Documents whose Python code takes nothing from their commands."""
FOLLOWED = tuple(name for name in DOCUMENTS if name not in CODE_ALONE)
"""Documents that are followed from the first block to the last."""
EXTRAS = ("espeakng_loader", "matplotlib")
"""What the commands of documents need beside the library itself."""


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A cache of its own, and no accelerator of the test before."""
    cache = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(cache))
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    gc.collect()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A Hub that this process talks to, with a token."""
    with loopback() as server:
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.url)
        monkeypatch.setattr(transformers.utils.hub, "_hf_api", HfApi(endpoint=server.url))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield server


def has_moved(trainer: Any) -> None:
    """The average of a trainer was updated at every step and is neither its start nor its student."""
    callbacks = [each for each in trainer.callback_handler.callbacks if isinstance(each, EMACallback)]
    average = callbacks[0].average if callbacks else trainer.average
    assert average.num_updates == trainer.state.global_step > 0
    assert 0 < average.distance(trainer.model) < 1


def run_alone(block: Block, folder: Path) -> None:
    """Runs Python code in a new process, which knows the loopback Hub by its environment."""
    endpoint = huggingface_hub.constants.ENDPOINT
    assert "127.0.0.1" in endpoint, "a block may only load from the loopback Hub"
    own = {"HF_ENDPOINT": endpoint, "HF_TOKEN": TOKEN, "HF_HOME": str(folder / "home"), "HF_HUB_DISABLE_XET": "1"}
    own |= {"HF_HUB_OFFLINE": "0", "PYTHONPATH": os.pathsep.join(sys.path)}
    words = [sys.executable, "-c", block.small()]
    done = subprocess.run(words, env=os.environ | own, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


def execute(block: Block, names: dict[str, Any], folder: Path) -> None:
    """Runs Python code statement by statement, with the document's lines in tracebacks."""
    for setup in block.listed("needs"):
        names |= SETUPS[setup.lower()](folder)
    if "process" in block.directives:
        run_alone(block, folder)
        return
    torch.manual_seed(0)
    for statement in block.statements():
        exec(compile(ast.Module([statement], []), block.place.partition(":")[0], "exec"), names)
        if "train" in block.directives and ast.unparse(statement) == "trainer.train()":
            has_moved(names["trainer"])


@pytest.mark.parametrize("name", [name for name in CODE_ALONE if name in BLOCKS])
def test_code_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": name}
    found = [block for block in BLOCKS[name] if block.language == PYTHON]
    assert found
    missing: list[str] = []
    for block in found:
        missing += (absent := block.missing())
        if not absent:
            execute(block, names, tmp_path)
    skip_without(missing)


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A folder with the recipes as they are and the files of a document."""
    made: dict[str, Path] = {}

    def place(name: str) -> Path:
        if name not in made:
            made[name] = commands.make_workspace(tmp_path_factory.mktemp(name), BLOCKS[name], small=False)
        return made[name]

    return place


@pytest.mark.parametrize("name", [name for name in BLOCKS if any(b.language == SHELL for b in BLOCKS[name])])
def test_commands_are_read_by_their_parsers(
    name: str, places: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(places(name))
    for block, following in zip_longest(BLOCKS[name], BLOCKS[name][1:]):
        for words in block.commands() if block.language == SHELL else []:
            try:
                commands.read(words)
                if words[:2] == ["hf-ema-scaling", "plan"]:
                    printed = commands.run(words)
                    assert "steps" in printed
                    # Plans are arithmetic: what a document shows of them is what they print.
                    if following is not None and following.language == OUTPUT and len(block.commands()) == 1:
                        assert printed.split() == following.text.split()
            except BaseException as error:
                error.add_note(f"{block.place}: {' '.join(words)}")
                raise


@pytest.mark.parametrize("name", ["recipes", "model_cards"])
def test_commands_in_tables_are_read_by_their_parsers(
    name: str, places: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are too long to run, or run elsewhere (`tests/recipes/test_dry_runs.py` takes two steps of each recipe)."""
    monkeypatch.chdir(places(name))
    programs = ("python", "accelerate", "hf-ema-scaling")
    rows = [line for line in DOCUMENTS[name].read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    found = [text for row in rows for text in re.findall(r"`([^`]+)`", row) if text.split()[0] in programs]
    assert len(found) >= 5
    for text in found:
        commands.read(Block(f"{name}:1", SHELL, text).commands()[0])


def test_a_wrong_command_is_refused(places: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(places("README"))
    for line, error in (
        ("hf-ema-scaling plann x", AssertionError),
        ("hf-ema-scaling report runs/a --outputs x", Exception),
        ("hf-ema-scaling check recipes/configs/asterisk_en.yaml --max_stepss 3", ValueError),
        ("accelerate launch recipes/asr_ctc.py --config recipes/configs/asterisk_en.yaml --kapa 2", ValueError),
        ("python scripts/kappa_sweep.py recipes/configs/sweep_text.yaml --seed 3 --output_dir o", Exception),
        ("make demonstration", AssertionError),
        ("pip install -e .[wings]", AssertionError),
    ):
        with pytest.raises(error):
            commands.read(Block("x:1", SHELL, line).commands()[0])


@pytest.mark.slow
@pytest.mark.parametrize("name", FOLLOWED)
def test_a_guide_is_followed(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hub: Hub) -> None:
    follow(name, tmp_path, monkeypatch, only=(SHELL, PYTHON, FILE))


@pytest.mark.slow
def test_the_commands_of_the_readme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hub: Hub) -> None:
    follow("README", tmp_path, monkeypatch, only=(SHELL,))
    assert (tmp_path / "runs" / "demo" / "report.png").is_file()


def follow(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch, *, only: tuple[str, ...]) -> None:
    """Runs the blocks of a document in their order; the first command of `accelerate launch` by accelerate itself."""
    skip_without(Block(name, SHELL, "", {"packages": ", ".join(EXTRAS)}).missing())
    monkeypatch.chdir(commands.make_workspace(folder, BLOCKS[name], small=True))
    names: dict[str, Any] = {"__name__": name}
    launch = True
    for block in BLOCKS[name]:
        if block.language == PYTHON and PYTHON in only:
            execute(block, names, folder)
        for words in block.commands() if block.language == SHELL else []:
            AcceleratorState._reset_state(reset_partial_state=True)
            try:
                commands.run(words, launch=launch)
            except BaseException as error:
                error.add_note(f"{block.place}: {' '.join(words)}")
                raise
            launch = launch and words[0] != "accelerate"
