from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from hf_ema_scaling.sweep.distances import align, area, loss_beside, measure, weight_distances
from hf_ema_scaling.sweep.trajectory import Trajectory, evaluated

Make = Callable[..., Trajectory]
METRICS = {"eval_loss": [3.0, 1.0], "eval_ema_loss": [3.0, 2.0]}


def test_areas_are_mean_absolute_differences() -> None:
    curve = np.array([1.0, 4.0, 2.0])
    assert area(curve, np.array([2.0, 2.0, 2.0])) == 1.0
    assert area(curve, curve) == 0.0
    # Differences of both signs do not cancel.
    assert area(np.array([1.0, -1.0]), np.zeros(2)) == 1.0
    assert np.isnan(area(np.array([np.nan, 1.0]), np.zeros(2)))


def test_weight_distances_in_closed_form(trajectory: Make) -> None:
    # The reference's student comes from (0, 0) to (3, 4), a way of 5.
    reference = trajectory("reference", METRICS, student=[(0, 0), (3, 0), (3, 4)], average=[(0, 0), (1, 0), (2, 2)])
    run = trajectory("run", METRICS, student=[(0, 0), (3, 1), (3, 1)], average=[(0, 0), (1, 2), (2, 2)])
    # Points after the start: student 1 and 3 apart, average 2 and 0; the same divisor for both.
    assert weight_distances(run, reference) == {
        "student": pytest.approx(4 / 2 / 5),
        "average": pytest.approx(2 / 2 / 5),
    }
    assert weight_distances(reference, reference) == {"student": 0.0, "average": 0.0}


def test_an_average_that_never_moves_is_farther(trajectory: Make) -> None:
    student = [(0.0, 0.0), (3.0, 0.0), (3.0, 4.0)]
    reference = trajectory("reference", METRICS, student=student, average=[(0.0, 0.0), (2.0, 0.0), (3.0, 3.0)])
    late = trajectory("late", METRICS, student=student, average=[(0.0, 0.0), (1.8, 0.0), (2.9, 2.9)])
    frozen = trajectory("frozen", METRICS, student=student, average=[(0.0, 0.0)] * 3)
    near, far = (weight_distances(run, reference) for run in (late, frozen))
    assert far["average"] > 10 * near["average"] > 0
    assert far["student"] == near["student"] == 0


def test_measure_has_every_metric_of_both(trajectory: Make) -> None:
    student = [(0.0,), (1.0,), (2.0,)]
    reference = trajectory("reference", METRICS, student=student, average=student)
    changed = {"eval_loss": [3.0, 1.0], "eval_ema_loss": [2.0, 2.5], "eval_runtime": [1.0, 1.0]}
    run = trajectory("run", changed, student=student, average=student)
    assert measure(run, reference) == {
        "weights": {"student": 0.0, "average": 0.0},
        "loss": {"student": 0.0, "average": 0.75},
    }


def test_runs_off_the_grid_are_refused(trajectory: Make) -> None:
    reference = trajectory("reference", METRICS)
    shifted = trajectory("shifted", METRICS, clock=(8.0, 13.0))
    short = trajectory("short", {key: values[:1] for key, values in METRICS.items()}, clock=(8.0,))
    within = trajectory("within", METRICS, clock=(8.0, 12.01))  # batches in seconds end within an utterance
    align(within, reference)
    for run, seen in ((shifted, "8, 13"), (short, "reference steps 8,")):
        with pytest.raises(ValueError, match=seen):
            align(run, reference)
    with pytest.raises(ValueError, match="no evaluations"):
        align(reference, trajectory("empty", {}, clock=()))


def test_runs_that_cannot_be_told_apart_are_refused(trajectory: Make) -> None:
    still = trajectory("still", METRICS, student=[(1.0,)] * 3, average=[(1.0,)] * 3)
    wide = trajectory("wide", METRICS, student=[(1.0, 2.0)] * 3, average=[(1.0, 2.0)] * 3)
    moving = trajectory("moving", METRICS, student=[(1.0,), (2.0,), (3.0,)], average=[(1.0,)] * 3)
    with pytest.raises(ValueError, match="does not move"):
        weight_distances(moving, still)
    with pytest.raises(ValueError, match="2 trainable parameters"):
        weight_distances(wide, moving)


def test_the_loss_beside_a_metric() -> None:
    sets = ["clean_loss", "clean_wer", "clean_noisy_loss", "clean_noisy_wer"]
    assert loss_beside("clean_wer", sets) == "clean_loss"
    assert loss_beside("clean_noisy_wer", sets) == "clean_noisy_loss"
    assert loss_beside("wer", ["loss", "wer"]) == "loss"
    assert loss_beside("wer", ["wer"]) is None


def test_evaluations_of_all_sets_are_one_point() -> None:
    history = [
        {"eval_a_loss": 9.0, "clock/reference_step": 4.0},
        {"loss": 1.0, "clock/reference_step": 8.0},
        {"eval_a_loss": 3.0, "clock/reference_step": 8.0},
        {"eval_b_loss": 4.0, "clock/reference_step": 8.0},
        {"eval_a_loss": 1.0, "clock/reference_step": 12.0},
        {"eval_b_loss": float("nan"), "clock/reference_step": 12.0},
        {"train_runtime": 1.0},
    ]
    assert evaluated(history, 4.0) == ([8.0, 12.0], {"eval_a_loss": [3.0, 1.0], "eval_b_loss": [4.0, None]})
