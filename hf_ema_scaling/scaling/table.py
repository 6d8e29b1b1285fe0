"""A plan as people read it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .plan import ScalingPlan

_LABELS = {
    "batch_size": "batch size ({unit})",
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
    "half_life_units": "EMA half-life ({unit})",
    "half_life_steps": "EMA half-life (optimizer steps)",
}


def plan_table(plan: ScalingPlan) -> str:
    """The plan as a plain-text table, one column per stage, followed by totals and warnings."""
    unit = plan.recipe.unit
    columns = [plan.reference_values(), *plan.stage_values()]
    rows = [["", "reference", *(f"stage {index}" for index in range(len(plan.stages)))]]
    for key, label in _LABELS.items():
        cells = ["off" if column[key] is None else _format(column[key]) for column in columns]
        if key == "max_grad_norm" or set(cells) != {"off"}:
            rows.append([label.format(unit=unit), *cells])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    template = "  ".join(f"{{:{'>' if index else '<'}{width}}}" for index, width in enumerate(widths))
    lines = [template.format(*row) for row in rows]
    lines.append(
        "\n"
        f"{len(plan)} optimizer steps for {plan.recipe.max_steps:g} reference steps "
        f"({plan.recipe.max_steps * plan.recipe.reference_batch_size:g} {unit}); idealised speed-up "
        f"{plan.recipe.max_steps / len(plan):.3g}x. Rule: {plan.rule.name}."
    )
    if not plan.scale_ema:
        lines.append("The EMA momentum is not scaled: it is applied once per optimizer step at every kappa.")
    if plan.done_steps:
        reached = plan.borders[plan.done_steps]
        lines.append(f"{plan.done_steps} steps are already run and fixed, up to reference step {reached:g}.")
    return "\n".join([*lines, *(f"WARNING: {warning}" for warning in plan.warnings())])


def _format(value: float | tuple[float, ...]) -> str:
    return ", ".join(map(_format, value)) if isinstance(value, tuple) else f"{value:.7g}"
