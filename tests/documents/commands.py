"""The commands of the documents: read by the programs' own parsers, and run in a folder of tiny data and recipes.

A command runs as it is written, with `EXTRA` behind it: the later of two values of an option wins.
"""

from __future__ import annotations

import contextlib
import functools
import io
import os
import re
import runpy
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import soundfile
import typer
import yaml
from accelerate.commands.launch import launch_command_parser
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from documents.blocks import FILE, ROOT, Block

from hf_ema_scaling import cli, demo
from hf_ema_scaling.data.synthetic import SyntheticCorpusConfig
from hf_ema_scaling.recipe import parse
from hf_ema_scaling.recipe.config import read_mapping
from hf_ema_scaling.recipe.registry import RECIPES, kind_of_file

STEPS, START = 12, 4
"""Reference steps of a run, and where pseudo-labels or large batches begin."""
SMALL = {
    "max_steps": STEPS,
    "pl_start": START,
    "small_batch_until": START,
    "augment_start": START,
    "warmup_steps": 2,
    "num_stable_steps": 4,
    "num_decay_steps": 2,
    "eval_steps": 4,
    "save_steps": 4,
    "logging_steps": 2,
    "save_total_limit": 100,
    "hidden_size": 16,
    "dim": 16,
    "intermediate_size": 16,
    "hidden_dim": 16,
    "num_hidden_layers": 1,
    "n_layers": 1,
    "subsampling_conv_channels": 4,
}
"""Values of recipes, where they have them."""
CORPUS = SyntheticCorpusConfig(
    labelled_minutes=0.3, unlabelled_minutes=0.5, evaluation_minutes=0.2, labelled_voices=3, unlabelled_voices=4
)
SECONDS = ["--labelled-minutes", "0.9", "--unlabelled-minutes", "0.6", "--evaluation-minutes", "0.2"]
EXTRA: dict[str, list[str]] = {
    "demo": ["--steps", "20"],
    "scripts/prepare_synthetic.py": SECONDS,
    "scripts/accelerate_loop.py": ["--reference-steps", "32", "--save-every", "16"],
    "scripts/benchmark_ema.py": ["--quick", "--rounds", "1", "--steps", "3", "--model", "many-small"],
    "scripts/benchmark_step.py": ["--quick", "--rounds", "1"],
    "scripts/noisy_parabola.py": ["--steps", "64", "--kappa", "8"],
    "scripts/kappa_sweep.py": ["--kappas", "2", "--seeds", "0", "--processes", "1"],
}
FETCHED = ("scripts/prepare_asterisk.py", "scripts/prepare_vader.py")
"""They download; what they would write lies there already."""
HUB_DATA = ("recipes/configs/librispeech_100_860.yaml", "recipes/configs/librispeech_whisper.yaml")
"""With data on the Hub: commands with them are only read here; `tests/recipes/test_dry_runs.py` runs them."""
NOT_RUN = ("make", "pip", ".", "git", *FETCHED)
HUB_NAME = ("OWNER/NAME", "tester/name")

# ---- What a command is


def program(words: list[str]) -> str:
    """The script or program that a command starts, without `python` and `accelerate launch`."""
    if words[:2] == ["accelerate", "launch"]:
        return str(launch_command_parser().parse_args(words[2:]).training_script)
    return words[1] if words[0] == "python" else words[0]


def arguments(words: list[str]) -> list[str]:
    """What the program is given."""
    if words[:2] == ["accelerate", "launch"]:
        return list(launch_command_parser().parse_args(words[2:]).training_script_args)
    return words[2:] if words[0] == "python" else words[1:]


# ---- Reading it


def load(script: str) -> ModuleType:
    """A script as a module."""
    name = f"documented_{Path(script).stem}"
    return ModuleType(name) if not (ROOT / script).is_file() else _module(name, str(ROOT / script))


@functools.cache
def _module(name: str, path: str) -> ModuleType:
    module = ModuleType(name)
    module.__file__ = path
    sys.modules[name] = module  # data classes look their module up
    exec(compile(Path(path).read_text(encoding="utf-8"), path, "exec"), vars(module))
    return module


