"""A plan as people read it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .plan import ScalingPlan

VALUE_LABELS = {
    "batch_size": "batch size ({unit})",
    "labelled": "  labelled ({unit})",
    "unlabelled": "  unlabelled ({unit})",
    "kappa": "kappa",
    "start": "from reference step",
    "end": "to reference step",
    "steps": "optimizer steps",
    "learning_rate": "peak learning rate",
    "betas": "betas",
    "alpha": "alpha",
    "eps": "eps",
    "weight_decay": "weight decay",
    "sgd_momentum": "optimizer momentum",
    "max_grad_norm": "clip norm",
    "momentum": "EMA momentum",
    "momentum_at_end": "EMA momentum at the end",
    "half_life_units": "EMA half-life ({unit})",
    "half_life_steps": "EMA half-life (optimizer steps)",
    "pl_ramp_steps": "pseudo-label ramp (optimizer steps)",
    "cache_steps": "label cache (optimizer steps)",
}


def plan_table(plan: ScalingPlan) -> str:
    """The plan as a plain-text table, one column per stage, followed by totals and warnings."""
    unit = plan.recipe.unit
    rows = value_rows(unit, plan.reference_values(), plan.stage_values())
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    template = "  ".join(f"{{:{'>' if index else '<'}{width}}}" for index, width in enumerate(widths))
    lines = [template.format(*row) for row in rows]
    without = plan.speedup_without_small_start
    smaller = any(stage.batch_size < plan.stages[-1].batch_size for stage in plan.stages)
    lost = f" ({without:.3g}x without the smaller batches before)" if smaller else ""
    lines.append(
        "\n"
        f"{len(plan)} optimizer steps for {plan.recipe.max_steps:g} reference steps "
        f"({plan.recipe.max_steps * plan.recipe.reference_batch_size:g} {unit}); idealised speed-up "
        f"{plan.idealised_speedup:.3g}x{lost}. Rule: {plan.rule.name}."
    )
    begun = plan.recipe.pl_start or 0.0
    events = (
        ("warm-up ends", plan.recipe.warmup_steps),
        ("the average starts", plan.recipe.ema_start),
        ("augmentation starts", plan.recipe.augment_start),
        ("pseudo-labels start", begun),
        ("pseudo-labels have full weight", plan.recipe.pl_ramp and begun + plan.recipe.pl_ramp),
        ("the label cache is full", plan.recipe.cache_steps and begun + plan.recipe.cache_steps),
    )
    reached = [f"{what} at {plan.step_at(clock)} ({clock:g})" for what, clock in events if clock]
    if reached:
        lines.append(f"In optimizer steps (reference steps): {'; '.join(reached)}.")
    if plan.recipe.pl_start is not None:
        kept = math.exp(plan.log_decay(plan.recipe.ema_start, plan.recipe.pl_start))
        lines.append(
            f"Pseudo-labels from reference step {plan.recipe.pl_start:g}; there the teacher holds {kept:.3g} of the "
            f"weights it had at {plan.recipe.ema_start:g}."
        )
    if not plan.scale_ema:
        lines.append("The EMA momentum is not scaled: it is applied once per optimizer step at every kappa.")
    if plan.recipe.momentum_schedule != "constant":
        lines.append(
            f"The EMA momentum follows a {plan.recipe.momentum_schedule} to 1 at the run's end; its rows are for the "
            "start of each stage where they do not say otherwise."
        )
    if plan.ema_update_every > 1:
        lines.append(
            f"The average moves every {plan.ema_update_every} optimizer steps, by the product of their momenta."
        )
    if plan.ema_correction == "path":
        lines.append("The average follows the weights along each step (path correction).")
    if plan.done_steps:
        reached = plan.borders[plan.done_steps]
        lines.append(f"{plan.done_steps} steps are already run and fixed, up to reference step {reached:g}.")
    return "\n".join([*lines, *(f"WARNING: {warning}" for warning in plan.warnings())])


def value_rows(unit: str, reference: Mapping[str, Any], stages: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Rows of a table of values: a head, then one row per value that any column has, its label first.

    Args:
        unit: of the recipe.
        reference: as `ScalingPlan.reference_values`, or what JSON makes of it.
        stages: as `ScalingPlan.stage_values`.
    """
    columns = [reference, *stages]
    rows = [["", "reference", *(f"stage {index}" for index in range(len(stages)))]]
    for key, label in VALUE_LABELS.items():
        cells = ["off" if column[key] is None else _format(column[key]) for column in columns]
        if key == "max_grad_norm" or set(cells) != {"off"}:
            rows.append([label.format(unit=unit), *cells])
    return rows


_COMPARED = {
    "kappa": "kappa",
    "batch_size": "batch ({unit})",
    "learning_rate": "peak lr",
    "momentum": "EMA momentum",
    "half_life_steps": "half-life (steps)",
    "steps": "steps",
    "speedup": "speed-up",
    "without": "without small start",
    "warnings": "warnings",
}


def comparison_table(plans: Sequence[ScalingPlan]) -> str:
    """Plans of one recipe side by side, one row each with the values of its last stage; then what each warns of."""
    rows = [[label.format(unit=plans[0].recipe.unit) for label in _COMPARED.values()]]
    notes: dict[str, list[str]] = {}
    for plan in plans:
        last = plan.stage_values()[-1] | {
            "steps": len(plan),
            "speedup": plan.idealised_speedup,
            "without": plan.speedup_without_small_start,
            "warnings": len(plan.warnings()),
        }
        rows.append([f"{last[key]:.4g}" if isinstance(last[key], float) else str(last[key]) for key in _COMPARED])
        for warning in plan.warnings():
            notes.setdefault(warning, []).append(f"{last['kappa']:g}")
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    lines += [f"WARNING (kappa {', '.join(kappas)}): {warning}" for warning, kappas in notes.items()]
    return "\n".join(lines)


def _format(value: float | Sequence[float]) -> str:
    return ", ".join(map(_format, value)) if isinstance(value, Sequence) else f"{value:.7g}"
