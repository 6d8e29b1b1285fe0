"""Forward methods that were replaced on the instance: the teacher must run them too, but on its own weights."""

from __future__ import annotations

import types
from typing import Any

from torch import nn
from torch._dynamo import OptimizedModule

from hf_ema_scaling.ema.names import canonical_name


def carry_over_forwards(student: nn.Module, teacher: nn.Module) -> None:
    """Gives a teacher the `forward` methods that were replaced on parts of the student.

    A module built from class and configuration computes with the forward of its class, which then is another function
    than the student's. A method bound to its own module (`types.MethodType`) is bound to the teacher's module instead.
    Anything else (a closure, a partial) has the student's weights inside, and cannot be told from them. What
    accelerate (mixed precision, hooks) and `torch.compile` put around a forward is looked through: it is no part of
    the model.

    Args:
        student: The unwrapped student; left as it is.
        teacher: A module of the same structure.

    Raises:
        TypeError: A replaced forward that is no method of its module.
        ValueError: The teacher has no module of that name.
    """
    parts = {canonical_name(name): part for name, part in teacher.named_modules()}
    for name, part in student.named_modules():
        forward = _replaced(part)
        if forward is None:
            continue
        own = isinstance(forward, types.MethodType) and forward.__self__ is part
        if not own:
            raise TypeError(
                f"forward was replaced on {name or 'the model'} ({type(part).__name__}) by "
                f"{getattr(forward, '__qualname__', type(forward).__name__)!r}, which is no method of that module: it "
                "would compute with the student's weights, and a teacher without it would compute something else. "
                "Bind it with types.MethodType(function, module) and use only its first argument, or pass `factory=`, "
                "a function that returns a new model with its own forward in place."
            )
        copy = parts.get(canonical_name(name))
        if copy is None:
            raise ValueError(f"The teacher has no module {name!r}, whose forward was replaced on the student.")
        copy.forward = types.MethodType(forward.__func__, copy)


def _replaced(part: nn.Module) -> Any:
    """The forward that was put on an instance by hand, None if there is none."""
    if isinstance(part, OptimizedModule):
        return None
    held = vars(part)
    forward = held.get("_original_forward") or held.get("_old_forward") or held.get("forward")
    if isinstance(forward, types.MethodType) and forward.__self__ is part:
        # accelerate, taking its own wrapping off, may leave what is inside the decorators of the class's forward.
        inside: Any = getattr(type(part), "forward", None)
        while inside is not None:
            if forward.__func__ is inside:
                return None
            inside = getattr(inside, "__wrapped__", None)
    return forward