def read_by_typer(app: typer.Typer, name: str, argv: list[str]) -> None:
    """Lets the real parser of a program take the arguments, without running it.

    Raises:
        click.UsageError: for arguments that it does not take.
    """
    command: Any = typer.main.get_command(app)
    if hasattr(command, "commands"):
        assert argv and argv[0] in command.commands, f"{name} has no command {argv[:1]}"
        name, command, argv = argv[0], command.commands[argv[0]], argv[1:]
    command.make_context(name, list(argv))


def read_recipe(argv: list[str]) -> None:
    """Lets the parser of a recipe take its arguments."""
    config = Path(argv[argv.index("--config") + 1])
    parse(kind_of_file(config).arguments, [*argv, "--use_cpu", "true", "--bf16", "false"])


def read(words: list[str]) -> None:
    """Checks a command by the parser that would read it; the working directory has the recipes.

    Raises:
        AssertionError: for a program, target or extra that is not there.
        click.UsageError, ValueError, SystemExit: from the parsers.
    """
    name, argv = program(words), arguments(words)
    if name == "make":
        assert set(argv) <= set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M)), words
    elif name == "pip":
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        named = [each for word in argv for part in re.findall(r"\[(.*?)\]", word) for each in part.split(",")]
        assert argv[0] == "install" and set(named) <= extras.keys(), words
    elif name == "hf-ema-scaling":
        read_by_typer(cli.main, name, argv)
        if argv[0] == "check":
            read_recipe(["--config", *argv[1:], "--output_dir", "o"])
    elif name.startswith("recipes/"):
        assert Path(name).stem in RECIPES, words
        read_recipe(argv)
    elif name.startswith("scripts/"):
        assert (ROOT / name).is_file(), words
        app = typer.Typer()
        app.command()(load(name).main)
        read_by_typer(app, name, argv)
    else:
        assert name in (".", "tensorboard", "git"), f"no parser is known for {words}"


# ---- A folder to run it in


def shrunk(settings: Any) -> Any:
    """Settings of a recipe with the values of `SMALL` in their places."""
    if not isinstance(settings, Mapping):
        return settings
    # A momentum of no more than what so short a run can show.
    return {name: SMALL.get(name, shrunk(value)) for name, value in settings.items()}


def small_words(words: list[str]) -> list[str]:
    """A command with the values of `SMALL` behind options of these names, and a repository of the loopback Hub."""
    words = [HUB_NAME[1] if word == HUB_NAME[0] else word for word in words]
    for number, word in enumerate(words[:-1]):
        name = word.removeprefix("--")
        if word.startswith("--") and name in SMALL:
            words[number + 1] = str(SMALL[name])
    return words


def write_tones(folder: Path, name: str, rows: int, seed: int, text: str | None) -> None:
    """A manifest of noisy tones; the words stand in the column `text` if it is a name."""
    import json

    rng, lines = np.random.default_rng(seed), []
    for row in range(rows):
        seconds = 0.6 + 0.1 * int(rng.integers(0, 6))
        time = np.arange(int(seconds * 16_000)) / 16_000
        tone = 0.3 * np.sin(2 * np.pi * rng.uniform(200, 2000) * time) + 0.05 * rng.standard_normal(len(time))
        file = folder / "wav" / f"{name}{row}.wav"
        file.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(file, tone.astype(np.float32), 16_000)
        words = " ".join(rng.choice(["ab", "ba", "cab", "bc"], size=2))
        lines.append({"audio": f"wav/{file.name}", "duration": seconds} | ({text: words} if text else {}))
    text_lines = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / f"{name}.jsonl").write_text(text_lines, encoding="utf-8")


def write_asterisk(folder: Path) -> None:
    """As `scripts/prepare_asterisk.py`, with tones."""
    write_tones(folder, "labelled", 24, 0, "text")
    write_tones(folder, "unlabelled", 24, 1, "hidden_reference")
    write_tones(folder, "evaluation", 4, 2, "text")


