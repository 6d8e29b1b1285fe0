"""What is checked of more than one kind of arguments."""

from __future__ import annotations


def one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    """Refuses a value that is none of those known.

    Raises:
        ValueError: naming both.
    """
    if value not in known:
        raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")


def at_most_one(arguments: object, names: tuple[str, ...]) -> None:
    """Refuses two of several arguments that exclude each other; None is for one that is not given.

    Raises:
        ValueError: naming those given.
    """
    given = {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}
    if len(given) > 1:
        raise ValueError(f"give at most one of {', '.join(names)}, got {given}")
