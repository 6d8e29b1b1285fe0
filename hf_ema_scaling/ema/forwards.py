"""Forward methods that were replaced on the instance: the teacher must run them too, but on its own weights."""

from __future__ import annotations

import types
from typing import Any

from torch import nn
from torch._dynamo import OptimizedModule

from hf_ema_scaling.ema.closures import reaches
from hf_ema_scaling.ema.names import canonical_name


def carry_over_forwards(student: nn.Module, teacher: nn.Module) -> None:
    """Gives a teacher the `forward` methods that were replaced on parts of the student.

    A module built from class and configuration computes with the forward of its class, which then is another function
    than the student's. A method bound to its own module (`types.MethodType`) is bound to the teacher's module instead.
    Anything else (a closure, a partial, a method whose function keeps an old bound forward) has the student's weights
    inside, and cannot be told from them. What accelerate (mixed precision, hooks) and `torch.compile` put around a
    forward is looked through: it is no part of the model.

    Args:
        student: The unwrapped student; left as it is.
        teacher: A module of the same structure.

    Raises:
        TypeError: A replaced forward that is no method of its module, or reaches the student by another way.
        ValueError: The teacher has no module of that name.
    """
    parts = {canonical_name(name): part for name, part in teacher.named_modules()}
    for name, part in student.named_modules():
        forward = replaced_forward(part)
        if forward is None:
            continue
        where = f"forward was replaced on {name or 'the model'} ({type(part).__name__}) by {name_of(forward)!r}"
        if not (isinstance(forward, types.MethodType) and forward.__self__ is part):
            raise TypeError(
                f"{where}, which is no method of that module: it "
                "would compute with the student's weights, and a teacher without it would compute something else. "
                "Bind it with types.MethodType(function, module) and use only its first argument, or pass `factory=`, "
                "a function that returns a new model with its own forward in place."
            )
        held = reaches(forward.__func__, student)
        if held is not None:
            raise TypeError(
                f"{where}, which keeps a part of the student in {held}: bound to the teacher, it would still compute "
                "with the student's weights. Use only its first argument (for an old forward, "
                "`type(self).forward(self, ...)`), or pass `factory=`, a function that returns a new model with its "
                "own forward in place."
            )
        copy = parts.get(canonical_name(name))
        if copy is None:
            raise ValueError(f"The teacher has no module {name!r}, whose forward was replaced on the student.")
        copy.forward = types.MethodType(forward.__func__, copy)


def replaced_forward(part: nn.Module) -> Any:
    """The forward that was put on an instance by hand, None if there is none."""
    if isinstance(part, OptimizedModule):
        return None
    forward = vars(part).get("forward")
    for inner in ("_original_forward", "_old_forward"):
        if forward is not None and _is_accelerates(forward):
            forward = vars(part).get(inner, forward)
    if not isinstance(forward, types.MethodType):
        forward = getattr(forward, "_torchdynamo_orig_callable", forward)
    if isinstance(forward, types.MethodType) and forward.__self__ is part:
        # accelerate, taking its own wrapping off, may leave what is inside the decorators of the class's forward.
        inside: Any = getattr(type(part), "forward", None)
        while inside is not None:
            if forward.__func__ is inside:
                return None
            inside = getattr(inside, "__wrapped__", None)
    return forward


def _is_accelerates(forward: Any) -> bool:
    function = getattr(forward, "__func__", forward)
    function = getattr(function, "func", function)
    return str(getattr(function, "__globals__", {}).get("__name__", "")).startswith("accelerate.")


def name_of(function: Any) -> str:
    """What to call a function or callable object in a message."""
    name: str = getattr(function, "__qualname__", type(function).__qualname__)
    return name
