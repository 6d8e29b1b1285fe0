"""Does a recipe at another batch follow the one it came from? One recipe at several kappas, with and without the rule.

    python scripts/prepare_synthetic.py data/synthetic
    python scripts/kappa_sweep.py recipes/configs/sweep_speech_polyak.yaml --output_dir runs/sweep_polyak

For every seed, one run with each of

    rule        everything scaled ("How to Scale Your EMA", arXiv 2307.13813)
    unscaled    the optimizer by its rule, the momentum of the average not at all
    none        nothing scaled, at the largest kappa only
    spread      kappa 1 with other seeds for data, dropout and augmentation, twice
    dropout     kappa 1 with other dropout masks and nothing else

All share what comes before the recipe's `small_batch_until` (default: `pl_start`, where there is unlabelled data).
Runs are compared with `rule` at kappa 1 on the reference clock, from there on, by weights and by metrics, of student
and average. `output_dir` receives `sweep.md`, `sweep.csv`, `sweep.png`, and a folder per run. An interrupted sweep
goes on where it was; a finished run of another configuration is never replaced.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from hf_ema_scaling.recipe.config import read_mapping
from hf_ema_scaling.report import require_matplotlib
from hf_ema_scaling.sweep import compare, lay_out_sweep, run_sweep
from hf_ema_scaling.sweep.report import chosen_metric, measured, summary, write_report


def fail(message: str) -> typer.Exit:
    """Print why, and the exception that ends the program."""
    typer.secho(message, fg=typer.colors.RED, err=True)
    return typer.Exit(1)


def numbers(text: str, kind: Callable[[str], Any], option: str) -> list[Any]:
    """A comma-separated list."""
    try:
        return [kind(part) for part in text.split(",") if part.strip()]
    except ValueError as error:
        raise typer.BadParameter(f"comma-separated numbers are expected, got {text!r}", param_hint=option) from error


def main(
    recipe: Annotated[
        Path, typer.Argument(help="YAML file of a recipe, with max_steps, eval_steps, evaluation data.")
    ],
    output_dir: Annotated[Path, typer.Option("--output_dir", "--output-dir", help="Folder of the sweep.")],
    kappas: Annotated[str, typer.Option(help="Batches over the reference batch; 1 is always run.")] = "0.5,1,2,4,8",
    seeds: Annotated[str, typer.Option(help="One set of runs for each.")] = "0,1,2",
    small_batch_until: Annotated[
        float | None,
        typer.Option("--small_batch_until", "--small-batch-until", min=0.0, help="In the place of the recipe's."),
    ] = None,
    metric: Annotated[
        str | None, typer.Option(help="Metric of the curves, as in the log, e.g. eval_wer. Default: the loss.")
    ] = None,
    processes: Annotated[
        int | None, typer.Option(min=1, help="Runs at a time, one thread each; default: as many as cores.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of the report.")] = False,
) -> None:
    """Run a recipe at several kappas and report how far the runs part from the one at kappa 1."""
    try:
        settings = read_mapping(recipe) | (
            {} if small_batch_until is None else {"small_batch_until": small_batch_until}
        )
        jobs = lay_out_sweep(settings, numbers(kappas, float, "--kappas"), numbers(seeds, int, "--seeds"), output_dir)
        require_matplotlib()
        run_sweep(jobs, processes=processes)
        comparisons = compare(jobs)
        chosen = chosen_metric(metric, measured(comparisons))
        text = write_report(comparisons, output_dir, metric=chosen, title=f"{recipe.stem} against kappa")
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        raise fail(str(error)) from error
    typer.echo(json.dumps(summary(comparisons, chosen), allow_nan=False) if as_json else text)


if __name__ == "__main__":
    typer.run(main)
