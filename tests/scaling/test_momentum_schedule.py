from __future__ import annotations

import math
import random
from itertools import pairwise

import pytest

from hf_ema_scaling.scaling import MomentumSchedule, log_momentum


def byol(k: int, base: float, steps: float) -> float:
    return 1 - (1 - base) * (math.cos(math.pi * k / steps) + 1) / 2


def test_the_cosine_is_that_of_byol() -> None:
    schedule = MomentumSchedule(0.96, "cosine", 200)
    for k in (0, 1, 50, 100, 199):
        assert math.exp(schedule.log_at(k)) == pytest.approx(byol(k, 0.96, 200), rel=1e-14)
        assert schedule.log_momentum(k, k + 1) == schedule.log_at(k)
    assert math.exp(schedule.log_at(0)) == pytest.approx(0.96, rel=1e-15)
    assert math.exp(schedule.log_at(100)) == pytest.approx(0.98, rel=1e-15)
    # 1 from the end on, exactly: nothing is added there.
    assert schedule.log_at(200) == schedule.log_at(10_000) == 0.0
    assert schedule.log_momentum(200, 260) == schedule.log_momentum(200.5, 200.75) == 0.0
    assert schedule.log_momentum(198.5, 230) == schedule.log_momentum(198.5, 200)
    # The last terms, (1 - base) (pi / 2K)**2, keep their digits.
    assert MomentumSchedule(0.96, "cosine", 10**6).log_at(10**6 - 1) == pytest.approx(
        -0.04 * (math.pi / 2e6) ** 2, rel=1e-11
    )


def test_kappa_32_in_the_middle_of_a_cosine_from_0_992() -> None:
    """rho(kappa t) ** kappa, .8796; the cosine of the powered base would be at .8867 there."""
    schedule = MomentumSchedule(0.992, "cosine", 320_000)
    middle = math.exp(schedule.log_momentum(160_000, 160_032))
    assert middle == pytest.approx(0.996**32, rel=1e-4)
    assert f"{middle:.4f}" == "0.8796" and f"{byol(5_000, 0.992**32, 10_000):.4f}" == "0.8867"


def test_intervals_are_sums_over_steps_weighted_by_their_length() -> None:
    schedule = MomentumSchedule(0.9, "cosine", 10)
    logs = [math.log(byol(k, 0.9, 10)) for k in range(10)]
    expected = 0.25 * logs[2] + logs[3] + logs[4] + 0.5 * logs[5]
    assert schedule.log_momentum(2.75, 5.5) == pytest.approx(expected, rel=1e-14)
    assert schedule.log_momentum(7.25, 7.5) == pytest.approx(0.25 * logs[7], rel=1e-14)
    assert schedule.log_momentum(0, 10) == pytest.approx(math.fsum(logs), rel=1e-14)
    assert schedule.log_momentum(3, 3) == 0.0
    # A length that is no whole number of steps has a last step of its own.
    half = MomentumSchedule(0.9, "cosine", 2.5)
    assert half.log_momentum(0, 3) == pytest.approx(sum(math.log(byol(k, 0.9, 2.5)) for k in range(3)), rel=1e-14)


@pytest.mark.parametrize("kind", ["constant", "cosine"])
def test_any_partition_decays_alike(kind: str) -> None:
    generator = random.Random(0)
    for _ in range(30):
        steps = generator.uniform(1, 300)
        schedule = MomentumSchedule(generator.uniform(0.5, 0.9999), kind, steps)  # type: ignore[arg-type]
        whole = schedule.log_momentum(0, steps)
        cuts = sorted(generator.uniform(0, steps) for _ in range(generator.randrange(40)))
        parts = [schedule.log_momentum(a, b) for a, b in pairwise([0.0, *cuts, steps])]
        assert whole < 0 and math.fsum(parts) == pytest.approx(whole, rel=1e-12)


def test_the_end_of_a_long_cosine_is_not_lost_in_the_sum_of_its_start() -> None:
    schedule = MomentumSchedule(0.9, "cosine", 100_000)
    expected = math.fsum(math.log1p(-0.1 * math.sin(math.pi * left / 200_000) ** 2) for left in range(1, 9))
    assert schedule.log_momentum(99_992, 100_000) == pytest.approx(expected, rel=1e-13)
    assert schedule.log_momentum(99_992, 100_000) > -1e-8


def test_constant_and_the_ends_of_the_range() -> None:
    assert MomentumSchedule(0.99).log_momentum(3.5, 11.25) == 7.75 * log_momentum(0.99)
    assert MomentumSchedule(0.99).log_at(7) == log_momentum(0.99)
    assert MomentumSchedule(1.0, "cosine", 5).log_momentum(0, 5) == 0.0
    assert MomentumSchedule(0.0).log_momentum(1, 2) == -math.inf and MomentumSchedule(0.0).log_momentum(1, 1) == 0.0
    zero = MomentumSchedule(0.0, "cosine", 5)
    assert zero.log_momentum(0, 0.5) == zero.log_momentum(0, 5) == -math.inf
    assert zero.log_momentum(1, 5) == pytest.approx(sum(math.log(byol(k, 0.0, 5)) for k in range(1, 5)), rel=1e-14)


def test_bad_schedules_are_refused() -> None:
    with pytest.raises(ValueError, match="momentum_schedule must be one of constant, cosine, got 'linear'"):
        MomentumSchedule(0.9, "linear", 10)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"momentum must lie in \[0, 1\], got 1.5"):
        MomentumSchedule(1.5)
    with pytest.raises(ValueError, match="reference_steps of a cosine"):
        MomentumSchedule(0.9, "cosine")
    for start, end in ((-1, 2), (3, 2), (math.nan, 1)):
        with pytest.raises(ValueError, match="0 <= start <= end"):
            MomentumSchedule(0.9).log_momentum(start, end)
