"""Arithmetic of batch-size scaling: momentum, optimizer rules, batch schedules, and the plan of a run."""

from .borders import Segment, StepBorders, step_borders
from .momentum import (
    PathWeights,
    ema_weight,
    half_life_from_momentum,
    log_momentum,
    momentum_from_epoch_weight,
    momentum_from_half_life,
    path_correction,
    scale_momentum,
    weight_from_log_momentum,
)
from .momentum_schedule import MomentumSchedule
from .noise import NoiseEstimate, NoiseScale, noise_estimate
from .optimizers import (
    AdagradRule,
    AdamRule,
    AdamWRule,
    OptimizerValues,
    RMSpropRule,
    ScalingRule,
    SGDRule,
    known_rule,
    register_scaling_rule,
    scaling_rule,
)
from .plan import ScalingPlan, StepValues
from .recipe import Recipe
from .schedule import BatchSchedule, ReferenceClock, ResolvedStage, Stage

__all__ = [
    "AdagradRule",
    "AdamRule",
    "AdamWRule",
    "BatchSchedule",
    "MomentumSchedule",
    "NoiseEstimate",
    "NoiseScale",
    "OptimizerValues",
    "PathWeights",
    "RMSpropRule",
    "Recipe",
    "ReferenceClock",
    "ResolvedStage",
    "SGDRule",
    "ScalingPlan",
    "ScalingRule",
    "Segment",
    "Stage",
    "StepBorders",
    "StepValues",
    "ema_weight",
    "half_life_from_momentum",
    "known_rule",
    "log_momentum",
    "momentum_from_epoch_weight",
    "momentum_from_half_life",
    "noise_estimate",
    "path_correction",
    "register_scaling_rule",
    "scale_momentum",
    "scaling_rule",
    "step_borders",
    "weight_from_log_momentum",
]
