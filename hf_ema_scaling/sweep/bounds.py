"""Which bounds a sweep must meet, and whether it does, seed by seed."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from hf_ema_scaling.sweep.distances import Comparison
from hf_ema_scaling.sweep.jobs import RULE, SPREAD, UNSCALED
from hf_ema_scaling.sweep.trajectory import AVERAGE, STUDENT

OWN_STUDENT = 1.25
"""How much farther than its own student the rule's average may be."""


@dataclass(frozen=True)
class Verdict:
    """One bound on one distance for one seed.

    Args:
        bound: in words.
        kappa: that it is about.
        distance: `weights` or the name of a metric.
        seed: of the runs.
        value: the distance that is judged.
        limit: what it is compared with.
        holds: whether the bound holds; never where a value is not a number.
        all_seeds: the same with the largest spread of all seeds as the limit; None for bounds without a spread.
        unscaled: whether the unscaled average of that kappa and seed keeps within the same limit: a bound that it
            keeps, too, tells nothing. None where it is what the bound is about.
    """

    bound: str
    kappa: float
    distance: str
    seed: int
    value: float
    limit: float
    holds: bool
    all_seeds: bool | None = None
    unscaled: bool | None = None


def judge(comparisons: Sequence[Comparison], distances: Sequence[str]) -> list[Verdict]:
    """The four bounds, for every seed, by each of `distances`; all are about averages, at the sweep's kappas.

    At the largest kappa K: the unscaled average is farther from kappa 1 than the rule's; the rule's is at most
    `OWN_STUDENT` times as far as its own student, or within the spread. At every kappa between 1 and K (2 and 4, when
    K is 8): the rule's average is within the spread. A distance is within the spread if it is at most that of the
    farthest spread run of its seed.
    """
    table = {(run.arm, run.kappa, run.seed): run.distances for run in comparisons}
    by_chance = [run for run in comparisons if run.arm == SPREAD]
    seeds = sorted({run.seed for run in comparisons})
    kappas = sorted({run.kappa for run in comparisons if run.arm == RULE and run.kappa > 1})
    verdicts: list[Verdict] = []
    for name in distances:
        spreads = {seed: max(run.distances[name][AVERAGE] for run in by_chance if run.seed == seed) for seed in seeds}
        widest = max(spreads.values())

        def rule(kappa: float, seed: int, weights: str = AVERAGE, name: str = name) -> float:
            return table[RULE, kappa, seed][name][weights]

        def unscaled_keeps(kappa: float, seed: int, limit: float, name: str = name) -> bool | None:
            run = table.get((UNSCALED, kappa, seed))
            return None if run is None else run[name][AVERAGE] <= limit

        for kappa in kappas[-1:]:
            for seed in seeds:
                value, limit = table[UNSCALED, kappa, seed][name][AVERAGE], rule(kappa, seed)
                text = "the unscaled average is farther than the rule's"
                verdicts.append(Verdict(text, kappa, name, seed, value, limit, value > limit))
            for seed in seeds:
                value, own = rule(kappa, seed), OWN_STUDENT * rule(kappa, seed, STUDENT)
                text = (
                    f"the rule's average is at most {OWN_STUDENT:g} x as far as its own student, or within the spread"
                )
                limits = max(own, spreads[seed]), max(own, widest)
                kept = unscaled_keeps(kappa, seed, limits[0])
                verdicts.append(Verdict(text, kappa, name, seed, value, limits[0], *_at_most(value, limits), kept))
        for kappa in kappas[:-1]:
            for seed in seeds:
                value = rule(kappa, seed)
                text = "the rule's average is within the spread"
                limits = spreads[seed], widest
                kept = unscaled_keeps(kappa, seed, limits[0])
                verdicts.append(Verdict(text, kappa, name, seed, value, limits[0], *_at_most(value, limits), kept))
    return verdicts


def _at_most(value: float, limits: tuple[float, float]) -> tuple[bool, bool]:
    return value <= limits[0], value <= limits[1]


def factors(comparisons: Sequence[Comparison], distance: str, weights: str = AVERAGE) -> dict[float, dict[int, float]]:
    """How many times farther from kappa 1 the unscaled run is than the rule's, by kappa and seed.

    NaN where the rule's run is as near as can be.
    """
    table = {(run.arm, run.kappa, run.seed): run.distances[distance][weights] for run in comparisons}
    found: dict[float, dict[int, float]] = {}
    for (arm, kappa, seed), value in table.items():
        if arm == UNSCALED:
            own = table[RULE, kappa, seed]
            found.setdefault(kappa, {})[seed] = value / own if own > 0 else float("nan")
    return found


def mean_factor(comparisons: Sequence[Comparison], distance: str, kappa: float, weights: str = AVERAGE) -> float:
    """The same for the mean distances of all seeds, so that a seed whose rule's run is very near does not decide.

    NaN where the rule's runs are as near as can be.
    """

    def mean(arm: str) -> float:
        return statistics.fmean(
            run.distances[distance][weights] for run in comparisons if (run.arm, run.kappa) == (arm, kappa)
        )

    own = mean(RULE)
    return mean(UNSCALED) / own if own > 0 else float("nan")


def spread_of(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean, smallest and largest."""
    return statistics.fmean(values), min(values), max(values)
