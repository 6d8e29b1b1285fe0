"""What a run of the stock `Trainer` with an `EMACallback` writes down of itself, for its model card."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import TrainerState, TrainingArguments
from transformers.utils import logging

from hf_ema_scaling.hub.run_folder import METRICS_NAME, PLAN_NAME, RECORD_NAME
from hf_ema_scaling.scaling import BatchSchedule, Recipe, ScalingPlan, known_rule
from hf_ema_scaling.training.records import finite, logged_metrics, name_of, write_json
from hf_ema_scaling.training.run_record import own_record
from hf_ema_scaling.training.run_state import OPTIMIZER_FAMILIES

logger = logging.get_logger(__name__)

_OURS = {PLAN_NAME: "recipe", RECORD_NAME: "versions", METRICS_NAME: "optimizer_steps"}
"""A key by which a file is known to be one of this library's: a user's own of the same name stays."""


def stock_plan(
    args: TrainingArguments,
    optimizer: Any,
    *,
    steps: int,
    units: int,
    momentum: float,
    reference_batch_size: float,
    ema_start: float,
) -> dict[str, Any]:
    """The plan of a run at one batch size whose momentum alone is scaled, as `ScalingPlan.to_dict` says it.

    Args:
        args: of the Trainer.
        optimizer: of the run; its first param group is told.
        steps: optimizer steps of the run.
        units: samples per optimizer step.
        momentum: rho of one reference step.
        reference_batch_size: B, in samples.
        ema_start: in reference steps.

    Raises:
        ValueError: for values that no plan can have.
    """
    kappa = units / reference_batch_size
    group = optimizer.param_groups[0]
    kind = type(getattr(optimizer, "optimizer", optimizer))
    family = OPTIMIZER_FAMILIES.get(kind, kind.__name__)
    rule = known_rule(family)
    values: dict[str, Any] = {name: group[name] for name in (rule.hyper_parameters if rule else ()) if name in group}
    if "momentum" in values:
        values["sgd_momentum"] = float(values.pop("momentum"))
    recipe = Recipe(
        reference_batch_size=reference_batch_size,
        unit="samples",
        max_steps=steps * kappa,
        # Before the first step a scheduler with a warm-up has set it to 0.
        learning_rate=float(group.get("initial_lr", group["lr"])),
        ema_momentum=momentum,
        optimizer=family,
        weight_decay=float(group.get("weight_decay", 0.0)),
        max_grad_norm=args.max_grad_norm or None,
        warmup_steps=args.get_warmup_steps(steps) * kappa,
        ema_start=ema_start,
        **values,
    )
    plan = ScalingPlan(recipe, BatchSchedule.constant(units), scaling_rule="none").to_dict()
    # What a plan says of scaled learning rates and of stages does not bear on this run.
    warnings = [text for text in plan["warnings"] if "small_batch_until" not in text]
    if kappa != 1:
        warnings.append(
            f"kappa is {kappa:g}, and EMACallback scaled the momentum alone: learning rate and all else of the "
            "optimizer are those of the run's own batch"
        )
    return plan | {"warnings": warnings}


def write_stock_start(args: TrainingArguments, plan: dict[str, Any], **run: Any) -> None:
    """`scaling_plan.json` and `run.json` into `output_dir`.

    Args:
        args: of the Trainer.
        plan: of `stock_plan`.
        **run: what the callback is given: `model`, `train_dataloader`, `eval_dataloader`.
    """
    loaders = {"training": run.get("train_dataloader"), "evaluation": run.get("eval_dataloader")}
    data = {role: getattr(loader, "dataset", None) for role, loader in loaders.items()}
    _write(args, PLAN_NAME, plan)
    _write(args, RECORD_NAME, own_record(data, name_of(run.get("model")), args.world_size))


def write_stock_metrics(
    args: TrainingArguments, state: TrainerState, reference_steps: float, others: Mapping[int, bool]
) -> None:
    """`metrics.json` into `output_dir`: the last evaluation in the log, and the steps done.

    Args:
        args: of the Trainer.
        state: of the Trainer.
        reference_steps: length of the run.
        others: places in the log of evaluations that are not the student's; True for those of the average, whose
            metrics are then `eval_ema_*` whatever their prefix was, False for those of other weights.
    """
    history: list[Mapping[str, Any]] = list(state.log_history)
    for place, average in others.items():
        history[place] = {_of_average(key): value for key, value in history[place].items()} if average else {}
    metrics = logged_metrics(state, reference_steps, best=args.load_best_model_at_end, history=history)
    _write(args, METRICS_NAME, finite(metrics))


def _of_average(key: str) -> str:
    return key.replace("eval_", "eval_ema_", 1) if key.startswith("eval_") and "_ema_" not in key else key


def _write(args: TrainingArguments, name: str, content: dict[str, Any]) -> None:
    path = Path(str(args.output_dir)) / name
    if path.is_file():
        try:
            ours = _OURS[name] in json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, TypeError):
            ours = False
        if not ours:
            logger.warning(
                f"EMACallback leaves {path} as it is: another program wrote it. A model card will lack what this run "
                "would have put there."
            )
            return
    write_json(path.parent, name, content)
