"""How far a run is from the one at the reference batch, at equal data seen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from hf_ema_scaling.sweep.jobs import PHASE, RULE, SweepJob
from hf_ema_scaling.sweep.trajectory import SIDES, STUDENT, FloatArray, Trajectory

WEIGHTS = "weights"
"""Name of the distance between weights, beside the names of metrics for areas between curves."""
APART = 0.1
"""Reference steps by which evaluations of two runs may lie apart: batches in seconds end within an utterance."""


@dataclass(frozen=True)
class Comparison:
    """One run of a sweep beside the run of its seed at kappa 1.

    Args:
        arm, kappa, seed, repeat: as in `SweepJob`.
        distances: by name, `weights` or a metric, then by `student` or `average`.
        run: the run itself.
    """

    arm: str
    kappa: float
    seed: int
    distances: dict[str, dict[str, float]]
    run: Trajectory
    repeat: int = 0

    @property
    def ends(self) -> dict[str, dict[str, float]]:
        """Metrics at the end of the run, by name, then by `student` or `average`."""
        return {name: {side: float(self.run.metric(name, side)[-1]) for side in SIDES} for name in self.run.names()}


def area(curve: FloatArray, reference: FloatArray) -> float:
    """Area between two metric curves over their common clock, divided by its length: the mean of |difference|.

    Every evaluation counts the same. NaN where a curve has one.
    """
    return float(np.abs(curve - reference).mean())


def norm(a: Tensor, b: Tensor) -> float:
    """Euclidean distance of two flat weights, summed in float64."""
    return float((a.double() - b.double()).norm())


def weight_distances(run: Trajectory, reference: Trajectory) -> dict[str, float]:
    """Distance in the space of weights, of students and of averages.

    For w in (student, average), over the points t of the common clock after the start of the compared part:

        mean over t of |w_run(t) - w_reference(t)|  /  |student_reference(end) - student_reference(start)|

    with Euclidean norms over all trainable parameters. Both have the same divisor, the way that the student of the
    reference run has come in the compared part, so they can be compared with each other: 1 is as far as that.

    Raises:
        ValueError: when the runs are of different models, or the reference run stands still.
    """
    begun, ended = (reference.weights(point)[STUDENT] for point in (0, len(reference.clock)))
    way = norm(ended, begun)
    if way == 0:
        raise ValueError(f"the student in {reference.folder} does not move, so no distance can be told by its way")
    sums = dict.fromkeys(SIDES, 0.0)
    for point in range(1, len(reference.clock) + 1):
        here, there = run.weights(point), reference.weights(point)
        for side in sums:
            if here[side].shape != there[side].shape:
                raise ValueError(
                    f"{run.folder} has {here[side].numel()} trainable parameters, {reference.folder} "
                    f"{there[side].numel()}"
                )
            sums[side] += norm(here[side], there[side])
    return {side: total / len(reference.clock) / way for side, total in sums.items()}


def align(run: Trajectory, reference: Trajectory) -> None:
    """Refuses runs that were not evaluated at the same positions of the clock, or not trained on the same data.

    Raises:
        ValueError: with the positions; for runs on other data, with what differs.
    """
    changed = {key: (value, run.result["data"].get(key)) for key, value in reference.result["data"].items()}
    changed = {key: pair for key, pair in changed.items() if pair[0] != pair[1]}
    if changed:
        listed = ", ".join(f"{key}: {theirs} there, {mine} here" for key, (theirs, mine) in changed.items())
        raise ValueError(
            f"{run.folder} was trained on other data than {reference.folder} ({listed}): remove the one that is out "
            "of date and run the sweep again"
        )
    if not len(reference.clock):
        raise ValueError(f"{reference.folder} has no evaluations: lower eval_steps")
    if len(run.clock) != len(reference.clock) or np.abs(run.clock - reference.clock).max() > APART:
        raise ValueError(
            f"{run.folder} was evaluated at reference steps {_listed(run.clock)}, {reference.folder} at "
            f"{_listed(reference.clock)}: there is nothing to compare"
        )


def _listed(clock: FloatArray) -> str:
    return ", ".join(f"{position:g}" for position in clock)


def measure(run: Trajectory, reference: Trajectory) -> dict[str, dict[str, float]]:
    """All distances of a run: between weights, and the area between the curves of every metric.

    Raises:
        ValueError: for runs that cannot be compared.
    """
    align(run, reference)
    areas = {
        name: {side: area(run.metric(name, side), reference.metric(name, side)) for side in SIDES}
        for name in reference.names()
    }
    return {WEIGHTS: weight_distances(run, reference), **areas}


def compare(jobs: Sequence[SweepJob]) -> list[Comparison]:
    """Every finished run of a sweep beside the reference of its seed, which is among them.

    Raises:
        FileNotFoundError: when a run is not finished.
        ValueError: for runs that cannot be compared.
    """
    runs = [(job, Trajectory.read(job.folder)) for job in jobs if job.arm != PHASE]
    references = {job.seed: run for job, run in runs if job.arm == RULE and job.kappa == 1}
    return [
        Comparison(
            arm=job.arm,
            kappa=job.kappa,
            seed=job.seed,
            distances=measure(run, references[job.seed]),
            run=run,
            repeat=job.repeat,
        )
        for job, run in runs
    ]


def loss_beside(metric: str, names: Sequence[str]) -> str | None:
    """The loss of the evaluation set that `metric` is measured on, if it is among `names`.

    With several sets, names begin with that of the set: the loss beside `clean_wer` is `clean_loss`.
    """
    losses = [name for name in names if name == "loss" or name.endswith("_loss")]
    fitting = [name for name in losses if metric.startswith(name.removesuffix("loss"))]
    return max(fitting, key=len, default=None)
