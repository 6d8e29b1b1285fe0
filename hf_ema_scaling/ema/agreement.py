"""Whether a teacher computes what the student computes with the same weights, and if not, where they part."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hf_ema_scaling.ema.average import WeightAverage
from hf_ema_scaling.ema.differences import attributes, described, differences
from hf_ema_scaling.ema.names import canonical_name, unwrap
from hf_ema_scaling.ema.outputs import apart, difference, floats
from hf_ema_scaling.ema.sharding import class_of, computed_in, reshard
from hf_ema_scaling.ema.teacher import DeadTeacherError, EMATeacher
from hf_ema_scaling.ema.trial import in_mode, rng_devices, seed

FLOAT32_TOLERANCE = 1e-3
"""Relative; kernels chosen anew for the same weights leave 1e-6 to 1e-5, deep models a few times that."""
_UNITS = 4
"""Units of precision allowed where both compute in half precision: another order of summation moves few results."""
_UNITS_APART = 16
"""The same where one of them rounds weights that the other does not, as in `check_parity`."""

Run = Callable[[], Any]


def check_agreement(
    model: nn.Module,
    average: WeightAverage,
    teacher: EMATeacher,
    inputs: Mapping[str, Any],
    *,
    tolerance: float | None = None,
) -> float:
    """Compares the teacher's output on one batch with that of the student in eval mode with the average swapped in.

    A teacher is built anew from class and configuration, or by a factory; hooks, layers and methods that were put
    onto the student's instance are not on it, and then its labels are those of another function. Call this once
    before the first label, where no graph of the student is alive, under the autocast in which the student trains,
    and `check_liveness` with it: that the outputs agree does not tell whose weights they come from.

    Costs one forward pass of each on the batch, and one copy of the student's weights meanwhile. The student, its
    modes and the random state are put back bit for bit, also on failure; hooks on the student are called, and
    compiled parts run uncompiled. Collective for a model in shards.

    Args:
        model: The student, wrapped or not.
        average: Its average.
        teacher: The teacher over that average.
        inputs: Keyword inputs of one small batch, without labels, on the teacher's device.
        tolerance: Largest difference allowed. None for 1e-3 in float32; where autocast, weights or teacher are in half
            precision 4 units of its precision (0.031 for bfloat16, 0.0039 for float16), and 16 where student and
            teacher hold their weights in different dtypes, or FSDP2 casts the student's.

    Returns:
        The largest `||teacher - student|| / ||student||` over the floating-point outputs that both return.

    Raises:
        DeadTeacherError: The difference is above the tolerance, or not a number, or the teacher cannot run these
            inputs: names the first module whose output differs and what the student has that the teacher lacks.
    """
    student = unwrap(model)
    allowed = _tolerance(student, teacher) if tolerance is None else tolerance
    teacher.warned = True  # what follows says more

    def of_student() -> Any:
        return student(**inputs)

    def of_teacher() -> Any:
        return teacher(**inputs)

    with _reproducible(student, average), average.swapped(model):
        expected = _run(of_student, average)
        try:
            found = _run(of_teacher, average)
        except DeadTeacherError:
            raise
        except Exception as error:
            raise DeadTeacherError(
                f"The teacher cannot run inputs that the student runs ({type(error).__name__}: {error})."
                f"{_advice(student, teacher, None)}"
            ) from error
        gap = difference(expected, found)
        if gap <= allowed:
            return gap
        where = first_difference((student, of_student), (teacher.module, of_teacher), average, allowed / 8)
    raise DeadTeacherError(
        f"The teacher computes something else than the student does with the same weights: their outputs differ by "
        f"{gap:.3g} of their size, {allowed:.3g} is allowed{_place(student, where)}.{_advice(student, teacher, where)}"
    )


def first_difference(
    one: tuple[nn.Module, Run], other: tuple[nn.Module, Run], average: WeightAverage, tolerance: float
) -> str | None:
    """Name of the first module, in the order in which forwards end, that returns something else in one of two runs.

    Args:
        one: A module and a function that runs it.
        other: Another of its structure, or the same one.
        average: The average of the student.
        tolerance: Relative size of a difference that counts.

    Returns:
        The canonical name, empty for the module as a whole; None if all that both call returns the same.
    """
    runs: list[dict[tuple[str, int], list[Tensor]]] = []
    for module, run in (one, other):
        found: dict[tuple[str, int], list[Tensor]] = {}
        with _recorded(module, found):
            _run(run, average)
        runs.append(found)
    for (name, count), expected in runs[0].items():
        given = runs[1].get((name, count))
        if given is None or len(given) != len(expected):
            continue  # called by one of them alone: what comes after it shows
        if not all(apart(a, b) <= tolerance for a, b in zip(expected, given, strict=True)):
            return name
    return None


def _advice(student: nn.Module, teacher: EMATeacher, where: str | None) -> str:
    module = teacher.module
    found = differences(student, module)
    near = [one for one in found if where is not None and (where == one.name or where.startswith(f"{one.name}."))]
    # Names first what is at or around the place where outputs part; then what may matter; then the rest.
    chosen = [one for one in near if one.doubtful] or [one for one in found if one.doubtful] or near or found
    said = described(chosen)
    values = attributes(student, module, where) if where is not None and not said else []
    lacks = f" The student has what the teacher lacks: {said}." if said else ""
    lacks += f" Attributes there differ: {', '.join(values[:4])}." if values else ""
    if teacher.from_factory:
        return f"{lacks} Put the same into the model that `factory` returns."
    return (
        f"{lacks} What was put onto the student after it was built is not on a teacher built anew from its class and "
        "configuration: pass `factory=` (`teacher_factory=` to trainers and callback), a function that returns a new "
        "model with the same in place."
    )


def _place(student: nn.Module, where: str | None) -> str:
    if where is None:
        return ""
    parts = {canonical_name(name): part for name, part in student.named_modules()}
    return f", and part first in what {where or 'the model as a whole'} ({class_of(parts[where]).__name__}) returns"


def _tolerance(student: nn.Module, teacher: EMATeacher) -> float:
    held = [
        {canonical_name(name): p.dtype for name, p in module.named_parameters() if p.is_floating_point()}
        for module in (student, teacher.module)
    ]
    cast = computed_in(student) - set(held[1].values())
    dtypes = set(held[0].values()) | set(held[1].values()) | cast
    kind = teacher.device.type
    if torch.is_autocast_enabled(kind):
        dtypes.add(torch.get_autocast_dtype(kind))
    rounded = bool(cast) or any(held[1].get(name, dtype) != dtype for name, dtype in held[0].items())
    units = _UNITS_APART if rounded else _UNITS
    # Eight-bit floats are storage that something else computes with.
    precisions = [torch.finfo(dtype).eps for dtype in dtypes if dtype.itemsize > 1]
    return max(FLOAT32_TOLERANCE, units * max(precisions, default=0.0))


def _run(run: Run, average: WeightAverage) -> Any:
    """One forward pass: the same random numbers each time, without gradients, nothing compiled."""
    seed(average.device)
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        return run()


@contextmanager
def _reproducible(student: nn.Module, average: WeightAverage) -> Iterator[None]:
    """Inside, the student is in eval mode and random numbers may be drawn; both are as before afterwards."""
    with torch.random.fork_rng(devices=rng_devices(average.device)), in_mode(student, training=False):
        try:
            yield
        finally:
            reshard(student)


@contextmanager
def _recorded(module: nn.Module, found: dict[tuple[str, int], list[Tensor]]) -> Iterator[None]:
    """Inside, `found` gets what every part returns, by name and number of the call; after the hooks that it has."""
    counts: dict[str, int] = {}

    def note(name: str, output: Any) -> None:
        counts[name] = counts.get(name, 0) + 1
        found[name, counts[name]] = list(floats(output))

    def noting(name: str) -> Callable[..., None]:
        return lambda part, args, output: note(name, output)

    handles = [part.register_forward_hook(noting(canonical_name(name))) for name, part in module.named_modules()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
