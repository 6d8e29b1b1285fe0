"""From a recipe at the reference batch to the values of every optimizer step."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, get_args

from .momentum import (
    check_below_one,
    check_not_negative,
    check_positive,
    half_life_from_momentum,
    log_momentum,
    weight_from_log_momentum,
)
from .optimizers import AdamRule, OptimizerValues
from .optimizers import scaling_rule as find_rule
from .schedule import DUST, BatchSchedule, FloatArray, ResolvedStage, StepBorders, step_borders

__all__ = ["Recipe", "ScalingPlan", "StepValues"]

Unit = Literal["samples", "seconds", "tokens"]

_LABELS = {
    "batch_size": "batch size ({unit})",
    "kappa": "kappa",
    "start": "from reference step",
    "end": "to reference step",
    "steps": "optimizer steps",
    "learning_rate": "peak learning rate",
    "betas": "betas",
    "eps": "eps",
    "weight_decay": "weight decay",
    "sgd_momentum": "SGD momentum",
    "max_grad_norm": "clip norm",
    "momentum": "EMA momentum",
    "half_life_units": "EMA half-life ({unit})",
    "half_life_steps": "EMA half-life (optimizer steps)",
}


@dataclass(frozen=True)
class Recipe:
    """A training recipe as tuned at the reference batch. All steps are reference steps.

    Args:
        reference_batch_size: B, units per reference step over all processes.
        unit: What is counted: "samples", "seconds" of audio, or "tokens".
        max_steps: Length of the run.
        learning_rate: Peak learning rate.
        ema_momentum: Share rho of the average that one step keeps, in [0, 1).
        optimizer: A name that `scaling_rule` knows, unless the plan is given a rule.
        weight_decay: As the optimizer defines it.
        betas: Adam's decay rates; unused by SGD.
        eps: Adam's denominator offset; unused by SGD.
        sgd_momentum: SGD's momentum; unused by Adam.
        max_grad_norm: Clip norm; `None` or 0 for no clipping.
        warmup_steps: Linear warm-up, used when the plan is given no learning-rate schedule.
        ema_start: Before this step the average equals the student.
        pl_start: Where pseudo-labelling starts; `None` without pseudo-labels. No optimizer step crosses it.
        steps_per_epoch: Needed only by stages that end after a number of epochs.

    Raises:
        ValueError: If a value is outside its range.
    """

    reference_batch_size: float
    unit: Unit
    max_steps: float
    learning_rate: float
    ema_momentum: float
    optimizer: str = "adamw_torch"
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    sgd_momentum: float = 0.0
    max_grad_norm: float | None = None
    warmup_steps: float = 0
    ema_start: float = 0
    pl_start: float | None = None
    steps_per_epoch: float | None = None

    def __post_init__(self) -> None:
        if self.unit not in get_args(Unit):
            raise ValueError(f"unit must be one of {', '.join(get_args(Unit))}, got {self.unit!r}")
        check_positive("reference_batch_size", self.reference_batch_size)
        check_positive("max_steps", self.max_steps)
        check_below_one("ema_momentum", self.ema_momentum)
        check_not_negative("max_grad_norm", self.max_grad_norm or 0.0)
        check_not_negative("warmup_steps", self.warmup_steps)
        if self.steps_per_epoch is not None:
            check_positive("steps_per_epoch", self.steps_per_epoch)
        for name, value in (("ema_start", self.ema_start), ("pl_start", self.pl_start)):
            if check_not_negative(name, value or 0.0) >= self.max_steps:
                raise ValueError(f"{name}={value:g} must be before the end of the run (max_steps={self.max_steps:g})")
        OptimizerValues(self.learning_rate, self.weight_decay, self.betas, self.eps, self.sgd_momentum)

    def optimizer_values(self) -> OptimizerValues:
        """Hyper-parameters at the reference batch and the peak learning rate, as the optimizer's family has them."""
        if self.optimizer == "sgd":
            return OptimizerValues(self.learning_rate, self.weight_decay, momentum=self.sgd_momentum)
        return OptimizerValues(self.learning_rate, self.weight_decay, betas=self.betas, eps=self.eps)

    def warmup_multiplier(self, step: int) -> float:
        """Linear warm-up from 0 over `warmup_steps`, then 1."""
        return min(1.0, step / self.warmup_steps) if self.warmup_steps else 1.0


