"""A training recipe as it was tuned, at the reference batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

from .momentum import check_below_one, check_not_negative, check_positive
from .momentum_schedule import MomentumSchedule, MomentumScheduleKind
from .optimizers import OptimizerValues, ScalingRule, known_rule
from .ramp import Ramp

__all__ = ["Recipe", "Unit"]

Unit = Literal["samples", "seconds", "tokens"]


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
        betas: Adam's decay rates.
        eps: Denominator offset of Adam, RMSprop or Adagrad.
        sgd_momentum: Momentum of SGD or RMSprop.
        alpha: Decay rate of RMSprop's square average.
        max_grad_norm: Clip norm; `None` or 0 for no clipping.
        warmup_steps: Linear warm-up, used when the plan is given no learning-rate schedule.
        ema_start: Before this step the average equals the student; in a shorter run, to its end.
        pl_start: Where pseudo-labelling starts; `None` without pseudo-labels. No optimizer step crosses it.
        unlabelled_ratio: Unlabelled units per labelled unit from `pl_start` on.
        steps_per_epoch: Needed only by stages that end after a number of epochs.
        pl_ramp: Reference steps over which the weight of pseudo-labels rises from 0 at `pl_start` to its value.
        cache_steps: Reference steps whose unlabelled items make up the pool of cached labels; 0 without a cache.
        augment_start: Where augmentation of the student's input begins.
        momentum_schedule: "constant", or "cosine" from `ema_momentum` at step 0 to 1 at `max_steps`.

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
    alpha: float = 0.99
    max_grad_norm: float | None = None
    warmup_steps: float = 0
    ema_start: float = 0
    pl_start: float | None = None
    unlabelled_ratio: float = 1.0
    steps_per_epoch: float | None = None
    momentum_schedule: MomentumScheduleKind = "constant"
    pl_ramp: float = 0
    cache_steps: float = 0
    augment_start: float = 0

    def __post_init__(self) -> None:
        if self.unit not in get_args(Unit):
            raise ValueError(f"unit must be one of {', '.join(get_args(Unit))}, got {self.unit!r}")
        check_positive("reference_batch_size", self.reference_batch_size)
        check_positive("max_steps", self.max_steps)
        check_below_one("ema_momentum", self.ema_momentum)
        check_not_negative("max_grad_norm", self.max_grad_norm or 0.0)
        check_not_negative("warmup_steps", self.warmup_steps)
        check_positive("unlabelled_ratio", self.unlabelled_ratio)
        if self.steps_per_epoch is not None:
            check_positive("steps_per_epoch", self.steps_per_epoch)
        check_not_negative("ema_start", self.ema_start)
        check_not_negative("augment_start", self.augment_start)
        if check_not_negative("pl_start", self.pl_start or 0.0) >= self.max_steps:
            raise ValueError(
                f"pl_start={self.pl_start:g} must be before the end of the run (max_steps={self.max_steps:g})"
            )
        for name in ("pl_ramp", "cache_steps"):
            if check_not_negative(name, getattr(self, name)) and self.pl_start is None:
                raise ValueError(f"{name}={getattr(self, name):g} is about pseudo-labels, but pl_start is None")
        if self.cache_steps and (self.pl_start or 0.0) + self.cache_steps >= self.max_steps:
            raise ValueError(
                f"cache_steps={self.cache_steps:g} from pl_start={self.pl_start:g} on reaches the end of the run "
                f"(max_steps={self.max_steps:g}): no label would ever come from the cache; lower cache_steps or set "
                "it to 0"
            )
        self.average_momentum()
        OptimizerValues(self.learning_rate, self.weight_decay, self.betas, self.eps, self.sgd_momentum, self.alpha)

    def optimizer_values(self, rule: ScalingRule | None = None) -> OptimizerValues:
        """Hyper-parameters at the reference batch and the peak learning rate, those that the optimizer has.

        Args:
            rule: Says what it has where no rule is known for the optimizer; without one that is only learning rate
                and weight decay.
        """
        rule = known_rule(self.optimizer) or rule
        stated: dict[str, Any] = {
            "betas": self.betas,
            "eps": self.eps,
            "momentum": self.sgd_momentum,
            "alpha": self.alpha,
        }
        has = () if rule is None else rule.hyper_parameters
        return OptimizerValues(self.learning_rate, self.weight_decay, **{name: stated[name] for name in has})

    def average_momentum(self) -> MomentumSchedule:
        """Momentum of the average at every reference step, `ema_start` aside."""
        return MomentumSchedule(self.ema_momentum, self.momentum_schedule, self.max_steps)

    def pseudo_label_ramp(self) -> Ramp:
        """Weight of pseudo-labels over their full weight, at every reference step."""
        return Ramp(self.pl_start or 0.0, self.pl_ramp)

    def warmup_multiplier(self, step: int) -> float:
        """Linear warm-up from 0 over `warmup_steps`, then 1."""
        return min(1.0, step / self.warmup_steps) if self.warmup_steps else 1.0