def write_vader(folder: Path) -> None:
    """As `scripts/prepare_vader.py`, with a few sentences."""
    features = Features({"text": Value("string"), "label": ClassLabel(names=["negative", "positive"])})
    good, bad = ["a good film", "good and funny", "so good"], ["a bad film , so bad", "dull", "bad and long"]

    def split(rows: int, shift: int) -> Dataset:
        texts = [(bad, good)[row % 2][(row // 2 + shift) % 3] for row in range(rows)]
        return Dataset.from_dict({"text": texts, "label": [row % 2 for row in range(rows)]}, features=features)

    splits = {"train": split(96, 0), "test": split(12, 1), "shifted": split(12, 2), "products": split(12, 0)}
    splits["unlabelled"] = split(48, 1).remove_columns("label")
    DatasetDict(splits).save_to_disk(str(folder))


def make_workspace(folder: Path, found: list[Block], *, small: bool) -> Path:
    """A folder with recipes, scripts and the files that the blocks of a document write.

    Args:
        folder: where.
        found: the blocks.
        small: shrink the recipes and make the data that scripts would fetch.
    """
    shutil.copytree(ROOT / "recipes", folder / "recipes", ignore=shutil.ignore_patterns("*.png", "*.csv"))
    for name in ("scripts", "README.md", "Makefile", "pyproject.toml"):
        (folder / name).symlink_to(ROOT / name)
    for block in found:
        if block.language == FILE:
            path = folder / block.directives["file"]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(block.text, encoding="utf-8")
    if small:
        files = [folder / block.directives["file"] for block in found if block.language == FILE]
        for path in [*(folder / "recipes" / "configs").glob("*.yaml"), *files]:
            settings = shrunk(read_mapping(path)) | {"use_cpu": True, "disable_tqdm": True}
            if settings.get("recipe", "asr_ctc") == "asr_ctc":  # so few texts do not have all letters
                settings = {"alphabet": "abcdefghijklmnopqrstuvwxyz'"} | settings
            path.write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")
        write_asterisk(folder / "data" / "asterisk")
        write_asterisk(folder / "mine")
        write_vader(folder / "data" / "vader")
    return folder


# ---- Running it


@contextlib.contextmanager
def small_demo() -> Iterator[None]:
    """`hf-ema-scaling demo` speaks a corpus of seconds, in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "run_demo", functools.partial(demo.run_demo, corpus=CORPUS, processes=1))
        yield


def run(words: list[str], *, launch: bool = False) -> str:
    """Runs a command in the working directory, in this process, and returns what it printed.

    Args:
        words: the command.
        launch: by `accelerate launch` itself, where it says so.

    Raises:
        AssertionError: when it fails.
    """
    words = small_words(words)
    name = program(words)
    if name in NOT_RUN:
        return ""
    if name.startswith("recipes/") and set(HUB_DATA) & set(words):
        read(words)
        return ""
    if launch and words[0] == "accelerate":
        return _run_launcher(words)
    argv = arguments(words)
    argv += EXTRA.get(argv[0] if name == "hf-ema-scaling" else name, [])
    printed = io.StringIO()
    with contextlib.ExitStack() as stack:
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        patch.setattr(sys, "argv", [name, *argv])
        stack.enter_context(small_demo())
        stack.enter_context(contextlib.redirect_stdout(printed))
        try:
            if name == "hf-ema-scaling":
                cli.main(argv, prog_name=name)
            else:
                runpy.run_path(name, run_name="__main__")
        except SystemExit as error:
            assert error.code in (None, 0), f"{words} ended with {error.code}: {printed.getvalue()[-3000:]}"
    return printed.getvalue()


def _run_launcher(words: list[str]) -> str:
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", *words[1:]]
    own = {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]), "OMP_NUM_THREADS": "1"}
    own |= {"ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(command, env=os.environ | own, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, f"{words}: {(done.stdout + done.stderr)[-3000:]}"
    return done.stdout
