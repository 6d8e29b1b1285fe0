"""One run of a recipe, from its plan to its results."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from hf_ema_scaling.hub.results import COLUMNS, KEY
from hf_ema_scaling.recipe.config import parse
from hf_ema_scaling.recipe.record import run_record
from hf_ema_scaling.training.mixin import EMATrainerMixin
from hf_ema_scaling.training.records import write_records


def main(arguments: Sequence[type], build: Callable[..., EMATrainerMixin]) -> None:
    """A recipe's program: arguments from its file and the command line, the trainer made of them, and its run.

    Args:
        arguments: data classes for `parse`.
        build: makes the trainer from one instance of each.

    Raises:
        SystemExit: with status 2 and one line for arguments that `parse` refuses.
    """
    try:
        parsed = parse(arguments)
    except ValueError as error:
        print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr)
        raise SystemExit(2) from error
    run(build(*parsed))


def run(trainer: EMATrainerMixin) -> dict[str, float]:
    """Trains, evaluates student and average, saves both, and pushes if asked to.

    Prints the plan before and a table after. `output_dir` then holds the student at its root, the average in `ema/`,
    `metrics.json`, `scaling_plan.json`, `run.json` (`recipe.record`) and `trainer_state.json`.
    `resume_from_checkpoint` is `true` for the last complete checkpoint in `output_dir`, or a path.

    Returns:
        What `metrics.json` holds.
    """
    args, main = trainer.args, trainer.is_world_process_zero()
    if main:
        print(trainer.plan.explain(), flush=True)
    trainer.run_record = run_record(sys.argv, trainer.accelerator.num_processes)
    resume = {"true": True, "false": None}.get(str(args.resume_from_checkpoint).lower(), args.resume_from_checkpoint)
    metrics: dict[str, float] = dict(trainer.train(resume).metrics)
    metrics["optimizer_steps"] = trainer.state.global_step
    metrics["reference_steps"] = trainer.plan.recipe.max_steps
    if trainer.eval_dataset is not None:
        metrics |= trainer.evaluate()
    if main:
        print(results_table(metrics), flush=True)
    trainer.save_state()
    trainer.save_model()
    if main:
        write_records(trainer, metrics)
    return metrics


def results_table(metrics: Mapping[str, float]) -> str:
    """The metrics of `COLUMNS` of student and average on every evaluation set, as people read them."""
    found = [match.groups(default="") for name in metrics if (match := KEY.fullmatch(name))]
    columns = [metric for metric in COLUMNS if any(metric == named for _, _, named in found)]
    widths = [max(7, len(COLUMNS[metric])) for metric in columns]
    lines = [
        " " * 24 + "".join(f"  {COLUMNS[metric]:>{width}}" for metric, width in zip(columns, widths, strict=True))
    ]
    for name in dict.fromkeys(name for _, name, _ in found):
        for weights, ema in (("student", ""), ("average", "ema_")):
            if not any((ema, name) == (of, on) for of, on, _ in found):
                continue
            cells = [metrics.get(f"eval_{ema}{name}{metric}", math.nan) for metric in columns]
            lines.append(
                f"{(name.strip('_') + ' ' + weights).strip():>24}"
                + "".join(f"  {cell:{width}.4f}" for cell, width in zip(cells, widths, strict=True))
            )
    seconds = metrics.get("train_runtime", math.nan)
    lines.append(f"{metrics.get('optimizer_steps', 0):g} optimizer steps, {seconds:.0f} s of training")
    return "\n".join(lines)
