"""From a recipe at the reference batch to the values of every optimizer step."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, get_args

import numpy as np

from .borders import StepBorders, step_borders
from .momentum import PathWeights, path_correction, weight_from_log_momentum
from .optimizers import OptimizerValues
from .optimizers import scaling_rule as find_rule
from .recipe import Recipe
from .schedule import DUST, BatchSchedule, FloatArray, ResolvedStage
from .sources import source_sizes, unlabelled_ratios
from .table import plan_table
from .warnings import plan_warnings

__all__ = ["Correction", "ScalingPlan", "StepValues"]

Correction = Literal["none", "path"]


@dataclass(frozen=True)
class StepValues:
    """Nominal values of one optimizer step.

    `start` and `end` are clock positions. `momentum` is the average's for this step alone; where it does not move at
    every step, an update has the product of the momenta since the last one.
    """

    start: float
    end: float
    kappa: float
    stage_kappa: float
    learning_rate: float
    weight_decay: float
    betas: tuple[float, float] | None
    eps: float | None
    sgd_momentum: float | None
    alpha: float | None
    max_grad_norm: float | None
    momentum: float
    ema_weight: float


class ScalingPlan:
    """Every step of a run at any batch schedule, derived from a recipe at the reference batch.

    Args:
        recipe: The recipe.
        schedule: Batch size over the run.
        lr_multiplier: Learning rate of reference step k over its peak; `None` for linear warm-up, then constant.
        scaling_rule: Name of a rule; `None` takes the one of `recipe.optimizer`, "none" keeps the optimizer's values.
        scale_ema: `False` applies the momentum at the step's start once per optimizer step, whatever its kappa: the
            baseline to compare the rule with.
        ema_update_every: Optimizer steps between updates of the average.
        ema_correction: "path" for updates by `path_correction`.
        ema_dtype: What the average is kept in, "float32" or "float64"; for the warnings.
        done: Steps already run, frozen; the schedule lays out the rest.

    Attributes:
        unlabelled_ratios: Pairs of a clock position and the unlabelled units per labelled unit from there on, the
            first at `pl_start`; empty without unlabelled data.

    Raises:
        ValueError: If the optimizer has no rule, the schedule does not fit the run, or a stage has impossible values,
            or the settings of the average exclude each other.
    """

    def __init__(
        self,
        recipe: Recipe,
        schedule: BatchSchedule,
        *,
        lr_multiplier: Callable[[int], float] | None = None,
        scaling_rule: str | None = None,
        scale_ema: bool = True,
        ema_update_every: int = 1,
        ema_correction: Correction = "none",
        ema_dtype: str = "float32",
        done: StepBorders | None = None,
    ) -> None:
        self.recipe = recipe
        self.schedule = schedule
        self.rule = find_rule(recipe.optimizer if scaling_rule is None else scaling_rule)
        self.scale_ema = scale_ema
        self.ema_update_every = ema_update_every
        self.ema_correction = ema_correction
        self.ema_dtype = ema_dtype
        self._check_average()
        self.done_steps = 0 if done is None else len(done)
        self.stages = schedule.resolve(recipe.max_steps, recipe.steps_per_epoch)
        self.unlabelled_ratios = unlabelled_ratios(self.stages, recipe.pl_start, recipe.unlabelled_ratio)
        cuts = () if recipe.pl_start is None else (recipe.pl_start,)
        self.step_borders = step_borders(self.stages, recipe.reference_batch_size, cuts, done)
        self._lr_multiplier = lr_multiplier or recipe.warmup_multiplier
        self.average_momentum = recipe.average_momentum()
        for stage in self.stages:
            if recipe.unit == "samples" and stage.batch_size < 1:
                raise ValueError(
                    f"a batch of {stage.batch_size:g} samples (kappa={self._kappa(stage):g}) cannot be drawn: it must "
                    "hold at least 1"
                )
            self._at_peak(stage)

    def _check_average(self) -> None:
        every = self.ema_update_every
        if not isinstance(every, int) or every < 1:
            raise ValueError(f"ema_update_every must be a whole number of optimizer steps above 0, got {every!r}")
        if self.ema_correction not in get_args(Correction):
            raise ValueError(
                f"ema_correction must be one of {', '.join(get_args(Correction))}, got {self.ema_correction!r}"
            )
        if self.ema_correction == "path" and every > 1:
            raise ValueError(
                f"ema_correction='path' follows the weights through every optimizer step, so it does not go with "
                f"ema_update_every={every}: set one of them back"
            )
        if self.ema_correction == "path" and not self.scale_ema:
            raise ValueError("ema_correction='path' corrects the scaled momentum: it does not go with scale_ema=False")

    def __len__(self) -> int:
        return len(self.step_borders)

    @property
    def borders(self) -> FloatArray:
        """Nominal clock positions, shape (steps + 1,): step t covers `borders[t]` to `borders[t + 1]`."""
        return self.step_borders.borders

    @property
    def stage_kappa(self) -> FloatArray:
        """Nominal kappa of each step, shape (steps,): that of its stage unless it is cut short."""
        return self.step_borders.stage_kappa

    def step_at(self, clock: float) -> int:
        """Optimizer steps done when the clock has reached `clock` reference steps; at most all of them."""
        return int(np.searchsorted(self.borders[:-1], clock - DUST))

    def lr_factor(self, start: float, end: float) -> float:
        """Mean of the reference learning-rate schedule over a clock interval, `f(floor(s))` at position s.

        Exactly `f(k)` for an interval inside reference step k. The schedule's last step is held past the run's end.
        """
        if not 0 <= start < end:
            raise ValueError(f"a clock interval needs 0 <= start < end, got {start!r} to {end!r}")
        # Summed over the interval itself: a difference of cumulative sums would lose the digits of a decayed tail.
        last = math.ceil(self.recipe.max_steps) - 1
        steps = range(math.floor(start), math.ceil(end))
        values = [float(self._lr_multiplier(min(step, last))) for step in steps]
        if len(values) == 1:
            return values[0]
        lengths = [min(step + 1, end) - max(step, start) for step in steps]
        return math.fsum(map(operator.mul, values, lengths)) / (end - start)

    def optimizer_values(
        self, reference: OptimizerValues, *, start: float, end: float, stage_kappa: float
    ) -> OptimizerValues:
        """Hyper-parameters of a param group for the step that covers a clock interval.

        Args:
            reference: The group's values at the reference batch; its learning rate is the peak.
            start: Clock position before the step.
            end: Clock position after it; `end - start` is the step's kappa.
            stage_kappa: Nominal kappa of the stage; of a step that is cut short its own.
        """
        current = replace(reference, learning_rate=reference.learning_rate * self.lr_factor(start, end))
        return self.rule.scale(current, kappa=end - start, stage_kappa=stage_kappa)

    def log_momentum(self, start: float, end: float) -> float:
        """Log-momentum of the average for the step that covers a clock interval: the sum of the reference schedule's.

        Consecutive intervals add up, so every partition of the same data decays alike. `-inf` for an
        interval that starts before `ema_start`: the average is then the student.
        """
        return -math.inf if start < self.recipe.ema_start - DUST else self._log_momentum(start, end)

    def _log_momentum(self, start: float, end: float) -> float:
        if self.scale_ema:
            return self.average_momentum.log_momentum(start, end)
        return self.average_momentum.log_at(math.floor(start + DUST))

    def path_weights(self, start: float, end: float) -> PathWeights:
        """The two moves of the path-corrected update for the step that covers a clock interval."""
        return path_correction(self.log_momentum(start, end), end - start)

    def max_grad_norm(self, kappa: float) -> float | None:
        """Clip norm of a step of `kappa` reference batches; `None` without clipping."""
        return self.rule.clip_norm(self.recipe.max_grad_norm, kappa) if self.recipe.max_grad_norm else None

    def step(self, t: int) -> StepValues:
        """Nominal values of optimizer step `t`, counted from 0.

        Raises:
            IndexError: If there is no such step.
        """
        if not 0 <= t < len(self):
            raise IndexError(f"optimizer step {t} is outside the plan of {len(self)} steps")
        start, end = float(self.borders[t]), float(self.borders[t + 1])
        stage_kappa = float(self.stage_kappa[t])
        reference = self.recipe.optimizer_values(self.rule)
        values = self.optimizer_values(reference, start=start, end=end, stage_kappa=stage_kappa)
        log_rho = self.log_momentum(start, end)
        return StepValues(
            start=start,
            end=end,
            kappa=end - start,
            stage_kappa=stage_kappa,
            learning_rate=values.learning_rate,
            weight_decay=values.weight_decay,
            betas=values.betas,
            eps=values.eps,
            sgd_momentum=values.momentum,
            alpha=values.alpha,
            max_grad_norm=self.max_grad_norm(end - start),
            momentum=math.exp(log_rho),
            ema_weight=weight_from_log_momentum(log_rho),
        )

    def stage_values(self) -> list[dict[str, Any]]:
        """Per stage: batch and its sources, kappa, clock, optimizer steps, and values at the peak learning rate.

        Labelled and unlabelled sizes are those from `pl_start` on where that lies inside a stage, and `None` without
        unlabelled data.
        """
        starts = self.borders[:-1]
        rows: list[dict[str, Any]] = []
        for stage in self.stages:
            kappa = self._kappa(stage)
            inside = (starts >= stage.start - DUST * kappa) & (starts < stage.end - DUST * kappa)
            rows.append(self._batch(stage) | {"kappa": kappa, "steps": int(inside.sum())} | self._at_peak(stage))
        return rows

    def reference_values(self) -> dict[str, Any]:
        """The same row for the reference batch."""
        stage = ResolvedStage(0.0, self.recipe.max_steps, self.recipe.reference_batch_size)
        return self._batch(stage) | {"kappa": 1.0, "steps": self.recipe.max_steps} | self._at_peak(stage)

    def _batch(self, stage: ResolvedStage) -> dict[str, Any]:
        labelled, unlabelled = source_sizes(stage, self.recipe.pl_start, self.recipe.unlabelled_ratio)
        sizes = {"batch_size": stage.batch_size, "labelled": labelled, "unlabelled": unlabelled}
        return {"start": stage.start, "end": stage.end} | sizes

    def _kappa(self, stage: ResolvedStage) -> float:
        return stage.batch_size / self.recipe.reference_batch_size

    def _at_peak(self, stage: ResolvedStage) -> dict[str, Any]:
        """Values of a full step at the peak learning rate; the average's at the stage's start, and where it ends.

        In a stage that is shorter than one of its steps, those of the one that fits.
        """
        kappa = self._kappa(stage)
        if stage.end - stage.start > DUST * kappa:
            kappa = min(kappa, stage.end - stage.start)
        values = self.rule.scale(self.recipe.optimizer_values(self.rule), kappa=kappa, stage_kappa=kappa)
        constant = self.recipe.momentum_schedule == "constant"
        first = 0.0 if constant else stage.start
        last = max(first, stage.end - kappa)
        log_rho = self._log_momentum(first, first + kappa)
        half_life = math.log(2.0) / -log_rho if log_rho else math.inf
        return asdict(values) | {
            "sgd_momentum": values.momentum,
            "max_grad_norm": self.max_grad_norm(kappa),
            "momentum": math.exp(log_rho),
            "momentum_at_end": None if constant else math.exp(self._log_momentum(last, last + kappa)),
            "pl_ramp_steps": self.recipe.pl_ramp / kappa or None,
            "cache_steps": self.recipe.cache_steps / kappa or None,
            "half_life_units": half_life * kappa * self.recipe.reference_batch_size,
            "half_life_steps": half_life,
        }

    def warnings(self) -> list[str]:
        """What is likely to go wrong with this plan, each with the value at fault and the way out."""
        return plan_warnings(self)

    def log_decay(self, start: float, end: float) -> float:
        """Log of the share of the average that is left between two clock positions; 0 if they are not in order."""
        if end <= start:
            return 0.0
        if self.scale_ema:
            return self._log_momentum(start, end)
        starts = self.borders[:-1]
        inside = starts[(starts >= start - DUST) & (starts < end - DUST)]
        return math.fsum(self._log_momentum(start, start) for start in inside.tolist())

    @property
    def idealised_speedup(self) -> float:
        """Reference steps per optimizer step: the gain in time if a step took as long at every batch."""
        return self.recipe.max_steps / len(self)

    @property
    def speedup_without_small_start(self) -> float:
        """What `idealised_speedup` would be if the whole run had the batch of its last stage."""
        return self._kappa(self.stages[-1])

    def to_dict(self) -> dict[str, Any]:
        """JSON-able summary: recipe, schedule, per-stage values, steps, warnings, idealised speed-up."""
        return {
            "recipe": asdict(self.recipe),
            "schedule": self.schedule.to_json(),
            "rule": self.rule.name,
            "scale_ema": self.scale_ema,
            "ema_update_every": self.ema_update_every,
            "ema_correction": self.ema_correction,
            "reference": self.reference_values(),
            "stages": self.stage_values(),
            "steps": len(self),
            "done_steps": self.done_steps,
            "idealised_speedup": self.idealised_speedup,
            "speedup_without_small_start": self.speedup_without_small_start,
            "warnings": self.warnings(),
        }

    def explain(self) -> str:
        """The plan as a plain-text table, one column per stage, followed by totals and warnings."""
        return plan_table(self)
