"""The runs of a sweep: which there are, what each one's recipe says, and from where it branches."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from hf_ema_scaling.recipe.config import KIND_KEY, parse
from hf_ema_scaling.recipe.planning import plan_recipe
from hf_ema_scaling.recipe.registry import kind_of
from hf_ema_scaling.scaling import ReferenceClock, ScalingPlan
from hf_ema_scaling.training.arguments import EMATrainingArguments

RULE, UNSCALED, NONE, SPREAD, DROPOUT, PHASE = "rule", "unscaled", "none", "spread", "dropout", "phase"
SPREAD_RUNS = 2
"""Spread runs of each seed."""
SPREAD_SEEDS = 1000
"""What the first spread run adds to the seed of data, dropout and augmentation; the next one adds it twice."""
ARM_SETTINGS: dict[str, dict[str, Any]] = {
    RULE: {},
    UNSCALED: {"scale_ema": False},
    NONE: {"scale_ema": False, "scaling_rule": "none"},
    SPREAD: {},
    DROPOUT: {},
    PHASE: {"eval_strategy": "no"},
}
# Never the recipe's: the sweep says what is run, recorded and kept, or they do not change what a run computes.
OWN_SETTINGS: dict[str, Any] = {
    "evaluate_weights": "both",
    "eval_strategy": "steps",
    "save_strategy": "no",
    "load_best_model_at_end": False,
    "push_to_hub": False,
    "report_to": "none",
    "disable_tqdm": True,
}
DROPPED_SETTINGS = ("output_dir", "batch_size", "batch_schedule", "resume_from_checkpoint", "hub_model_id")


@dataclass(frozen=True)
class SweepJob:
    """One run of a sweep, in words that another process understands.

    Args:
        arm: `rule`, `unscaled` (momentum not scaled), `none` (nothing scaled), `spread` (kappa 1 with other seeds for
            data, dropout and augmentation from `start` on), `dropout` (kappa 1 with the same data and augmentation
            and other dropout masks), or `phase` (what all runs of a seed share).
        kappa: batch over reference batch from `start` on.
        seed: of the sweep.
        start: reference step from which on kappas differ, and runs are recorded.
        settings: all that the recipe's YAML file would say; without `output_dir`.
        folder: of the run.
        branch: the phase to go on from, if there is one.
        repeat: tells the spread runs of a seed apart, from 1; 0 for all other runs.
    """

    arm: str
    kappa: float
    seed: int
    start: float
    settings: Mapping[str, Any]
    folder: Path
    branch: SweepJob | None = None
    repeat: int = 0

    @property
    def name(self) -> str:
        """As people read it."""
        arm = f"{self.arm} {self.repeat}" if self.repeat else self.arm
        return f"seed {self.seed}, {arm}" + (f", kappa {self.kappa:g}" if self.arm != PHASE else "")

    @property
    def forks(self) -> bool:
        """Whether the run leaves the random numbers of its branch behind: what follows is another draw."""
        return self.branch is not None and self.arm in (SPREAD, DROPOUT)

    @property
    def configuration(self) -> dict[str, Any]:
        """What the run's figures depend on and is known before it, as JSON values; for its data see `RESULT`."""
        before = None if self.branch is None else self.branch.configuration
        versions = {name: version(name) for name in ("hf-ema-scaling", "torch", "transformers")}
        settings = dict(self.settings)
        return {"start": self.start, "settings": settings, "branch": before, "forks": self.forks, "versions": versions}

    @property
    def fingerprint(self) -> str:
        """Hash of `configuration`."""
        return hashlib.sha256(json.dumps(self.configuration, sort_keys=True).encode()).hexdigest()[:16]

    def write_recipe(self) -> Path:
        """The run's recipe as a YAML file in its folder, with which it can also be run alone."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / "recipe.yaml"
        path.write_text(yaml.safe_dump(dict(self.settings), sort_keys=False), encoding="utf-8")
        return path


def lay_out_sweep(
    recipe: Mapping[str, Any], kappas: Iterable[float], seeds: Iterable[int], folder: Path
) -> list[SweepJob]:
    """The runs of a sweep, each after the phase that it branches from.

    Kappa 1 is always among them. `unscaled` is run at every other kappa, `none` at the largest. The `SPREAD_RUNS` runs
    of `spread` and the one of `dropout` say how far runs at kappa 1 lie apart by chance; where there is no phase to
    branch from, spread runs share the initialisation alone, and there is no `dropout`.

    Args:
        recipe: settings as in a recipe's YAML file, with max_steps and eval_steps; `small_batch_until` (default:
            `pl_start` with unlabelled data, else 0) is where runs branch.
        kappas: batches over the reference batch.
        seeds: one set of runs for each.
        folder: of the sweep; holds one folder per run.

    Raises:
        ValueError: for kappas, seeds or a recipe that cannot be compared on one clock, with the reason.
    """
    chosen = sorted({1.0, *map(float, kappas)})
    each_seed = list(dict.fromkeys(seeds))
    if chosen[0] <= 0 or len(chosen) == 1:
        raise ValueError(
            f"kappas must be above 0, one of them other than 1, got {', '.join(f'{k:g}' for k in chosen)}"
        )
    if not each_seed or min(each_seed) < 0:
        raise ValueError(f"at least one seed is needed, each at least 0, got {each_seed}")
    _needs_init_seed(recipe)
    base = {key: value for key, value in recipe.items() if key not in DROPPED_SETTINGS} | OWN_SETTINGS
    start, grid = common_grid(base, chosen)

    def job(arm: str, kappa: float, seed: int, branch: SweepJob | None = None, repeat: int = 0) -> SweepJob:
        other = seed + SPREAD_SEEDS * repeat
        settings = {
            **base,
            **ARM_SETTINGS[arm],
            **{
                "kappa": kappa,
                "small_batch_until": start,
                "eval_delay": grid[0],
                "seed": other,
                "data_seed": other,
                "init_seed": seed,
            },
        }
        name = f"{arm}-{repeat}" if repeat else arm if arm in (PHASE, DROPOUT) else f"{arm}-{kappa:g}"
        return SweepJob(arm, kappa, seed, start, settings, folder / f"seed-{seed}" / name, branch, repeat)

    jobs = []
    for seed in each_seed:
        branch = job(PHASE, 1.0, seed) if start else None
        jobs += [branch] if branch else []
        jobs += [job(RULE, kappa, seed, branch) for kappa in chosen]
        jobs += [job(SPREAD, 1.0, seed, branch, repeat) for repeat in range(1, SPREAD_RUNS + 1)]
        jobs += [job(DROPOUT, 1.0, seed, branch)] if branch else []
        jobs += [job(UNSCALED, kappa, seed, branch) for kappa in chosen if kappa != 1]
        jobs += [job(NONE, chosen[-1], seed, branch)] if chosen[-1] > 1 else []
    return jobs


def _needs_init_seed(recipe: Mapping[str, Any]) -> None:
    known = {field.name for arguments in kind_of(recipe).arguments for field in dataclasses.fields(arguments)}
    if "init_seed" not in known:
        raise ValueError(
            f"{KIND_KEY} {recipe.get(KIND_KEY)!r} has no init_seed, without which runs of one seed cannot share their "
            "initialisation"
        )


def common_grid(settings: Mapping[str, Any], kappas: Sequence[float]) -> tuple[float, list[float]]:
    """Where runs branch, and where all of them are evaluated from there on, in reference steps.

    Raises:
        ValueError: when they do not, with both positions, or when the recipe counts epochs.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "recipe.yaml"
        path.write_text(yaml.safe_dump({**settings, "kappa": 1.0}), encoding="utf-8")
        argv = ["--config", str(path), "--output_dir", folder]
        parsed = parse(kind_of(settings).arguments, argv)
        args = next(found for found in parsed if isinstance(found, EMATrainingArguments))
        if args.max_steps <= 0:
            raise ValueError("a sweep needs max_steps: epochs do not fix the positions at which runs are compared")
        plans = dict(zip(kappas, plan_recipe(path, kappas=kappas), strict=True))
    every = float(args.eval_steps or 0)
    every = every * args.max_steps if every < 1 else every
    start = max(plan.stages[0].end if len(plan.stages) > 1 else 0.0 for plan in plans.values())
    reference = evaluations(plans[1.0], every, start)
    for kappa, plan in plans.items():
        found = evaluations(plan, every, start)
        if found != reference:
            apart = next((pair for pair in zip(found, reference, strict=False) if pair[0] != pair[1]), None)
            seen = f"at {apart[0]:g} and {apart[1]:g}" if apart else f"{len(found)} and {len(reference)} times"
            raise ValueError(
                f"runs at kappa {kappa:g} and 1 would be evaluated {seen}, not on one grid: eval_steps ({every:g}) "
                f"and small_batch_until ({start:g}) must be multiples of the largest kappa, and max_steps with them"
            )
    return start, reference


def evaluations(plan: ScalingPlan, every: float, start: float) -> list[float]:
    """Clock positions after `start` at which a run with this plan evaluates, to a millionth of a reference step."""
    borders = plan.borders
    fires = [
        after
        for before, after in pairwise(borders)
        if ReferenceClock.crosses(before, after, every) or after == borders[-1]
    ]
    return [round(float(clock), 6) for clock in fires if clock > start]
