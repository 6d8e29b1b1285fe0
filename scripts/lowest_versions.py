"""Prints the lowest versions that pyproject.toml allows, as pip constraints: what `make test-lowest` installs.

    python scripts/lowest_versions.py                      # of what the package always needs
    python scripts/lowest_versions.py --extras peft,report # of these extras, too

Nothing but Python is needed, and nothing is asked of a package index.
"""

from __future__ import annotations

import argparse
import re
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path

PYPROJECT = Path(__file__).parents[1] / "pyproject.toml"
_REQUIREMENT = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]*)(\[[^]]*\])?\s*(.*)")


def lowest_versions(pyproject: Path = PYPROJECT, extras: Sequence[str] = ()) -> dict[str, str]:
    """Lowest version of every requirement by the name it has in pyproject.toml.

    Args:
        pyproject: the file.
        extras: whose requirements to add to those that are always there.

    Raises:
        ValueError: for a requirement without a lower bound (`>=`) or of another form, and for an unknown extra.
    """
    project = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]
    optional = project["optional-dependencies"]
    if unknown := sorted(set(extras) - optional.keys()):
        raise ValueError(f"there is no extra {', '.join(unknown)}: known are {', '.join(optional)}")
    lines = [*project["dependencies"], *(line for extra in extras for line in optional[extra])]
    return dict(_lowest(line) for line in lines)


def _lowest(line: str) -> tuple[str, str]:
    match = _REQUIREMENT.fullmatch(line)
    bounds = [] if match is None else re.findall(r">=\s*([0-9][0-9.]*)", match[3])
    if match is None or len(bounds) != 1:
        raise ValueError(f"{line!r}: one lower bound, name>=version, is expected")
    return match[1], bounds[0]


def main() -> None:
    """Prints one constraint per line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--extras", default="", help="comma-separated")
    extras = [name for name in parser.parse_args().extras.split(",") if name]
    try:
        found = lowest_versions(extras=extras)
    except ValueError as error:
        sys.exit(str(error))
    print("\n".join(f"{name}=={version}" for name, version in found.items()))


if __name__ == "__main__":
    main()
