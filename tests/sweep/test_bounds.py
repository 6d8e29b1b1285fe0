from __future__ import annotations

from collections.abc import Callable

import pytest

from hf_ema_scaling.sweep.bounds import factors, judge, mean_factor
from hf_ema_scaling.sweep.distances import Comparison

Make = Callable[..., Comparison]


@pytest.fixture
def sweep(comparison: Make) -> list[Comparison]:
    """Seed 0 meets every bound; seed 1 breaks each of them."""
    return [
        *(comparison("rule", 1, seed, 0.0, 0.0) for seed in (0, 1)),
        comparison("spread", 1, 0, 0.05, 0.40, 1),
        comparison("spread", 1, 0, 0.30, 0.40, 2),  # the farther one is the limit
        comparison("spread", 1, 1, 0.05, 0.40),
        comparison("rule", 2, 0, 0.10, 0.20),
        comparison("rule", 2, 1, 0.40, 0.20),
        comparison("rule", 4, 0, 0.20, 0.20),
        comparison("rule", 4, 1, 0.20, 0.20),
        comparison("rule", 8, 0, 0.25, 0.20),  # exactly 1.25 times its student
        comparison("rule", 8, 1, 0.41, 0.20),
        comparison("unscaled", 8, 0, 0.75, 0.20),
        comparison("unscaled", 8, 1, 0.41, 0.20),
        comparison("unscaled", 2, 0, 0.30, 0.20),
        comparison("unscaled", 2, 1, 0.40, 0.20),
        comparison("none", 8, 0, 0.9, 0.9),
        comparison("none", 8, 1, 0.9, 0.9),
    ]


def test_bounds_are_judged_seed_by_seed(sweep: list[Comparison]) -> None:
    found = {(each.kappa, each.bound.split()[1], each.seed): each for each in judge(sweep, ["weights"])}
    assert {key: each.holds for key, each in found.items()} == {
        **{(8.0, "unscaled", 0): True, (8.0, "unscaled", 1): False},
        **{(8.0, "rule's", 0): True, (8.0, "rule's", 1): False},
        **{(2.0, "rule's", 0): True, (2.0, "rule's", 1): False},
        **{(4.0, "rule's", 0): True, (4.0, "rule's", 1): False},
    }
    # By the widest spread of all seeds, 0.30, kappa 4 is within it for both.
    assert found[4.0, "rule's", 1].all_seeds and not found[2.0, "rule's", 1].all_seeds
    # The unscaled average would keep within the spread at kappa 2 for seed 0, and was not run at 4.
    assert [found[kappa, "rule's", seed].unscaled for kappa in (2.0, 4.0, 8.0) for seed in (0, 1)] == [
        *(True, False, None, None),
        *(False, False),
    ]
    assert (found[4.0, "rule's", 1].value, found[4.0, "rule's", 1].limit) == (0.20, 0.05)


def test_a_wide_spread_allows_more_than_the_own_student(comparison: Make) -> None:
    runs = [
        comparison("spread", 1, 0, 0.5, 0.5),
        comparison("rule", 1, 0, 0.0, 0.0),
        comparison("rule", 8, 0, 0.45, 0.1),
        comparison("unscaled", 8, 0, 0.9, 0.1),
    ]
    assert [each.holds for each in judge(runs, ["loss"])] == [True, True]


def test_nothing_holds_of_runs_that_are_not_numbers(comparison: Make) -> None:
    nan = float("nan")
    runs = [
        comparison("spread", 1, 0, 0.5, 0.5),
        comparison("rule", 1, 0, 0.0, 0.0),
        comparison("rule", 4, 0, nan, nan),
        comparison("rule", 8, 0, nan, nan),
        comparison("unscaled", 8, 0, nan, 0.1),
    ]
    assert not any(each.holds for each in judge(runs, ["weights", "loss"]))


def test_factors_by_kappa_and_seed(sweep: list[Comparison]) -> None:
    found = factors(sweep, "weights")
    assert found == {8: {0: pytest.approx(3.0), 1: 1.0}, 2: {0: pytest.approx(3.0), 1: 1.0}}
    assert factors(sweep, "weights", "student")[8][0] == 1.0


def test_one_seed_does_not_decide_the_factor(comparison: Make) -> None:
    runs = [
        comparison("rule", 8, 0, 0.001, 0.1),
        comparison("rule", 8, 1, 0.2, 0.1),
        comparison("unscaled", 8, 0, 0.4, 0.1),
        comparison("unscaled", 8, 1, 0.4, 0.1),
    ]
    assert mean_factor(runs, "weights", 8) == pytest.approx(0.8 / 0.201)
    assert max(factors(runs, "weights")[8].values()) == pytest.approx(400)
