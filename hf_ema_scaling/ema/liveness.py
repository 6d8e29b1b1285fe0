"""Whether a teacher is alive: it follows the average, with weights of its own, and the average follows the student."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from hf_ema_scaling.ema.agreement import check_agreement, first_difference
from hf_ema_scaling.ema.average import WeightAverage
from hf_ema_scaling.ema.names import local_shard
from hf_ema_scaling.ema.outputs import apart, floats, same
from hf_ema_scaling.ema.teacher import DeadTeacherError, EMATeacher
from hf_ema_scaling.ema.trial import in_mode, overwritten, rng_devices, seed

_OWN_TOLERANCE = 1e-3
"""Relative. The same weights run twice; what a student changes that is computed with its own is far above it."""
_BUFFER_FACTOR = 1.1
"""By which buffers of the student change: statistics stay positive, and what is computed with them moves."""


def check_before_labelling(
    model: nn.Module,
    average: WeightAverage,
    teacher: EMATeacher,
    inputs: Mapping[str, Any],
    *,
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> None:
    """Tests that a teacher is the student with other weights, and weights of its own: all that should hold at a start.

    Args:
        model: The student, wrapped or not; no graph of it may be alive.
        average: Its average.
        teacher: The teacher over that average.
        inputs: Keyword inputs of one small batch, without labels, on the teacher's device.
        autocast: In which the student trains.

    Raises:
        DeadTeacherError: See `check_liveness` and `check_agreement`.
    """
    teacher.warned = True  # what follows says more
    check_liveness(model, average, teacher, inputs)
    with autocast():
        check_agreement(model, average, teacher, inputs)


def check_liveness(model: nn.Module, average: WeightAverage, teacher: EMATeacher, inputs: Mapping[str, Any]) -> None:
    """Tests the mechanism: perturb the student, update the average, and the teacher's output must change.

    Then the student alone gets its old weights, buffers and mode, and the teacher's output must not change: a
    `forward` that keeps a part of the student, in a closure or elsewhere, labels with the student's weights.
    The student, the average, its update count and the random state are put back bit for bit, also on failure. Costs
    three forward passes of the teacher and a copy of both sets of weights while it runs.

    Args:
        model: The student, wrapped or not.
        average: Its average.
        teacher: The teacher over that average.
        inputs: Keyword inputs of one small batch, without labels, on the teacher's device.

    Raises:
        DeadTeacherError: The output did not change, or changed with the student; the average holds a tensor of the
            student; a forward pass writes to the average; or the student has nothing trainable.
    """
    moving = [p for p in model.parameters() if p.requires_grad and p.is_floating_point()]
    if not moving:
        raise DeadTeacherError("The student has no trainable floating-point parameter, so its average never moves.")
    _refuse_shared(model, average)
    with torch.no_grad():
        shadow = {name: t.clone() for name, t in average.tensors().items() if name not in average.references}
    counts = average.num_updates, average.gathered
    with torch.random.fork_rng(devices=rng_devices(average.device)), overwritten(_buffers(model)):
        try:
            before = _output(teacher, inputs)
        except AttributeError as error:
            raise DeadTeacherError(
                f"The teacher's module lacks what its forward asks for (AttributeError: {error}). What was put onto "
                "the student after it was built is not on it: pass `factory=` (`teacher_factory=` to trainers and "
                "callback), a function that returns a new model with the same in place."
            ) from error
        now = average.tensors()
        written = [name for name, value in shadow.items() if not same(local_shard(now[name]), local_shard(value))]
        if written:
            average.load(shadow)
            teacher.refresh()
            raise DeadTeacherError(
                f"A forward pass of the teacher writes to its own weights ({written[0]!r}, {len(written)} in all), so "
                "labelling would change the average. Let the module compute with a changed copy instead (with PEFT's "
                "OFT: coft=False)."
            )
        try:
            with _other_weights(moving):
                average.blend(model, 0.5)
                teacher.refresh()
                with _other_buffers_and_mode(model):
                    after = _output(teacher, inputs)
            with in_mode(model, training=False):
                later = _output(teacher, inputs)
            dependent = len(after) != len(later) or not all(
                apart(a, b) <= _OWN_TOLERANCE for a, b in zip(after, later, strict=True)
            )
            where = _dependent_part(model, moving, average, teacher, inputs) if dependent else None
        finally:
            average.load(shadow)
            average.num_updates, average.gathered = counts
            teacher.refresh()
    if not before:
        raise DeadTeacherError("The teacher returned no floating-point tensor, so its labels cannot be checked.")
    if dependent:
        place = "" if where is None else f", first what {where or 'the model as a whole'} returns"
        raise DeadTeacherError(
            "The teacher computes with the student's weights: its output changed when the student alone was changed"
            f"{place}. A `forward`, hook or attribute of the teacher keeps a part of the student, such as an old "
            "bound forward in a closure. Let it use only the module that it is handed, or pass `factory=` "
            "(`teacher_factory=` to trainers and callback), a function that returns a new model which knows nothing "
            "of the student."
        )
    if len(before) == len(after) and all(same(a, b) for a, b in zip(before, after, strict=True)):
        raise DeadTeacherError(
            "The teacher is dead: its output did not change after the student was perturbed and the average updated. "
            "Check that the teacher was built from this average and that updates reach it."
        )


def check_parity(
    teacher: EMATeacher, full: EMATeacher, inputs: Mapping[str, Any], *, tolerance: float | None = None
) -> float:
    """Compares the outputs of a half-precision teacher with those of a float32 one, on one batch.

    Args:
        teacher: The teacher to check.
        full: A float32 teacher over the same average; over a float32 average it costs no copy.
        inputs: Keyword inputs of one batch, without labels, on the teachers' device.
        tolerance: Largest difference allowed. None for 16 units of the dtype's precision: 0.125 for bfloat16, 0.0156
            for float16.

    Returns:
        `||half - full|| / ||full||` over all floating-point outputs together, in float64.

    Raises:
        DeadTeacherError: The difference is above the tolerance, or not a number.
    """
    if tolerance is None:
        tolerance = 16 * torch.finfo(teacher.dtype).eps
    pairs = list(zip(floats(full(**inputs)), floats(teacher(**inputs)), strict=True))
    apart = math.sqrt(sum(float((b.double() - a.double()).square().sum()) for a, b in pairs))
    size = math.sqrt(sum(float(a.double().square().sum()) for a, _ in pairs))
    difference = 0.0 if apart == 0.0 else apart / size if size else math.inf
    if not difference <= tolerance:
        raise DeadTeacherError(
            f"The teacher in {teacher.dtype} does not say what one in torch.float32 says: their outputs differ by "
            f"{difference:.3g} of their size, {tolerance:.3g} is allowed. Use torch.float32, or torch.bfloat16 where "
            "values overflow in torch.float16."
        )
    return difference


def check_moved(model: nn.Module, average: WeightAverage, initial_fingerprint: tuple[int, ...]) -> None:
    """Verifies by bits that the average has moved since `initial_fingerprint` and is not the student.

    For use after three updates with a momentum above 0 and a learning rate above 0.

    Args:
        model: The student.
        average: Its average.
        initial_fingerprint: `average.fingerprint()` from before those updates.

    Raises:
        DeadTeacherError: The average did not move, or equals the student.
    """
    if average.fingerprint() == initial_fingerprint:
        raise DeadTeacherError(
            f"The average has not moved by one bit after {average.num_updates} updates: either updates do not reach "
            "it, the student's weights do not change, or the momentum is so close to 1 that float32 cannot show it."
        )
    if average.equals(model):
        raise DeadTeacherError(
            f"The average equals the student after {average.num_updates} updates: the momentum is 0, or the two "
            "share their tensors."
        )


def _output(teacher: EMATeacher, inputs: Mapping[str, Any]) -> list[Tensor]:
    seed(teacher.device)
    return list(floats(teacher(**inputs)))


@contextmanager
def _other_weights(moving: Sequence[Tensor]) -> Iterator[None]:
    with overwritten(moving):
        _perturb_(moving)
        yield


@contextmanager
def _other_buffers_and_mode(model: nn.Module) -> Iterator[None]:
    buffers = _buffers(model)
    with overwritten(buffers), in_mode(model, training=True):
        with torch.no_grad():
            for buffer in buffers:
                if buffer.is_floating_point():
                    buffer.mul_(_BUFFER_FACTOR)
        yield


def _buffers(model: nn.Module) -> list[Tensor]:
    return [buffer for buffer in model.buffers() if not buffer.is_meta]


@torch.no_grad()
def _perturb_(tensors: Sequence[Tensor]) -> None:
    """Adds noise of about a tensor's own size; the same noise each time."""
    shards = [local_shard(tensor) for tensor in tensors]
    generator = torch.Generator(shards[0].device).manual_seed(0)
    for tensor in shards:
        scale = tensor.abs().float().mean().clamp_min(0.01)
        noise = torch.randn(tensor.shape, generator=generator, device=tensor.device) * scale
        tensor.add_(noise.to(tensor.dtype))


def _refuse_shared(model: nn.Module, average: WeightAverage) -> None:
    """Raises if the average would write into the student."""
    mine = {}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.numel():
            mine[local_shard(tensor).untyped_storage().data_ptr()] = name
    for name, tensor in average.tensors().items():
        if name in average.references or not local_shard(tensor).numel():
            continue
        shared = mine.get(local_shard(tensor).untyped_storage().data_ptr())
        if shared is not None:
            raise DeadTeacherError(
                f"{name!r} of the average lies in the storage of the student's {shared!r}: an update would move the "
                "student. Build the average by WeightAverage(model), and give it no tensors by hand."
            )


def _dependent_part(
    model: nn.Module, moving: Sequence[Tensor], average: WeightAverage, teacher: EMATeacher, inputs: Mapping[str, Any]
) -> str | None:
    """Name of the first part of the teacher whose output changes with the student."""
    runs = 0

    def run() -> Any:
        nonlocal runs
        runs += 1
        if runs > 1:
            with in_mode(model, training=False):
                return teacher(**inputs)
        with _other_weights(moving), _other_buffers_and_mode(model):
            return teacher(**inputs)

    module = teacher.module
    return first_difference((module, run), (module, run), average, _OWN_TOLERANCE)
