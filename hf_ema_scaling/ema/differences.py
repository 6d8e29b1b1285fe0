"""What was set on a student after it was built, and is not on a teacher that was built anew: hooks, modules, forwards.

None of it is carried over, except forwards that are methods of their module (`ema.forwards`). A hook may write where
the teacher has no business (activations that are collected, calls that are counted), and nothing tells those that do
from those that change what a module returns; another module may hold anything. So they are listed here, what they
change is measured (`check_agreement`), and a factory says explicitly what a teacher has.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.utils.parametrize import is_parametrized

from hf_ema_scaling.ema.forwards import name_of, replaced_forward
from hf_ema_scaling.ema.names import canonical_name
from hf_ema_scaling.ema.sharding import class_of

_LIBRARIES = frozenset({"accelerate", "bitsandbytes", "deepspeed", "peft", "torch", "transformers"})
_HOOKS = {"_forward_pre_hooks": "forward pre-hook", "_forward_hooks": "forward hook"}
_ALIKE_IN_EVAL: tuple[tuple[type[nn.Module], ...], ...] = ((_DropoutNd, nn.Identity), (_BatchNorm,))


class Difference(NamedTuple):
    """One thing that student and teacher do not have in common."""

    name: str
    """Canonical name of the module, empty for the model itself."""
    what: str
    """For people."""
    doubtful: bool
    """Whether it may well change outputs. Hooks of libraries, and layers that are alike in eval mode, are not."""


def differences(student: nn.Module, teacher: nn.Module) -> list[Difference]:
    """Lists what the student's modules have that the teacher's of the same name have not, in the order of the modules.

    Args:
        student: The unwrapped student.
        teacher: A module of its names and shapes.
    """
    found: list[Difference] = []
    parts = _by_name(teacher)
    for name, part in _by_name(student).items():
        if name in parts:
            found += (Difference(name, *one) for one in _of_module(part, parts[name], f"on {name or 'the model'}"))
    return found


def attributes(student: nn.Module, teacher: nn.Module, name: str) -> list[str]:
    """Plain public attributes of one module in which student and teacher differ, such as an epsilon set by hand."""
    pair = [_by_name(model).get(name) for model in (student, teacher)]
    if pair[0] is None or pair[1] is None:
        return []
    one, other = ({key: value for key, value in vars(part).items() if _is_plain(key, value)} for part in pair)
    return [
        f"{key}={value!r} (the teacher's: {other.get(key, 'missing')!r})"
        for key, value in one.items()
        if key not in other or other[key] != value
    ]


def described(found: Iterable[Difference], limit: int = 4) -> str:
    """The differences as a clause of a message; empty for none."""
    texts = [difference.what for difference in found]
    more = f", and {len(texts) - limit} more" if len(texts) > limit else ""
    return ", ".join(texts[:limit]) + more


def _by_name(model: nn.Module) -> dict[str, nn.Module]:
    """The parts by canonical name; of a wrapper and what is in it, the latter."""
    return {canonical_name(name): part for name, part in model.named_modules()}


def _of_module(student: nn.Module, teacher: nn.Module, where: str) -> Iterator[tuple[str, bool]]:
    kinds = _written_class(student), _written_class(teacher)
    if kinds[0] is not kinds[1]:
        text = f"{kinds[0].__qualname__} in the place of {kinds[1].__qualname__} {where}"
        alike = any(all(issubclass(kind, family) for kind in kinds) for family in _ALIKE_IN_EVAL)
        yield text, not alike and getattr(kinds[0], "forward", None) is not getattr(kinds[1], "forward", None)
    forward = replaced_forward(student)
    if forward is not None and replaced_forward(teacher) is None:
        yield f"forward {name_of(forward)!r} {where}", True
    for table, kind in _HOOKS.items():
        theirs = Counter(map(_identity, getattr(teacher, table).values()))
        for hook in getattr(student, table).values():
            if theirs[_identity(hook)] > 0:
                theirs[_identity(hook)] -= 1
            else:
                yield f"{kind} {_identity(hook)[1]!r} {where}", _identity(hook)[0] not in _LIBRARIES
    hook = getattr(student, "_hf_hook", None)
    if hook is not None and type(getattr(teacher, "_hf_hook", None)) is not type(hook):
        yield f"accelerate's hook {type(hook).__qualname__!r} {where}", _identity(hook)[0] not in _LIBRARIES


def _written_class(part: nn.Module) -> type[nn.Module]:
    """The class that somebody wrote: torch makes a new one for every module that has parametrizations."""
    kind = class_of(part)
    return kind.__mro__[1] if is_parametrized(part) else kind


def _identity(hook: Any) -> tuple[str, str]:
    """The package in which a hook is written, and its name."""
    while isinstance(hook, functools.partial):
        hook = hook.func
    module = getattr(hook, "__module__", None) or type(hook).__module__
    return str(module).partition(".")[0], name_of(hook)


def _is_plain(key: str, value: Any) -> bool:
    return not key.startswith("_") and key != "training" and isinstance(value, (bool, int, float, str, tuple))
