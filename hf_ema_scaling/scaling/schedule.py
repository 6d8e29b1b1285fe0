"""Batch size as a function of data seen, and the clock that counts data.

Positions are in reference steps: one reference step is `reference_batch_size` units.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from .momentum import check_not_negative, check_positive

__all__ = ["BatchSchedule", "ReferenceClock", "ResolvedStage", "Stage"]

FloatArray = npt.NDArray[np.float64]
StageUnit = Literal["steps", "epochs", "fraction"]

DUST = 1e-9
_SOURCES = ("labelled", "unlabelled")
_UNTIL_KEYS: dict[str, StageUnit] = {"until": "steps", "until_epochs": "epochs", "until_fraction": "fraction"}


@dataclass(frozen=True)
class Stage:
    """One stage of a batch schedule.

    Args:
        batch_size: Units per optimizer step, over all processes.
        until: Where the stage ends; `None` for the last stage, which ends with the run.
        unit: What `until` counts: reference "steps", "epochs", or the "fraction" of the run in (0, 1).
        sources: Labelled and unlabelled units of the batch where it has sizes of their own; `of_sources` sums them.

    Raises:
        ValueError: If a value is not finite, not positive, a fraction is outside (0, 1), or `sources` do not make up
            the batch.
    """

    batch_size: float
    until: float | None = None
    unit: StageUnit = "steps"
    sources: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        if self.sources is not None:
            labelled, unlabelled = self.sources
            check_positive("labelled size of a stage", labelled)
            check_positive("unlabelled size of a stage", unlabelled)
            if labelled + unlabelled != self.batch_size:
                raise ValueError(
                    f"{labelled!r} labelled and {unlabelled!r} unlabelled units are no batch of {self.batch_size!r}"
                )
        check_positive("batch_size of a stage", self.batch_size)
        if self.unit not in get_args(StageUnit):
            raise ValueError(f"unit of a stage must be one of {', '.join(get_args(StageUnit))}, got {self.unit!r}")
        if self.until is None:
            return
        if self.unit == "fraction" and not 0 < self.until < 1:
            raise ValueError(f"until as a fraction of the run must lie strictly between 0 and 1, got {self.until!r}")
        check_positive("until of a stage", self.until)

    @classmethod
    def of_sources(
        cls, labelled: float, unlabelled: float, until: float | None = None, unit: StageUnit = "steps"
    ) -> Stage:
        """A stage by its labelled and unlabelled units per optimizer step."""
        return cls(labelled + unlabelled, until, unit, (labelled, unlabelled))


@dataclass(frozen=True)
class ResolvedStage:
    """A stage with both ends in reference steps."""

    start: float
    end: float
    batch_size: float
    sources: tuple[float, float] | None = None


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

        A stage with sizes of their own for both sources has `"labelled": 16, "unlabelled": 48` for its `batch_size`.
        The end of a stage is given by at most one of `until` (reference steps), `until_epochs`, `until_fraction`.

        Raises:
            ValueError: If the value has another shape, unknown keys, or several ends for one stage.
        """
        entries = json_list("a batch schedule", value)
        return cls(tuple(_stage_from_json(index, entry) for index, entry in enumerate(entries)))

    def to_json(self) -> list[dict[str, float]]:
        """The JSON-able list that `from_json` reads."""
        key_of = {unit: key for key, unit in _UNTIL_KEYS.items()}
        return [
            _sizes_to_json(stage) | ({} if stage.until is None else {key_of[stage.unit]: stage.until})
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
            resolved.append(ResolvedStage(start, end, float(stage.batch_size), stage.sources))
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


def is_number(value: object) -> bool:
    """Whether a JSON value is a number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def json_list(what: str, value: str | Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """A list of objects, or its JSON text, as a list; `what` names it in the error for anything else."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise ValueError(f"{what} must be a JSON list of objects, got {value!r}: {error}") from error
    if not isinstance(value, (list, tuple)) or not all(isinstance(entry, Mapping) for entry in value):
        raise ValueError(f"{what} must be a list of objects, got {value!r}")
    return list(value)


def _sizes_to_json(stage: Stage) -> dict[str, float]:
    return (
        {"batch_size": stage.batch_size} if stage.sources is None else dict(zip(_SOURCES, stage.sources, strict=True))
    )


def _stage_from_json(index: int, entry: Mapping[str, Any]) -> Stage:
    known = ("batch_size", *_SOURCES, *_UNTIL_KEYS)
    unknown = sorted(set(entry) - set(known))
    if unknown:
        raise ValueError(f"stage {index} has unknown keys {unknown}; known: {', '.join(known)}")
    sizes = [key for key in known[:3] if key in entry]
    if sizes not in (["batch_size"], list(_SOURCES)):
        raise ValueError(f"stage {index} needs a batch_size, or labelled and unlabelled in its place: {dict(entry)!r}")
    wrong = {key: value for key, value in entry.items() if not is_number(value)}
    if wrong:
        raise ValueError(f"stage {index} has values that are not numbers: {wrong!r}")
    ends = [key for key in _UNTIL_KEYS if key in entry]
    if len(ends) > 1:
        raise ValueError(f"stage {index} has several ends, {' and '.join(ends)}: keep one")
    end = (entry[ends[0]], _UNTIL_KEYS[ends[0]]) if ends else ()
    if sizes == ["batch_size"]:
        return Stage(entry["batch_size"], *end)
    return Stage.of_sources(entry["labelled"], entry["unlabelled"], *end)


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
