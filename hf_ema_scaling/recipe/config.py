"""Arguments from a YAML file and the command line."""

from __future__ import annotations

import argparse
import difflib
import functools
import json
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, get_args, get_type_hints

import yaml
from transformers import HfArgumentParser

KIND_KEY = "recipe"
"""Key of a file that names the kind of its recipe; see `hf_ema_scaling.recipe.registry`."""


class _Loader(yaml.SafeLoader):
    """Reads 5e-4 as a number, as YAML 1.2 does, and refuses a key that is written twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        twice = sorted({str(key) for key in keys if keys.count(key) > 1})
        if twice:
            raise ValueError(f"{', '.join(twice)} is given twice")
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def parse(
    dataclass_types: Sequence[Any], argv: Sequence[str] | None = None, *, ignored: Iterable[str] = ()
) -> tuple[Any, ...]:
    """Arguments from `--config FILE.yaml` and the command line, which wins.

    The file is one flat mapping of argument names to values. Lists and mappings for an argument that takes a string
    (`batch_schedule`, `lr_scheduler_kwargs`, `model_config`) become JSON. `null`, there and on the command line, is
    None where an argument may be None. Required arguments may stand in either place. Relative paths are relative to
    the working directory. The file may also name its kind of recipe (`recipe`), which is not read here.

    Args:
        dataclass_types: as for `HfArgumentParser`.
        argv: arguments; by default those of the program.
        ignored: names of other arguments, which the file may hold and nobody reads here.

    Returns:
        One instance per data class.

    Raises:
        ValueError: for an unknown name, with the names close to it, or a value in the file that does not fit.
        SystemExit: from argparse, for a value on the command line that does not fit.
    """
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--config", type=Path)
    chosen, rest = first.parse_known_args(argv)
    usage = "%(prog)s --config FILE.yaml [--name value ...]"
    parser = HfArgumentParser(list(dataclass_types), usage=usage, allow_abbrev=False)
    hints = {name: hint for kind in dataclass_types for name, hint in get_type_hints(kind).items()}
    actions = {action.dest: action for action in reversed(parser._actions) if action.dest in hints}
    for name, action in actions.items():
        if type(None) in get_args(hints[name]):
            action.type = _nullable(action.type or str)
    ignored = {*ignored, KIND_KEY} - actions.keys()
    for name, value in {} if chosen.config is None else read_mapping(chosen.config).items():
        if name in ignored:
            continue
        if name not in actions:
            raise ValueError(f"{chosen.config}: no argument is called {name!r}{close_names(str(name), actions)}")
        actions[name].required = False
        try:
            parser.set_defaults(**{name: _converted(value, actions[name], hints[name])})
        except (ValueError, TypeError, argparse.ArgumentTypeError) as error:
            raise ValueError(f"{chosen.config}: {name}: {error}") from error
    *parsed, unknown = parser.parse_args_into_dataclasses(
        rest, look_for_args_file=False, return_remaining_strings=True
    )
    if unknown:
        name = unknown[0].lstrip("-").partition("=")[0].replace("-", "_")
        raise ValueError(f"no argument is called {unknown[0]!r}{close_names(name, actions)}")
    return tuple(parsed)


def read_mapping(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        ValueError: when the file is no YAML, holds a key twice, or is no mapping.
    """
    try:
        loaded = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error
    if not isinstance(loaded, dict):
        raise ValueError(f"{path} must be a mapping of argument names to values, got {type(loaded).__name__}")
    return loaded


def close_names(name: str, known: Iterable[str]) -> str:
    """`: did you mean ...?` with the names close to `name`, or nothing."""
    matches = difflib.get_close_matches(name, list(known), 3)
    return f": did you mean {' or '.join(matches)}?" if matches else ""


def _nullable(convert: Any) -> Callable[[str], Any]:
    @functools.wraps(convert, updated=())
    def converted(text: str) -> Any:
        return None if text == "null" else convert(text)

    return converted


def _converted(value: Any, action: argparse.Action, hint: Any) -> Any:
    """A value from YAML as the command line would give it."""
    kinds = get_args(hint) or (hint,)
    convert: Callable[[str], Any] = action.type or str  # type: ignore[assignment]
    if value is None:
        if type(None) not in kinds:
            raise ValueError("may not be null")
        return None
    if action.nargs == "+":
        return [convert(str(part)) for part in (value if isinstance(value, list) else [value])]
    if isinstance(value, list | dict):
        if str not in kinds:
            raise ValueError(f"takes one value, got {value!r}")
        return json.dumps(value)
    if isinstance(value, bool) and bool not in kinds:
        # YAML 1.1 reads the words no, off, yes and on as booleans.
        if action.choices and "no" in action.choices and not value:
            value = "no"
        elif str in kinds and not action.choices:
            value = json.dumps(value)
        else:
            raise ValueError(f"takes no boolean, got {value}; quote the words no, off, yes and on")
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    converted = convert(str(value))
    if action.choices and converted not in action.choices:
        raise ValueError(f"must be one of {', '.join(map(str, action.choices))}, got {value!r}")
    return converted
