"""How the units of a run are shared between labelled and unlabelled data, stage by stage."""

from __future__ import annotations

from collections.abc import Sequence

from .schedule import DUST, ResolvedStage

__all__ = ["source_sizes", "unlabelled_ratios"]


def unlabelled_ratios(
    stages: Sequence[ResolvedStage], pl_start: float | None, ratio: float
) -> tuple[tuple[float, float], ...]:
    """Unlabelled units per labelled unit as a piecewise constant function of the clock: pairs of start and ratio.

    The first piece starts at `pl_start`; pieces of equal ratio are one.

    Args:
        stages: The stages of the run.
        pl_start: Where unlabelled items begin; `None` without any.
        ratio: The ratio of stages that do not state labelled and unlabelled sizes.

    Raises:
        ValueError: If a stage states them before `pl_start`, or without unlabelled data.
    """
    pieces: list[tuple[float, float]] = []
    for index, stage in enumerate(stages):
        if stage.sources is not None:
            stated = f"stage {index} states {stage.sources[0]:g} labelled and {stage.sources[1]:g} unlabelled units"
            if pl_start is None:
                raise ValueError(f"{stated}, but the run has no unlabelled data: state batch_size instead")
            if stage.start < pl_start - DUST:
                raise ValueError(
                    f"{stated} from reference step {stage.start:g}, but up to pl_start={pl_start:g} all units are "
                    "labelled: end the stage before it there and state its batch_size"
                )
        if pl_start is None or stage.end <= pl_start + DUST:
            continue
        value = ratio if stage.sources is None else stage.sources[1] / stage.sources[0]
        if not pieces or pieces[-1][1] != value:
            pieces.append((stage.start if pieces else float(pl_start), value))
    return tuple(pieces)


def source_sizes(
    stage: ResolvedStage, pl_start: float | None, ratio: float
) -> tuple[float, float] | tuple[None, None]:
    """Labelled and unlabelled units of a step of `stage`, from `pl_start` on if that lies inside.

    `None` for both without unlabelled data.
    """
    if pl_start is None:
        return None, None
    if stage.sources is not None:
        return stage.sources
    if stage.end <= pl_start + DUST:
        return stage.batch_size, 0.0
    return stage.batch_size / (1.0 + ratio), stage.batch_size * ratio / (1.0 + ratio)
