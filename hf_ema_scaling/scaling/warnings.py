"""What is likely to go wrong with a plan."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from .momentum import half_life_from_momentum, log_momentum
from .optimizers import AdamRule, RMSpropRule

if TYPE_CHECKING:
    from .plan import ScalingPlan


def plan_warnings(plan: ScalingPlan) -> list[str]:
    """One text for each danger, with the value at fault and the way out."""
    found = _run_warnings(plan)
    for kappa in dict.fromkeys(stage.batch_size / plan.recipe.reference_batch_size for stage in plan.stages):
        found += _kappa_warnings(plan, kappa)
    return found


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
    if plan.log_decay(recipe.ema_start, recipe.max_steps) > math.log(0.5):
        half_life = half_life_from_momentum(recipe.ema_momentum, 1.0)
        found.append(
            f"the half-life of the average, {half_life:.4g} steps at ema_momentum={recipe.ema_momentum:g}, is "
            f"longer than the run ({recipe.max_steps - recipe.ema_start:g} reference steps from ema_start): the "
            "average stays mostly its start; lower ema_momentum or train longer"
        )
    return found


def _kappa_warnings(plan: ScalingPlan, kappa: float) -> list[str]:
    rho = plan.recipe.ema_momentum
    found = []
    if kappa < 1:
        found.append(
            f"kappa is {kappa:g}, below 1: batches are smaller than the one the recipe was tuned at, gradients "
            "are noisier and each update of the average is smaller; keep the average in fp32"
        )
    residual = kappa * (1 - rho)
    # At kappa 1 a step is a reference step, whatever rho is.
    if plan.scale_ema and kappa != 1 and residual > 0.1:
        strong = residual > 0.2
        found.append(
            f"{'strong warning: ' if strong else ''}kappa * (1 - ema_momentum) is {residual:.3g} at "
            f"kappa={kappa:g}, above {0.2 if strong else 0.1}: one step no longer stands for kappa steps of the "
            "average; lower kappa or raise ema_momentum"
        )
    log_rho = kappa * log_momentum(rho) if plan.scale_ema else log_momentum(rho)
    if log_rho < -1:
        found.append(
            f"the momentum of one step is {math.exp(log_rho):.3g} at kappa={kappa:g}, below 0.37: the average is "
            "the student within one step, and so is a teacher; lower kappa or raise ema_momentum"
        )
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