@dataclass(frozen=True)
class StepValues:
    """Nominal values of one optimizer step; `start` and `end` are clock positions, `momentum` is the average's."""

    start: float
    end: float
    kappa: float
    stage_kappa: float
    learning_rate: float
    weight_decay: float
    betas: tuple[float, float] | None
    eps: float | None
    sgd_momentum: float | None
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
        scale_ema: `False` applies rho once per optimizer step at every kappa, the baseline to compare the rule with.
        done: Steps already run, frozen; the schedule lays out the rest.

    Raises:
        ValueError: If the optimizer has no rule, the schedule does not fit the run, or a stage has impossible values.
    """

    def __init__(
        self,
        recipe: Recipe,
        schedule: BatchSchedule,
        *,
        lr_multiplier: Callable[[int], float] | None = None,
        scaling_rule: str | None = None,
        scale_ema: bool = True,
        done: StepBorders | None = None,
    ) -> None:
        self.recipe = recipe
        self.schedule = schedule
        self.rule = find_rule(recipe.optimizer if scaling_rule is None else scaling_rule)
        self.scale_ema = scale_ema
        self.done_steps = 0 if done is None else len(done)
        self.stages = schedule.resolve(recipe.max_steps, recipe.steps_per_epoch)
        cuts = () if recipe.pl_start is None else (recipe.pl_start,)
        self.step_borders = step_borders(self.stages, recipe.reference_batch_size, cuts, done)
        self._lr_multiplier = lr_multiplier or recipe.warmup_multiplier
        self._log_rho = log_momentum(recipe.ema_momentum)
        for stage in self.stages:
            self._at_peak(stage.batch_size / recipe.reference_batch_size)

    def __len__(self) -> int:
        return len(self.step_borders)

    @property
    def borders(self) -> FloatArray:
        """Nominal clock positions, shape (steps + 1,): step t covers `borders[t]` to `borders[t + 1]`."""
        return self.step_borders.borders

    @property
    def stage_kappa(self) -> FloatArray:
        """Nominal kappa of the stage of each step, shape (steps,)."""
        return self.step_borders.stage_kappa

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
            stage_kappa: Nominal kappa of the stage.
        """
        current = replace(reference, learning_rate=reference.learning_rate * self.lr_factor(start, end))
        return self.rule.scale(current, kappa=end - start, stage_kappa=stage_kappa)

    def log_momentum(self, start: float, end: float) -> float:
        """Log-momentum of the average for the step that covers a clock interval, `(end - start) * log(rho)`.

        Consecutive intervals add up, so every partition of the same data decays alike. `-inf` for an
        interval that starts before `ema_start`: the average is then the student.
        """
        if start < self.recipe.ema_start - DUST:
            return -math.inf
        return (end - start) * self._log_rho if self.scale_ema else self._log_rho

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
        reference = self.recipe.optimizer_values()
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
            max_grad_norm=self.max_grad_norm(end - start),
            momentum=math.exp(log_rho),
            ema_weight=weight_from_log_momentum(log_rho),
        )

    def stage_values(self) -> list[dict[str, Any]]:
        """Per stage: batch size, kappa, clock, optimizer steps, and the scaled values at the peak learning rate."""
        starts = self.borders[:-1]
        rows: list[dict[str, Any]] = []
        for stage in self.stages:
            kappa = stage.batch_size / self.recipe.reference_batch_size
            inside = (starts >= stage.start - DUST * kappa) & (starts < stage.end - DUST * kappa)
            rows.append(asdict(stage) | {"kappa": kappa, "steps": int(inside.sum())} | self._at_peak(kappa))
        return rows

    def reference_values(self) -> dict[str, Any]:
        """The same row for the reference batch."""
        row = asdict(ResolvedStage(0.0, self.recipe.max_steps, self.recipe.reference_batch_size))
        return row | {"kappa": 1.0, "steps": self.recipe.max_steps} | self._at_peak(1.0)

    def _at_peak(self, kappa: float) -> dict[str, Any]:
        values = self.rule.scale(self.recipe.optimizer_values(), kappa=kappa, stage_kappa=kappa)
        log_rho = self._log_rho * kappa if self.scale_ema else self._log_rho
        half_life = math.log(2.0) / -log_rho
        return asdict(values) | {
            "sgd_momentum": values.momentum,
            "max_grad_norm": self.max_grad_norm(kappa),
            "momentum": math.exp(log_rho),
            "half_life_units": half_life * kappa * self.recipe.reference_batch_size,
            "half_life_steps": half_life,
        }

    def warnings(self) -> list[str]:
        """What is likely to go wrong with this plan, each with the value at fault and the way out."""
        found = self._run_warnings()
        for kappa in dict.fromkeys(stage.batch_size / self.recipe.reference_batch_size for stage in self.stages):
            found += self._kappa_warnings(kappa)
        return found

    def _run_warnings(self) -> list[str]:
        recipe = self.recipe
        found = []
        first = self.stage_kappa[0]
        if first != 1:
            found.append(
                f"kappa is {first:g} from step 0: scaling rules are least accurate while gradients change fast; "
                "start at the reference batch (small_batch_until, or a first stage of the reference batch size)"
            )
        if recipe.pl_start is not None:
            if recipe.ema_start > recipe.pl_start:
                found.append(
                    f"ema_start={recipe.ema_start:g} lies after pl_start={recipe.pl_start:g}: until then the teacher "
                    "is the student itself; move ema_start to or before pl_start"
                )
            kept = math.exp(self._log_decay(recipe.ema_start, recipe.pl_start))
            if kept > 0.05:
                found.append(
                    f"at pl_start={recipe.pl_start:g} the teacher still holds {kept:.3g} of the weights it had at "
                    f"ema_start={recipe.ema_start:g} (should be at most 0.05): start pseudo-labelling later, or lower "
                    f"ema_momentum={recipe.ema_momentum:g}"
                )
        if self._log_decay(recipe.ema_start, recipe.max_steps) > math.log(0.5):
            half_life = half_life_from_momentum(recipe.ema_momentum, 1.0)
            found.append(
                f"the half-life of the average, {half_life:.4g} steps at ema_momentum={recipe.ema_momentum:g}, is "
                f"longer than the run ({recipe.max_steps - recipe.ema_start:g} reference steps from ema_start): the "
                "average stays mostly its start; lower ema_momentum or train longer"
            )
        return found

    def _log_decay(self, start: float, end: float) -> float:
        """Log of the share of the average that is left between two clock positions; 0 if they are not in order."""
        if end <= start:
            return 0.0
        if self.scale_ema:
            return (end - start) * self._log_rho
        starts = self.borders[:-1]
        return int(((starts >= start - DUST) & (starts < end - DUST)).sum()) * self._log_rho

    def _kappa_warnings(self, kappa: float) -> list[str]:
        rho = self.recipe.ema_momentum
        found = []
        if kappa < 1:
            found.append(
                f"kappa is {kappa:g}, below 1: batches are smaller than the one the recipe was tuned at, gradients "
                "are noisier and each update of the average is smaller; keep the average in fp32"
            )
        residual = kappa * (1 - rho)
        # At kappa 1 a step is a reference step, whatever rho is.
        if self.scale_ema and kappa != 1 and residual > 0.1:
            strong = residual > 0.2
            found.append(
                f"{'strong warning: ' if strong else ''}kappa * (1 - ema_momentum) is {residual:.3g} at "
                f"kappa={kappa:g}, above {0.2 if strong else 0.1}: one step no longer stands for kappa steps of the "
                "average; lower kappa or raise ema_momentum"
            )
        log_rho = kappa * self._log_rho if self.scale_ema else self._log_rho
        if log_rho < -1:
            found.append(
                f"the momentum of one step is {math.exp(log_rho):.3g} at kappa={kappa:g}, below 0.37: the average is "
                "the student within one step, and so is a teacher; lower kappa or raise ema_momentum"
            )
        betas = self.recipe.optimizer_values().betas
        if isinstance(self.rule, AdamRule) and betas is not None and kappa * log_momentum(betas[1]) < -1:
            found.append(
                f"Adam's beta2={betas[1]:g} becomes {betas[1] ** kappa:.3g} at kappa={kappa:g}, below 0.37: second "
                "moments average less than one step; lower kappa"
            )
        return found

    def to_dict(self) -> dict[str, Any]:
        """JSON-able summary: recipe, schedule, per-stage values, steps, warnings, idealised speed-up."""
        return {
            "recipe": asdict(self.recipe),
            "schedule": self.schedule.to_json(),
            "rule": self.rule.name,
            "scale_ema": self.scale_ema,
            "reference": self.reference_values(),
            "stages": self.stage_values(),
            "steps": len(self),
            "done_steps": self.done_steps,
            "ideal_speed_up": self.recipe.max_steps / len(self),
            "warnings": self.warnings(),
        }

    def explain(self) -> str:
        """The plan as a plain-text table, one column per stage, followed by totals and warnings."""
        unit = self.recipe.unit
        columns = [self.reference_values(), *self.stage_values()]
        rows = [["", "reference", *(f"stage {index}" for index in range(len(self.stages)))]]
        for key, label in _LABELS.items():
            cells = ["off" if column[key] is None else _format(column[key]) for column in columns]
            if key == "max_grad_norm" or set(cells) != {"off"}:
                rows.append([label.format(unit=unit), *cells])
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        template = "  ".join(f"{{:{'>' if index else '<'}{width}}}" for index, width in enumerate(widths))
        lines = [template.format(*row) for row in rows]
        lines.append(
            "\n"
            f"{len(self)} optimizer steps for {self.recipe.max_steps:g} reference steps "
            f"({self.recipe.max_steps * self.recipe.reference_batch_size:g} {unit}); idealised speed-up "
            f"{self.recipe.max_steps / len(self):.3g}x. Rule: {self.rule.name}."
        )
        if not self.scale_ema:
            lines.append("The EMA momentum is not scaled: it is applied once per optimizer step at every kappa.")
        if self.done_steps:
            reached = self.borders[self.done_steps]
            lines.append(f"{self.done_steps} steps are already run and fixed, up to reference step {reached:g}.")
        return "\n".join([*lines, *(f"WARNING: {warning}" for warning in self.warnings())])


def _format(value: float | tuple[float, ...]) -> str:
    return ", ".join(map(_format, value)) if isinstance(value, tuple) else f"{value:.7g}"
