"""Names of an average's folder inside a checkpoint."""

from __future__ import annotations

import re

EMA_FOLDER = "ema"
"""Folder of the average inside a checkpoint; that of an average with a name is `ema-<name>`."""


def folder_name(name: str | None) -> str:
    """Folder of an average inside a checkpoint.

    Args:
        name: Tells several averages of one run apart; None for the one without a name.

    Raises:
        ValueError: The name is not a plain part of a file name.
    """
    if name is None:
        return EMA_FOLDER
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise ValueError(
            f"name must be letters, digits, '.', '_' and '-', beginning with a letter or digit, got {name!r}: the "
            "average is saved in the folder ema-<name> of each checkpoint"
        )
    return f"{EMA_FOLDER}-{name}"
