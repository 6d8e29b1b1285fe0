"""Batch size as a function of data seen, the step borders it implies, and the clock that counts data.

Positions are in reference steps: one reference step is `reference_batch_size` units.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from .momentum import check_not_negative, check_positive

__all__ = ["BatchSchedule", "ReferenceClock", "ResolvedStage", "Segment", "Stage", "StepBorders", "step_borders"]

FloatArray = npt.NDArray[np.float64]
StageUnit = Literal["steps", "epochs", "fraction"]

DUST = 1e-9
_UNTIL_KEYS: dict[str, StageUnit] = {"until": "steps", "until_epochs": "epochs", "until_fraction": "fraction"}


@dataclass(frozen=True)
class Stage:
    """One stage of a batch schedule.

    Args:
        batch_size: Units per optimizer step, over all processes.
        until: Where the stage ends; `None` for the last stage, which ends with the run.
        unit: What `until` counts: reference "steps", "epochs", or the "fraction" of the run in (0, 1).

    Raises:
        ValueError: If a value is not finite, not positive, or a fraction is outside (0, 1).
    """

    batch_size: float
    until: float | None = None
    unit: StageUnit = "steps"

    def __post_init__(self) -> None:
        check_positive("batch_size of a stage", self.batch_size)
        if self.unit not in get_args(StageUnit):
            raise ValueError(f"unit of a stage must be one of {', '.join(get_args(StageUnit))}, got {self.unit!r}")
        if self.until is None:
            return
        if self.unit == "fraction" and not 0 < self.until < 1:
            raise ValueError(f"until as a fraction of the run must lie strictly between 0 and 1, got {self.until!r}")
        check_positive("until of a stage", self.until)


@dataclass(frozen=True)
class ResolvedStage:
    """A stage with both ends in reference steps."""

    start: float
    end: float
    batch_size: float


@dataclass(frozen=True)
class BatchSchedule:
    """Batch size over a run: any number of stages, each but the last with an end.

    Args:
        stages: At least one stage, in order.

    Raises:
        ValueError: If there are no stages, or a stage other than the last has no `until`.
    """

    stages: tuple[Stage, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "stages", tuple(self.stages))
        if not self.stages:
            raise ValueError("a batch schedule needs at least one stage, got no stages")
        for index, stage in enumerate(self.stages[:-1]):
            if stage.until is None:
                raise ValueError(f"stage {index} (batch size {stage.batch_size:g}) needs `until`: it is not the last")

    @classmethod
    def constant(cls, batch_size: float) -> BatchSchedule:
        """The same batch size for the whole run."""
        return cls((Stage(batch_size),))

    @classmethod
    def two_stage(cls, reference_batch_size: float, kappa: float, small_batch_until: float) -> BatchSchedule:
        """The reference batch until `small_batch_until` reference steps, `kappa` times as much afterwards."""
        check_positive("reference_batch_size", reference_batch_size)
        check_positive("kappa", kappa)
        if check_not_negative("small_batch_until", small_batch_until) == 0 or kappa == 1:
            return cls.constant(kappa * reference_batch_size)
        return cls((Stage(reference_batch_size, small_batch_until), Stage(kappa * reference_batch_size)))

    @classmethod
    def from_json(cls, value: str | Sequence[Mapping[str, Any]]) -> BatchSchedule:
        """Read a list of `{"batch_size": 64, "until": 5000}`, or its JSON text.

        The end of a stage is given by at most one of `until` (reference steps), `until_epochs`, `until_fraction`.

        Raises:
            ValueError: If the value has another shape, unknown keys, or several ends for one stage.
        """
        entries = _json_list("a batch schedule", value)
        return cls(tuple(_stage_from_json(index, entry) for index, entry in enumerate(entries)))

    def to_json(self) -> list[dict[str, float]]:
        """The JSON-able list that `from_json` reads."""
        key_of = {unit: key for key, unit in _UNTIL_KEYS.items()}
        return [
            {"batch_size": stage.batch_size} | ({} if stage.until is None else {key_of[stage.unit]: stage.until})
            for stage in self.stages
        ]

    def resolve(self, max_steps: float, steps_per_epoch: float | None = None) -> tuple[ResolvedStage, ...]:
        """Stages with their starts and ends in reference steps; the last one ends at `max_steps`.

        Args:
            max_steps: Length of the run in reference steps.
            steps_per_epoch: Reference steps per epoch; needed if a stage counts epochs.

        Raises:
            ValueError: If ends do not increase, a stage begins at or after `max_steps`, the last stage ends before
                `max_steps`, or epochs are used without `steps_per_epoch`.
        """
        check_positive("max_steps", max_steps)
        resolved: list[ResolvedStage] = []
        start = 0.0
        for index, stage in enumerate(self.stages):
            end = _stage_end(index, stage, max_steps, steps_per_epoch)
            last = index == len(self.stages) - 1
            if start >= max_steps:
                raise ValueError(
                    f"stage {index} begins at reference step {start:g}, at or after the end of the run "
                    f"(max_steps={max_steps:g}): drop it or end the stages before it earlier"
                )
            if end <= start:
                raise ValueError(f"stage {index} ends at {end:g}, not after its start {start:g}: ends must increase")
            if last and end < max_steps - DUST:
                raise ValueError(
                    f"the last stage ends at {end:g}, before max_steps={max_steps:g}: leave out its `until`"
                )
            end = float(max_steps) if last else end
            resolved.append(ResolvedStage(start, end, float(stage.batch_size)))
            start = end
        return tuple(resolved)


def _stage_end(index: int, stage: Stage, max_steps: float, steps_per_epoch: float | None) -> float:
    if stage.until is None:
        return float(max_steps)
    if stage.unit == "fraction":
        return stage.until * max_steps
    if stage.unit == "steps":
        return float(stage.until)
    if steps_per_epoch is None:
        raise ValueError(f"stage {index} ends after {stage.until:g} epochs: this needs steps_per_epoch")
    return stage.until * check_positive("steps_per_epoch", steps_per_epoch)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _json_list(what: str, value: str | Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise ValueError(f"{what} must be a JSON list of objects, got {value!r}: {error}") from error
    if not isinstance(value, (list, tuple)) or not all(isinstance(entry, Mapping) for entry in value):
        raise ValueError(f"{what} must be a list of objects, got {value!r}")
    return list(value)


def _stage_from_json(index: int, entry: Mapping[str, Any]) -> Stage:
    unknown = sorted(set(entry) - {"batch_size", *_UNTIL_KEYS})
    if unknown:
        raise ValueError(f"stage {index} has unknown keys {unknown}; known: batch_size, {', '.join(_UNTIL_KEYS)}")
    if "batch_size" not in entry:
        raise ValueError(f"stage {index} has no batch_size: {dict(entry)!r}")
    wrong = {key: value for key, value in entry.items() if not _is_number(value)}
    if wrong:
        raise ValueError(f"stage {index} has values that are not numbers: {wrong!r}")
    ends = [key for key in _UNTIL_KEYS if key in entry]
    if len(ends) > 1:
        raise ValueError(f"stage {index} has several ends, {' and '.join(ends)}: keep one")
    if not ends:
        return Stage(entry["batch_size"])
    return Stage(entry["batch_size"], entry[ends[0]], _UNTIL_KEYS[ends[0]])


@dataclass(frozen=True)
class Segment:
    """`count` steps of `kappa` reference steps each from `start`; the last one ends at `end`, cut short if need be."""

    start: float
    kappa: float
    count: int
    end: float

    def __post_init__(self) -> None:
        check_not_negative("start of a segment", self.start)
        check_positive("kappa of a segment", self.kappa)
        if not isinstance(self.count, int) or self.count < 1:
            raise ValueError(f"count of a segment must be a whole number above 0, got {self.count!r}")
        if not (math.isfinite(self.end) and self.position(self.count - 1) < self.end):
            raise ValueError(f"end of a segment must lie after the start of its last step, got {self!r}")

    def position(self, index: int) -> float:
        """Start of step `index`; multiplied out, so that no rounding accumulates."""
        return self.start + self.kappa * index

    def ends(self) -> FloatArray:
        """Ends of the steps, shape (count,)."""
        ends = self.start + self.kappa * np.arange(1, self.count + 1, dtype=np.float64)
        ends[-1] = self.end
        return ends


@dataclass(frozen=True)
class StepBorders:
    """Nominal clock positions of every optimizer step of a run, kept as run-length segments.

    Args:
        segments: Segments that follow each other without a gap, the first from 0.

    Raises:
        ValueError: If there is a gap or the first segment does not begin at 0.
    """

    segments: tuple[Segment, ...] = ()

    def __post_init__(self) -> None:
        position = 0.0
        for segment in self.segments:
            if segment.start != position:
                raise ValueError(f"a segment begins at {segment.start!r}, the one before it ends at {position!r}")
            position = segment.end

    def __len__(self) -> int:
        return sum(segment.count for segment in self.segments)

    @property
    def position(self) -> float:
        """Clock position after the last step."""
        return self.segments[-1].end if self.segments else 0.0

    @cached_property
    def borders(self) -> FloatArray:
        """Step t covers `borders[t]` to `borders[t + 1]`; float64, shape (steps + 1,), read-only."""
        borders = np.concatenate([np.zeros(1), *(segment.ends() for segment in self.segments)])
        borders.setflags(write=False)
        return borders

    @cached_property
    def stage_kappa(self) -> FloatArray:
        """Nominal kappa of the stage of each step; float64, shape (steps,), read-only."""
        kappas = np.array([segment.kappa for segment in self.segments], dtype=np.float64)
        stage_kappa = np.repeat(kappas, [segment.count for segment in self.segments])
        stage_kappa.setflags(write=False)
        return stage_kappa

    def prefix(self, steps: int) -> StepBorders:
        """The first `steps` steps, with the same bits.

        Raises:
            ValueError: If `steps` is negative or more than there are.
        """
        if not 0 <= steps <= len(self):
            raise ValueError(f"cannot take {steps} of {len(self)} steps")
        kept: list[Segment] = []
        for segment in self.segments:
            if steps <= 0:
                break
            if steps < segment.count:
                segment = Segment(segment.start, segment.kappa, steps, segment.position(steps))
            kept.append(segment)
            steps -= segment.count
        return StepBorders(tuple(kept))

    def to_json(self) -> list[dict[str, float]]:
        """JSON-able list of segments; `from_json` restores the same bits."""
        return [asdict(segment) for segment in self.segments]

    @classmethod
    def from_json(cls, value: str | Sequence[Mapping[str, Any]]) -> StepBorders:
        """Read what `to_json` wrote, or its JSON text.

        Raises:
            ValueError: If the value has another shape, or the segments do not follow each other.
        """
        segments = []
        for entry in _json_list("step borders", value):
            if set(entry) != {"start", "kappa", "count", "end"} or not all(map(_is_number, entry.values())):
                raise ValueError(f"a segment needs the numbers start, kappa, count and end, got {dict(entry)!r}")
            segments.append(Segment(float(entry["start"]), float(entry["kappa"]), entry["count"], float(entry["end"])))
        return cls(tuple(segments))


def step_borders(
    stages: Sequence[ResolvedStage],
    reference_batch_size: float,
    cuts: Iterable[float] = (),
    done: StepBorders | None = None,
) -> StepBorders:
    """Lay a run out as optimizer steps.

    A step advances the clock by `batch_size / reference_batch_size` and never crosses a cut, a stage end or the end of
    the run: it is cut short there. A remainder below 1e-9 of a step is no step of its own.

    Args:
        stages: Consecutive stages from 0 to the end of the run, as `BatchSchedule.resolve` gives them.
        reference_batch_size: B, in the units of the batch sizes.
        cuts: Further positions that no step may cross, such as the start of pseudo-labelling.
        done: Steps already run. They stay as they are, and the rest follows from their end; continuing with the same
            stages and cuts gives the same bits as an uninterrupted run.

    Returns:
        The borders of all steps, those of `done` included.

    Raises:
        ValueError: If `done` lies beyond the end of the run.
    """
    check_positive("reference_batch_size", reference_batch_size)
    segments = list(done.segments) if done is not None else []
    position = segments[-1].end if segments else 0.0
    end_of_run = stages[-1].end
    if position > end_of_run + DUST * stages[-1].batch_size / reference_batch_size:
        raise ValueError(f"the steps already run reach {position:g}, beyond the end of the run at {end_of_run:g}")
    cuts = sorted(cuts)
    resumed = bool(segments)
    for stage in stages:
        kappa = stage.batch_size / reference_batch_size
        inner = [cut for cut in cuts if stage.start + DUST * kappa < cut < stage.end - DUST * kappa]
        start = stage.start
        for end in (*inner, stage.end):
            if _step_count(position, end, kappa) > 0:
                if resumed and position - start > DUST * kappa and _continues(segments[-1], kappa):
                    # Counting on from the segment's own start gives the bits of the uninterrupted run.
                    position = segments.pop().start
                segments.append(Segment(position, kappa, _step_count(position, end, kappa), end))
                position, resumed = end, False
            start = end
    return StepBorders(tuple(segments))


def _step_count(start: float, end: float, kappa: float) -> int:
    # The second term is the rounding of the positions themselves, which exceeds the first past some 1e6 steps.
    dust = DUST + 4 * np.finfo(np.float64).eps * end / kappa
    return max(0, math.ceil((end - start) / kappa - dust))


def _continues(segment: Segment, kappa: float) -> bool:
    return segment.kappa == kappa and segment.end == segment.position(segment.count)


class ReferenceClock:
    """Data seen, in reference steps.

    Args:
        reference_batch_size: B, units per reference step.
        units: Units seen so far.
    """

    def __init__(self, reference_batch_size: float, units: float = 0.0) -> None:
        self.reference_batch_size = check_positive("reference_batch_size", reference_batch_size)
        self.units = check_not_negative("units", units)

    @property
    def position(self) -> float:
        """Reference steps so far."""
        return self.units / self.reference_batch_size

    def advance(self, units: float) -> float:
        """Count the units of one step and return its kappa, `units / reference_batch_size`."""
        self.units += check_positive("units of a step", units)
        return units / self.reference_batch_size

    @staticmethod
    def crosses(before: float, after: float, every: float) -> bool:
        """Whether a step from `before` to `after` is the first to reach or cross a multiple of `every`.

        A position within 1e-9 periods below a multiple counts as on it.
        """
        check_positive("every", every)
        return math.floor(after / every + DUST) > math.floor(before / every + DUST)
