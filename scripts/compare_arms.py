"""Pseudo-labels against labelled data alone: one recipe, several seeds, one table.

    python scripts/compare_arms.py runs/arms --config recipes/configs/minilm_vader.yaml
    python scripts/compare_arms.py runs/arms --config recipes/configs/minilm_vader.yaml --seeds 5 -- --max_steps 400

Runs the recipe for the seeds 0, 1, ... with its unlabelled data and without (`--unlabelled null`), each into a folder
of its own (`pseudo-0`, `labelled-0`, ...), and prints mean and standard deviation over the seeds, and of their pairs
the mean difference. Arguments behind `--` go to every run. A run whose `metrics.json` is there is not repeated, so the
program may be stopped and started again; `--first` and `--seeds` pick some of the runs. Weights are deleted after each
run unless `--keep-weights`.
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Annotated

import typer

from hf_ema_scaling.recipe import parse, run
from hf_ema_scaling.recipe.registry import kind_of_file

ARMS = {"labelled": ["--unlabelled", "null"], "pseudo": []}

Results = dict[str, dict[int, dict[str, float]]]
"""Metrics by arm and seed."""


def run_arm(config: Path, folder: Path, seed: int, arguments: list[str], keep_weights: bool) -> None:
    """One run of the recipe into `folder`, unless it is there."""
    if (folder / "metrics.json").is_file():
        return
    kind = kind_of_file(config)
    argv = ["--config", str(config), *arguments, "--seed", str(seed), "--output_dir", str(folder)]
    run(kind.build(*parse(kind.arguments, argv)))
    if not keep_weights:
        for file in folder.rglob("*.safetensors"):
            file.unlink()


def table(results: Results, metric: str) -> str:
    """Mean and standard deviation of a metric over the seeds, of student and average on every evaluation set.

    The last columns are of the pairs of runs that share a seed: the mean difference with its standard deviation, and
    in how many of them pseudo-labels have the larger value.

    Raises:
        ValueError: when no run has the metric.
    """
    found = [runs for runs in results["labelled"].values()] + [runs for runs in results["pseudo"].values()]
    keys = [key for key in dict.fromkeys(key for run in found for key in run) if key.endswith(f"_{metric}")]
    if not keys:
        raise ValueError(f"no run has the metric {metric!r}")
    lines = [f"{metric:24}" + "".join(f"  {name:>15}" for name in (*ARMS, "difference")) + "  larger"]
    both = sorted(results["labelled"].keys() & results["pseudo"].keys())
    for key in keys:
        name = key.removeprefix("eval_").removesuffix(metric).strip("_")
        weights = "average" if name == "ema" or name.startswith("ema_") else "student"
        label = f"{name.removeprefix('ema').strip('_')} {weights}".strip()
        columns = [[results[arm][seed][key] for seed in sorted(results[arm])] for arm in ARMS]
        pairs = [results["pseudo"][seed][key] - results["labelled"][seed][key] for seed in both]
        larger = sum(pair > 0 for pair in pairs)
        cells = [f"{statistics.fmean(c):.4f} ({_spread(c):.4f})" if c else "" for c in (*columns, pairs)]
        lines.append(f"{label:24}" + "".join(f"  {cell:>15}" for cell in cells) + f"  {larger} of {len(pairs)}")
    lines.append("mean (standard deviation) over the seeds " + ", ".join(map(str, both)))
    return "\n".join(lines)


def _spread(values: list[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


def read(output: Path) -> Results:
    """The metrics of all runs that are there."""
    results: Results = {}
    for arm in ARMS:
        files = {int(file.parent.name.partition("-")[2]): file for file in output.glob(f"{arm}-*/metrics.json")}
        results[arm] = {seed: json.loads(files[seed].read_text(encoding="utf-8")) for seed in sorted(files)}
    return results


def main(
    output: Annotated[Path, typer.Argument(help="Folder for the runs.")],
    config: Annotated[Path, typer.Option(help="YAML file of the recipe.", exists=True)],
    seeds: Annotated[int, typer.Option(help="How many seeds.", min=0)] = 5,
    first: Annotated[int, typer.Option(help="The first seed.", min=0)] = 0,
    metric: Annotated[str, typer.Option(help="What to compare.")] = "accuracy",
    keep_weights: Annotated[bool, typer.Option(help="Keep the models.")] = False,
    arguments: Annotated[list[str] | None, typer.Argument(help="Further arguments of the recipe, behind --.")] = None,
) -> None:
    """Run both arms of a recipe and compare them."""
    for seed in range(first, first + seeds):
        for arm, own in ARMS.items():
            run_arm(config, output / f"{arm}-{seed}", seed, [*(arguments or []), *own], keep_weights)
    typer.echo(table(read(output), metric))


if __name__ == "__main__":
    typer.run(main)
