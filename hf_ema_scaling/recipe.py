"""What all recipes share: arguments from a YAML file and the command line, speech data, models, and one run of them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args, get_type_hints

import yaml
from transformers import (
    HfArgumentParser,
)

# ---- Arguments


class _Loader(yaml.SafeLoader):
    """Reads 5e-4 as a number, as YAML 1.2 does, and refuses a key that is written twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """As SafeLoader, without letting the last of two equal keys win."""
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        twice = sorted({str(key) for key in keys if keys.count(key) > 1})
        if twice:
            raise ValueError(f"{node.start_mark}: {', '.join(twice)} is written twice")
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def parse(dataclass_types: Sequence[Any], argv: Sequence[str] | None = None) -> tuple[Any, ...]:
    """Arguments from `--config file.yaml` and from the command line, which wins.

    The YAML file is one flat mapping of argument names to values. A list or mapping for an argument that is a string
    (`batch_schedule`, `model_config`) becomes JSON; `null`, here and on the command line, is None where that is
    allowed. Required arguments may stand in either place. Relative paths are relative to the working directory.

    Args:
        dataclass_types: as for `HfArgumentParser`.
        argv: arguments; those of the program by default.

    Returns:
        One instance per data class, in order.

    Raises:
        ValueError: for an unknown name (with the names close to it) or a value that does not fit its argument.
        SystemExit: from argparse, for a value on the command line that does not fit.
    """
    usage = "%(prog)s --config FILE.yaml [--name value ...]"
    parser = HfArgumentParser(list(dataclass_types), usage=usage, allow_abbrev=False)
    hints = {name: hint for kind in dataclass_types for name, hint in get_type_hints(kind).items()}
    actions = {action.dest: action for action in reversed(parser._actions) if action.dest in hints}
    for name, action in actions.items():
        if type(None) in get_args(hints[name]) and action.type is not None:
            action.type = _nullable(action.type)
    parser.add_argument("--config", type=Path, help="YAML file with arguments; the command line wins over it.")
    config, _ = parser.parse_known_args(["--config", *_value_of("--config", argv)])
    if config.config is not None:
        for name, value in _mapping(config.config).items():
            if name not in actions:
                raise ValueError(f"{config.config}: no argument is called {name!r}{_close(name, actions)}")
            action = actions[name]
            action.required = False
            parser.set_defaults(**{name: _converted(f"{config.config}: {name}", value, action, hints[name])})
    *parsed, namespace, rest = parser.parse_args_into_dataclasses(
        args=None if argv is None else list(argv), look_for_args_file=False, return_remaining_strings=True
    )
    if rest:
        name = rest[0].removeprefix("--").partition("=")[0].replace("-", "_")
        raise ValueError(f"no argument is called {rest[0]!r}{_close(name, actions)}")
    return tuple(parsed)
