"""`run.json`: how a run was started, for its model card and for whoever repeats it."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hf_ema_scaling.hub.run_folder import RECORD_NAME
from hf_ema_scaling.recipe.config import read_mapping
from hf_ema_scaling.recipe.sources import named_sources

DATA_KEYS = ("labelled", "unlabelled", "images", "evaluation")
BASE_KEY = "model_name_or_path"
PACKAGES = ("hf-ema-scaling", "transformers", "torch", "datasets", "accelerate")
_SECRET = "token"
_HIDDEN = "..."


def write_run_record(folder: str | Path | None, argv: Sequence[str], processes: int) -> None:
    """Writes `run.json` into `folder`, see `run_record`."""
    text = json.dumps(run_record(argv, processes), indent=1)
    (Path(folder or ".") / RECORD_NAME).write_text(text + "\n", encoding="utf-8")


def run_record(argv: Sequence[str], processes: int) -> dict[str, Any]:
    """What a recipe's command line says: JSON values.

    Args:
        argv: script and arguments, as in `sys.argv`; values of arguments with `token` in their name are left out.
        processes: how many trained together.

    Returns:
        `command` (words), `settings` (file and command line together), `data` (sources by role), `base_model`, which
        data sets and whether the base model are `on_hub`, `versions` and `processes`.
    """
    pairs = _pairs(argv[1:])
    settings: dict[str, Any] = {}
    config = pairs.pop("config", None)
    if config is not None and Path(config).is_file():
        settings = read_mapping(Path(config))
    settings |= {name: None if value == "null" else value for name, value in pairs.items()}
    settings = {name: value for name, value in settings.items() if _SECRET not in name}
    data = {name: settings[name] for name in DATA_KEYS if settings.get(name)}
    sources = [str(data[name]) for name in DATA_KEYS[:-1] if name in data]
    base = settings.get(BASE_KEY)
    start = ["python"] if processes == 1 else ["accelerate", "launch", "--num_processes", str(processes)]
    return {
        "command": [*start, *_without_secrets(argv)],
        "settings": settings,
        "data": {role: _told(source) for role, source in data.items()},
        "base_model": base,
        "base_model_on_hub": bool(base) and not Path(str(base)).exists(),
        "hub_datasets": list(dict.fromkeys(name.partition(":")[0] for name in sources if _on_hub(name))),
        "versions": {name: version for name in PACKAGES if (version := _version(name)) is not None},
        "processes": processes,
    }


def _pairs(words: Sequence[str]) -> dict[str, str]:
    """Arguments by name, as `parse` reads them."""
    found: dict[str, str] = {}
    name = None
    for word in words:
        if word.startswith("--"):
            name, given, value = word.removeprefix("--").partition("=")
            name = name.replace("-", "_")
            found[name] = value if given else "true"
            name = None if given else name
        elif name is not None:
            found[name] = word if found[name] == "true" else f"{found[name]} {word}"
    return found


def _without_secrets(argv: Sequence[str]) -> list[str]:
    words: list[str] = []
    secret = False
    for word in argv:
        if word.startswith("--"):
            name, given, _ = word.partition("=")
            secret = _SECRET in name
            words.append(f"{name}={_HIDDEN}" if secret and given else word)
        else:
            words.append(_HIDDEN if secret else word)
    return words


def _told(source: Any) -> str:
    sets: Mapping[str, Any] = source if isinstance(source, dict) else named_sources(str(source))
    return ", ".join(f"{name}: {where}" if name else str(where) for name, where in sets.items())


def _on_hub(source: str) -> bool:
    before = source.rpartition(":")[0]
    return bool(before) and not Path(source).exists() and not Path(before).exists()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # used from its source folder
        return None
