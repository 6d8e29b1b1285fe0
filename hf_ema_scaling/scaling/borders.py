"""The step borders that a batch schedule implies, and how a resumed run continues them.

Positions are in reference steps: one reference step is `reference_batch_size` units.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from .momentum import check_not_negative, check_positive
from .schedule import DUST, FloatArray, ResolvedStage, is_number, json_list

__all__ = ["Segment", "StepBorders", "step_borders"]


@dataclass(frozen=True)
class Segment:
    """`count` steps of `kappa` reference steps each from `start`; the last one ends at `end`."""

    start: float
    kappa: float
    count: int
    end: float
    cut: bool = False
    """Whether this is a single step, shorter than those of its stage so that it does not cross a cut."""

    def __post_init__(self) -> None:
        check_not_negative("start of a segment", self.start)
        check_positive("kappa of a segment", self.kappa)
        if not isinstance(self.count, int) or self.count < 1:
            raise ValueError(f"count of a segment must be a whole number above 0, got {self.count!r}")
        if self.cut and self.count != 1:
            raise ValueError(f"a step that is cut short is a segment of its own, got {self!r}")
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
        """Nominal kappa of each step, that of its stage unless it is cut short; float64, shape (steps,), read-only."""
        kappas = np.array([segment.kappa for segment in self.segments], dtype=np.float64)
        stage_kappa = np.repeat(kappas, [segment.count for segment in self.segments])
        stage_kappa.setflags(write=False)
        return stage_kappa

    @property
    def cut(self) -> npt.NDArray[np.bool_]:
        """Whether each step is cut short, shape (steps,)."""
        return np.repeat(
            np.array([segment.cut for segment in self.segments], dtype=bool),
            [segment.count for segment in self.segments],
        )

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
            if steps < segment.count:  # never one that is cut short, which has a single step
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
        for entry in json_list("step borders", value):
            given = dict(entry)
            cut = given.pop("cut", False)
            if set(given) != {"start", "kappa", "count", "end"} or not all(map(is_number, given.values())):
                raise ValueError(f"a segment needs the numbers start, kappa, count and end, got {dict(entry)!r}")
            if not isinstance(cut, bool):
                raise ValueError(f"cut of a segment must be true or false, got {cut!r}")
            start, kappa, end = (float(given[name]) for name in ("start", "kappa", "end"))
            segments.append(Segment(start, kappa, given["count"], end, cut))
        return cls(tuple(segments))


def step_borders(
    stages: Sequence[ResolvedStage],
    reference_batch_size: float,
    cuts: Iterable[float] = (),
    done: StepBorders | None = None,
) -> StepBorders:
    """Lay a run out as optimizer steps.

    A step advances the clock by `batch_size / reference_batch_size` and never crosses a cut, a stage end or the end of
    the run: it is cut short there, and is a segment of its own, since its gradient has the noise of its own batch: to
    the optimizer a short step is a switch to its kappa and one back. A remainder below 1e-9 of a step is no step.

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
                segments += _piece(position, kappa, end)
                position, resumed = end, False
            start = end
    return StepBorders(tuple(segments))


def _piece(start: float, kappa: float, end: float) -> list[Segment]:
    """Steps of `kappa` from `start` to `end`, the last one apart if it is shorter."""
    count = _step_count(start, end, kappa)
    last = start + kappa * (count - 1)
    if end > last + kappa * (1 - _dust(end, kappa)):
        return [Segment(start, kappa, count, end)]
    whole = [Segment(start, kappa, count - 1, last)] if count > 1 else []
    return [*whole, Segment(last, end - last, 1, end, cut=True)]


def _dust(end: float, kappa: float) -> float:
    # The second term is the rounding of the positions themselves, which exceeds the first past some 1e6 steps.
    return float(DUST + 4 * np.finfo(np.float64).eps * end / kappa)


def _step_count(start: float, end: float, kappa: float) -> int:
    return max(0, math.ceil((end - start) / kappa - _dust(end, kappa)))


def _continues(segment: Segment, kappa: float) -> bool:
    return not segment.cut and segment.kappa == kappa and segment.end == segment.position(segment.count)
