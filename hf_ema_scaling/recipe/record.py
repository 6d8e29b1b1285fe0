"""What `run.json` says of a recipe: its command, its settings and its data."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hf_ema_scaling.recipe.config import read_mapping
from hf_ema_scaling.recipe.sources import named_sources
from hf_ema_scaling.training.run_record import is_secret, launcher, versions, without_secrets

DATA_KEYS = ("labelled", "unlabelled", "images", "evaluation")
BASE_KEY = "model_name_or_path"
_PREPARES = re.compile(r"^#[ \t]+(python scripts/prepare_\w+\.py [^#\n]*?)[ \t]*(?:#.*)?$", re.MULTILINE)


def run_record(argv: Sequence[str], processes: int) -> dict[str, Any]:
    """What a recipe's command line says: JSON values.

    Args:
        argv: script and arguments, as in `sys.argv`; tokens and passwords are left out.
        processes: how many trained together.

    Returns:
        `command` (words), `preparation` (command lines, as from the function of this name), `settings` (file and
        command line together), `data` (sources by role), `base_model`, which data sets and whether the base model are
        `on_hub`, `versions` and `processes`.
    """
    pairs = _pairs(argv[1:])
    settings: dict[str, Any] = {}
    header = ""
    config = pairs.pop("config", None)
    if config is not None and Path(config).is_file():
        settings = read_mapping(Path(config))
        header = Path(config).read_text(encoding="utf-8")
    settings |= {name: None if value == "null" else value for name, value in pairs.items()}
    settings = {name: value for name, value in settings.items() if not is_secret(name)}
    data = {name: settings[name] for name in DATA_KEYS if settings.get(name)}
    sources = [str(data[name]) for name in DATA_KEYS[:-1] if name in data]
    base = settings.get(BASE_KEY)
    return {
        "command": [*launcher(processes), *without_secrets(argv)],
        "preparation": preparation(header, settings),
        "settings": settings,
        "data": {role: _told(source) for role, source in data.items()},
        "base_model": base,
        "base_model_on_hub": bool(base) and not Path(str(base)).exists(),
        "hub_datasets": list(dict.fromkeys(name.partition(":")[0] for name in sources if _on_hub(name))),
        "versions": versions(),
        "processes": processes,
    }


def preparation(header: str, settings: Mapping[str, Any]) -> list[str]:
    """The command lines of a file's header that make what its settings name: data, tokenizer, model.

    Args:
        header: text of the file; a comment line of its own is `#   python scripts/prepare_NAME.py FOLDER ...`.
        settings: of the run; a command whose folder none of them names is left out, as where the command line has
            other data.
    """
    text = " ".join(map(str, settings.values()))
    lines = list(dict.fromkeys(_PREPARES.findall(header)))
    return [line for line in lines if re.search(rf"(?<![\w./-]){re.escape(line.split()[2])}(?![\w-])", text)]


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


def _told(source: Any) -> str:
    sets: Mapping[str, Any] = source if isinstance(source, dict) else named_sources(str(source))
    return ", ".join(f"{name}: {where}" if name else str(where) for name, where in sets.items())


def _on_hub(source: str) -> bool:
    before = source.rpartition(":")[0]
    return bool(before) and not Path(source).exists() and not Path(before).exists()
