"""`run.json`: how a run was started and on what, for its model card and for whoever repeats it."""

from __future__ import annotations

import importlib.metadata
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

PACKAGES = ("hf-ema-scaling", "transformers", "torch", "datasets", "accelerate")
_SECRET = re.compile(r"(?:^|[_-])(?:token|secret|password|passwd|api[_-]?key)$", re.IGNORECASE)
_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{16,}\b")
_HIDDEN = "..."
_KERNELS = ("ipykernel_launcher", "colab_kernel_launcher")
_ON_HUB = re.compile(r"hf://datasets/([^@]+)@")
# Builders of `datasets` that read any file of their kind: not the name of a data set.
_BUILDERS = ("json", "csv", "parquet", "arrow", "text", "generator", "audiofolder", "imagefolder", "webdataset")


def own_record(
    datasets: Mapping[str, Any], base: str | None, processes: int, *, command: Sequence[str] | None = None
) -> dict[str, Any]:
    """What can be told of a run whose program is not one of this library's recipes: JSON values.

    Args:
        datasets: data sets by role, mappings of evaluation sets among them; None for a role that has none.
        base: name or folder of the model that training started from; empty or None for none.
        processes: how many train together.
        command: words that start the run again; None for those that started this program.

    Returns:
        `command` (words; without it where there is none, as in a notebook), `data` (by role), `base_model` (the name
        alone of a folder elsewhere), `base_model_on_hub`, `hub_datasets`, `versions` and `processes`.
    """
    words = command_line(sys.argv, processes) if command is None else list(command)
    return {
        **({"command": words} if words else {}),
        "data": {role: told(data) for role, data in datasets.items() if data is not None},
        "base_model": shown_path(base) if base else None,
        "base_model_on_hub": bool(base) and not Path(str(base)).exists(),
        "hub_datasets": list(dict.fromkeys(name for data in datasets.values() for name in _hub_names(data))),
        "versions": versions(),
        "processes": processes,
    }


def command_line(argv: Sequence[str], processes: int) -> list[str] | None:
    """The words that start this program again, without secrets.

    Args:
        argv: as in `sys.argv`.
        processes: how many of it run together; several are started by `accelerate launch`.

    Returns:
        None where it is no program: a notebook, a prompt, `python -c`.
    """
    main = sys.modules.get("__main__")
    first = argv[0] if argv else ""
    if first in ("", "-", "-c") or Path(first).stem in _KERNELS:
        return None
    spec = getattr(main, "__spec__", None)
    if spec is not None:
        return [*launcher(processes), "-m", spec.name.removesuffix(".__main__"), *without_secrets(argv[1:])]
    if Path(first).suffix == ".py":
        return [*launcher(processes), shown_path(first), *without_secrets(argv[1:])]
    return [Path(first).name, *without_secrets(argv[1:])]


def launcher(processes: int) -> list[str]:
    """The words before a script."""
    return ["python"] if processes == 1 else ["accelerate", "launch", "--num_processes", str(processes)]


def is_secret(name: str) -> bool:
    """Whether an argument of this name takes a token or password; `tokenizer` and `max_new_tokens` do not."""
    return bool(_SECRET.search(name))


def without_secrets(words: Sequence[str]) -> list[str]:
    """Words of a command line with `...` in the place of tokens and passwords."""
    shown: list[str] = []
    secret = False
    for word in words:
        if word.startswith("--"):
            name, given, _ = word.partition("=")
            secret = is_secret(name)
            shown.append(f"{name}={_HIDDEN}" if secret and given else _TOKEN.sub(_HIDDEN, word))
        else:
            shown.append(_HIDDEN if secret else _TOKEN.sub(_HIDDEN, word))
    return shown


def versions() -> dict[str, str]:
    """Of the packages that a run depends on, those that are installed."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:  # used from its source folder
            continue
    return found


def shown_path(name: str) -> str:
    """A path as others may read it: from the working directory, or the name alone of what lies elsewhere.

    What is no absolute path stays as it is.
    """
    path = Path(name)
    if not path.is_absolute():
        return name
    return path.relative_to(Path.cwd()).as_posix() if path.is_relative_to(Path.cwd()) else path.name


def told(data: Any) -> str:
    """A data set in a few words: its name where it has one, and its rows."""
    if isinstance(data, Mapping):
        return "; ".join(f"{name}: {told(part)}" for name, part in data.items())
    info = getattr(data, "info", None)
    name = next(iter(_hub_names(data)), None) or getattr(info, "dataset_name", None)
    config = getattr(info, "config_name", None)
    words = []
    if name is not None and name not in _BUILDERS:
        words = [str(name), *([str(config)] if config not in (None, "default") else [])]
        words += [f"split {split}"] if (split := getattr(data, "split", None)) is not None else []
    try:
        words.append(f"{len(data):,} rows")
    except TypeError:
        words.append("a stream")
    return ", ".join(words)


def _hub_names(data: Any) -> list[str]:
    """Repositories of the Hub that a data set was downloaded from."""
    if isinstance(data, Mapping):
        return [name for part in data.values() for name in _hub_names(part)]
    urls = getattr(getattr(data, "info", None), "download_checksums", None) or {}
    return list(dict.fromkeys(found[1] for url in urls if (found := _ON_HUB.match(str(url)))))
