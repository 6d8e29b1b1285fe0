"""What is likely to go wrong with a plan."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from .momentum import half_life_from_momentum, log_momentum
from .optimizers import AdamRule, RMSpropRule
from .schedule import DUST

if TYPE_CHECKING:
    from .plan import ScalingPlan
    from .schedule import ResolvedStage

# Weights of an update below this leave float32 averages standing where student and average differ by less than 0.3 to
# 0.6 per cent, which is what they differ by late in training.
_STALLING = 1e-5


def plan_warnings(plan: ScalingPlan) -> list[str]:
    """One text for each danger, with the value at fault and the way out."""
    found = _run_warnings(plan)
    seen: set[float] = set()
    for stage in plan.stages:
        # Momenta never fall, so the first stage of a kappa is the worst.
        if stage.batch_size not in seen:
            found += _stage_warnings(plan, stage)
        seen.add(stage.batch_size)
    return found


def stall_warnings(weight: float, dtype: str, what: str) -> list[str]:
    """Says whether an average in float32 loses updates of this weight, and which.

    An update is lost where `weight * |student - average|` is below half a unit in the last place of the average, which
    in float32 is between 3e-8 and 6e-8 of its value.

    Args:
        weight: `1 - rho**kappa` of an update.
        dtype: What the average is kept in.
        what: The update, for people.
    """
    if dtype != "float32" or not 0 < weight < _STALLING:
        return []
    return [
        f"{what} moves the average by {weight:.3g} of its distance from the student: float32 loses that for every "
        f"weight less than {2**-25 / weight:.1g} to {2**-24 / weight:.1g} of its size away, and the average lags; set "
        "ema_dtype='float64' (twice the memory of the average), ema_update_every above 1, or a larger batch"
    ]


def _run_warnings(plan: ScalingPlan) -> list[str]:
    recipe = plan.recipe
    found = []
    first = plan.stage_kappa[0]
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
        kept = math.exp(plan.log_decay(recipe.ema_start, recipe.pl_start))
        if kept > 0.05:
            found.append(
                f"at pl_start={recipe.pl_start:g} the teacher still holds {kept:.3g} of the weights it had at "
                f"ema_start={recipe.ema_start:g} (should be at most 0.05): start pseudo-labelling later, or lower "
                f"ema_momentum={recipe.ema_momentum:g}"
            )
        reached = recipe.pseudo_label_ramp().at(math.ceil(recipe.max_steps) - 1)
        if recipe.pl_start + recipe.pl_ramp > recipe.max_steps:
            found.append(
                f"pl_ramp={recipe.pl_ramp:g} from pl_start={recipe.pl_start:g} on ends after the run "
                f"(max_steps={recipe.max_steps:g}): the weight of pseudo-labels reaches {reached:.3g} of its value "
                "only; shorten pl_ramp"
            )
    found += [
        f"from reference step {start:g} on there are {ratio:.4g} unlabelled units per labelled one, in the recipe "
        f"{recipe.unlabelled_ratio:.4g}: the run no longer sees the recipe's data, so runs at other batches do not "
        "compare with it; state labelled and unlabelled sizes in the recipe's ratio, or batch_size"
        for start, ratio in plan.unlabelled_ratios
        if ratio != recipe.unlabelled_ratio
    ]
    if recipe.ema_start >= recipe.max_steps:
        found.append(
            f"ema_start={recipe.ema_start:g} is not before the end of the run (max_steps={recipe.max_steps:g}): the "
            "average is the student throughout"
        )
    elif plan.log_decay(recipe.ema_start, recipe.max_steps) > math.log(0.5):
        length = f"{recipe.max_steps - recipe.ema_start:g} reference steps from ema_start"
        if recipe.momentum_schedule == "constant":
            half_life = half_life_from_momentum(recipe.ema_momentum, 1.0)
            steps = "steps"
            if not plan.scale_ema:
                steps, length = (
                    "optimizer steps",
                    f"{len(plan) - plan.step_at(recipe.ema_start)} of them from ema_start",
                )
            reason = (
                f"the half-life of the average, {half_life:.4g} {steps} at ema_momentum={recipe.ema_momentum:g}, is "
                "longer than the run"
            )
        else:
            reason = (
                f"with a {recipe.momentum_schedule} from ema_momentum={recipe.ema_momentum:g} less than half of the "
                "average is replaced in the run"
            )
        found.append(f"{reason} ({length}): the average stays mostly its start; lower ema_momentum or train longer")
    return found


def _stage_warnings(plan: ScalingPlan, stage: ResolvedStage) -> list[str]:
    kappa = stage.batch_size / plan.recipe.reference_batch_size
    found = []
    if kappa > stage.end - stage.start > DUST * kappa:
        found.append(
            f"the stage from reference step {stage.start:g} to {stage.end:g} is shorter than one step of its batch "
            f"(kappa={kappa:g}): its only step is cut short; give it {kappa:g} reference steps or more, or drop it"
        )
        kappa = stage.end - stage.start
    if kappa < 1:
        found.append(
            f"kappa is {kappa:g}, below 1: batches are smaller than the one the recipe was tuned at, gradients "
            "are noisier and each update of the average is smaller; keep the average in fp32"
        )
    if plan.recipe.cache_steps and kappa > plan.recipe.cache_steps:
        found.append(
            f"a step of kappa={kappa:g} draws the whole label cache (cache_steps={plan.recipe.cache_steps:g}) more "
            "than once: it trains on labels that are made in it, where the recipe has older ones; lower kappa, or "
            "raise cache_steps"
        )
    log_rho = plan.average_momentum.log_at(math.floor(stage.start))
    every = plan.ema_update_every
    name = "ema_momentum" if plan.recipe.momentum_schedule == "constant" else f"momentum {math.exp(log_rho):.6g}"
    update, factors, more, way_out = "step", "kappa", "", "or set ema_correction='path'"
    if every > 1:
        update, factors, more = "update", "kappa * ema_update_every", f" and ema_update_every={every}"
        way_out = "or lower ema_update_every"
    residual = kappa * every * -math.expm1(log_rho)
    # A step of kappa 1 is a reference step, whatever rho is; the corrected update has no residual of first order.
    if plan.scale_ema and plan.ema_correction == "none" and kappa * every != 1 and residual > 0.1:
        strong = residual > 0.2
        found.append(
            f"{'strong warning: ' if strong else ''}{factors} * (1 - {name}) is {residual:.3g} at "
            f"kappa={kappa:g}{more}, above {0.2 if strong else 0.1}: one {update} no longer stands for "
            f"{factors} steps of the average; lower kappa, raise ema_momentum, {way_out}"
        )
    log_rho *= every * (kappa if plan.scale_ema else 1)
    if log_rho < -1:
        found.append(
            f"the momentum of one {update} is {math.exp(log_rho):.3g} at kappa={kappa:g}{more}, below 0.37: the "
            f"average is the student within one {update}, and so is a teacher; lower kappa or raise ema_momentum"
        )
    found += stall_warnings(-math.expm1(log_rho), plan.ema_dtype, f"one {update} at kappa={kappa:g}{more}")
    values = plan.recipe.optimizer_values(plan.rule)
    betas, alpha = values.betas, values.alpha
    if isinstance(plan.rule, AdamRule) and betas is not None and kappa * log_momentum(betas[1]) < -1:
        found.append(
            f"Adam's beta2={betas[1]:g} becomes {betas[1] ** kappa:.3g} at kappa={kappa:g}, below 0.37: second "
            "moments average less than one step; lower kappa"
        )
    if isinstance(plan.rule, RMSpropRule) and alpha is not None and kappa * log_momentum(alpha) < -1:
        found.append(
            f"RMSprop's alpha={alpha:g} becomes {alpha**kappa:.3g} at kappa={kappa:g}, below 0.37: the square average "
            "spans less than one step; lower kappa"
        )
    return found
