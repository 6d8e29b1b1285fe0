"""What a function reaches beside its arguments: whether it computes with the student's weights wherever it runs."""

from __future__ import annotations

import dis
import functools
import types
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn


def reaches(function: Any, model: nn.Module) -> str | None:
    """Says how a function gets at a part of a model without being handed it, or None if it does not seem to.

    Looked through are closures, defaults, partial arguments, the globals that a function of the same file reads, and
    plain containers. What hides in an attribute of another object is not seen here; `check_liveness` sees what a
    teacher then says.

    Args:
        function: A function, a bound method, a partial, or any object.
        model: The model.

    Returns:
        The variable and what it holds, such as "'old', the forward of 'classifier'".
    """
    owned = {id(part): f"{name!r}" if name else "the model itself" for name, part in model.named_modules()}
    for kind in (model.named_parameters(), model.named_buffers()):
        owned.update((id(tensor), f"the tensor {name!r}") for name, tensor in kind)
    # Other files are other people's: a search through what they know would not end.
    return _search(function, owned, getattr(function, "__globals__", {}), set())


def _search(value: Any, owned: Mapping[int, str], home: Mapping[str, Any], seen: set[int]) -> str | None:
    if id(value) in seen:
        return None
    seen.add(id(value))
    for name, held in _held(value, home):
        found = _owned(held, owned)
        if found is not None:
            return f"{name!r}, {found}"
        deeper = _search(held, owned, home, seen)
        if deeper is not None:
            return deeper
    return None


def _owned(value: Any, owned: Mapping[int, str]) -> str | None:
    if id(value) in owned:
        return owned[id(value)]
    if isinstance(value, types.MethodType) and id(value.__self__) in owned:
        return f"the {value.__name__} of {owned[id(value.__self__)]}"
    return None


def _held(value: Any, home: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """What a value holds, with the name by which its owner knows it."""
    if isinstance(value, types.MethodType):
        yield "self", value.__self__
        yield value.__name__, value.__func__
    elif isinstance(value, functools.partial):
        yield "func", value.func
        yield from ((f"argument {number}", held) for number, held in enumerate(value.args))
        yield from value.keywords.items()
    elif isinstance(value, types.FunctionType):
        for name, cell in zip(value.__code__.co_freevars, value.__closure__ or (), strict=True):
            try:
                yield name, cell.cell_contents
            except ValueError:  # not filled yet
                continue
        arguments = value.__code__.co_varnames[: value.__code__.co_argcount]
        defaults = value.__defaults__ or ()
        yield from zip(arguments[len(arguments) - len(defaults) :], defaults, strict=True)
        yield from (value.__kwdefaults__ or {}).items()
        if value.__globals__ is home:
            yield from ((name, home.get(name)) for name in sorted(_globals_read(value.__code__)))
    elif isinstance(value, Mapping):
        yield from ((str(name), held) for name, held in value.items())
    elif isinstance(value, (list, tuple, set, frozenset)):
        yield from ((f"item {number}", held) for number, held in enumerate(value))


def _globals_read(code: types.CodeType) -> set[str]:
    names = {step.argval for step in dis.get_instructions(code) if step.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
    for inner in code.co_consts:
        if isinstance(inner, types.CodeType):
            names |= _globals_read(inner)
    return names
