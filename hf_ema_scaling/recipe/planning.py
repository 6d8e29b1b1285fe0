"""The plan of a recipe, from its file or from flags, without its data."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from hf_ema_scaling.recipe.config import parse, read_mapping
from hf_ema_scaling.recipe.registry import kind_of_file
from hf_ema_scaling.scaling import ScalingPlan
from hf_ema_scaling.training.arguments import EMATrainingArguments, PseudoLabelArguments
from hf_ema_scaling.training.layout import plan_of
from hf_ema_scaling.training.run_state import optimizer_family


def plan_recipe(
    config: Path | None,
    argv: Sequence[str] = (),
    *,
    kappas: Sequence[float] = (),
    steps_per_epoch: float | None = None,
) -> list[ScalingPlan]:
    """Plans of a recipe, as its trainer would lay them out.

    Unlabelled data is part of the recipe where the file names some (`unlabelled`), or where there is no file and
    `pl_start` is given. Of the other arguments of the file's kind no plan depends on any.

    Args:
        config: YAML file of a recipe.
        argv: further arguments, `--name value`, which win.
        kappas: one plan for each, in the place of the batch that the recipe names; empty for that batch.
        steps_per_epoch: reference steps in one pass over the labelled set, for arguments that count epochs.

    Raises:
        ValueError: for arguments that are unknown or do not fit.
    """
    kinds = kind_of_file(config).arguments
    planned = [kind for kind in kinds if issubclass(kind, (EMATrainingArguments, PseudoLabelArguments))]
    others = {field.name for kind in kinds if kind not in planned for field in dataclasses.fields(kind)}
    file = [] if config is None else ["--config", str(config)]
    given = {} if config is None else read_mapping(config)
    rest, switched = _taken(argv, others)
    given |= switched
    starts = "pl_start" in given or any(word.partition("=")[0] == "--pl_start" for word in rest)
    pseudo_labels = given.get("unlabelled") not in (None, "null") if config is not None else starts
    # A plan is made wherever one thinks about it, not only where the run's precision and device are at hand.
    here = ["--use_cpu", "true", "--bf16", "false", "--fp16", "false", "--report_to", "none"]
    batches = [["--kappa", str(kappa), "--batch_size", "null", "--batch_schedule", "null"] for kappa in kappas]
    plans = []
    for batch in batches or [[]]:
        parsed = parse(planned, [*file, *rest, *batch, *here], ignored=others)
        args = next(found for found in parsed if isinstance(found, EMATrainingArguments))
        pseudo = next((found for found in parsed if isinstance(found, PseudoLabelArguments)), None)
        plans.append(
            plan_of(
                args,
                optimizer=optimizer_family(args.optim, None),
                pseudo=pseudo if pseudo_labels else None,
                steps_per_epoch=steps_per_epoch,
            )
        )
    return plans


def _taken(argv: Sequence[str], names: set[str]) -> tuple[list[str], dict[str, str]]:
    """`argv` without the arguments in `names`, and those by name."""
    rest: list[str] = []
    taken: dict[str, str] = {}
    words = iter(argv)
    for word in words:
        name, equals, value = word.removeprefix("--").partition("=")
        if word.startswith("--") and name in names:
            taken[name] = value if equals else next(words, "")
        else:
            rest.append(word)
    return rest, taken
