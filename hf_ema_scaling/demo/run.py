"""All arms of the demo, side by side where there are cores, and what they show."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from hf_ema_scaling.data.synthetic import SyntheticCorpusConfig
from hf_ema_scaling.demo.arms import (
    ARMS,
    LABELLED_PHASE,
    ArmJob,
    ArmResult,
    DemoConfig,
    run_arm,
    run_labelled_phase,
)
from hf_ema_scaling.report import plot_runs, require_matplotlib
from hf_ema_scaling.training.process import peak_memory


def run_demo(
    output_dir: Path,
    *,
    arms: Iterable[str] = ("labelled", "pseudo"),
    kappa: float = 1.0,
    seed: int = 0,
    scale_ema: bool = True,
    config: DemoConfig | None = None,
    corpus: SyntheticCorpusConfig | None = None,
    processes: int | None = None,
) -> dict[str, Any]:
    """Runs the arms and returns the summary that `--json` prints.

    Three arms share corpus, seed, length and their labelled phase, from whose checkpoint they branch: `labelled` goes
    on with labelled data only, `pseudo` adds unlabelled data labelled by the teacher, `topline` adds it with its true
    labels.

    Args:
        output_dir: run folders, `report.png` and `summary.json`; replaced if it holds an earlier demo.
        arms: of `labelled`, `pseudo`, `topline`.
        kappa: batch over reference batch from the start of pseudo-labels on.
        seed: of corpus, initialisation, order, dropout and augmentation.
        scale_ema: False leaves the momentum unscaled, as an ablation.
        config: another recipe than the tuned one.
        corpus: another corpus than the one of about 7 + 45 + 6 minutes for this seed.
        processes: arms at a time, one thread each; by default as many as there are cores. Figures do not depend on it.

    Raises:
        ValueError: for an unknown arm.
        FileExistsError: when the output folder holds something else.
        ImportError: without the extras `demo` and `report`.
    """
    chosen = tuple(dict.fromkeys(arms))
    unknown = [arm for arm in chosen if arm not in ARMS]
    if unknown or not chosen:
        raise ValueError(f"arms are {', '.join(ARMS)}; got {', '.join(unknown) or 'none'}")
    config = config or DemoConfig()
    require_matplotlib()
    clear(output_dir)
    phase = ArmJob(
        name=LABELLED_PHASE,
        config=config,
        corpus=corpus or SyntheticCorpusConfig(seed=seed),
        cache=output_dir / "corpus",
        folder=output_dir / LABELLED_PHASE,
        kappa=kappa,
        seed=seed,
        scale_ema=scale_ema,
    )
    branch, shared = run_labelled_phase(phase)
    jobs = [
        replace(phase, name=name, folder=output_dir / name, branch=branch, row=row) for row, name in enumerate(chosen)
    ]
    results = dict(zip(chosen, _run(jobs, min(processes or os.cpu_count() or 1, len(jobs))), strict=True))
    figures: dict[str, dict[str, float]] = {
        name: {
            "student_wer": result.student_wer,
            "average_wer": result.average_wer,
            "seconds": round(shared + result.seconds, 1),
            "steps": result.steps,
        }
        for name, result in results.items()
    }
    summary = {
        "arms": figures,
        "gap_recovered": gap_recovered(figures),
        "kappa": kappa,
        "seed": seed,
        "peak_memory_bytes": max([peak_memory(), *(result.peak_memory_bytes for result in results.values())]),
    }
    (output_dir / "summary.json").write_text(
        json.dumps({**summary, "scale_ema": scale_ema, "recipe": asdict(config)}, indent=1) + "\n", encoding="utf-8"
    )
    title = f"Synthetic speech, kappa {kappa:g}, seed {seed}" + ("" if scale_ema else ", momentum not scaled")
    histories = {name: result.history for name, result in results.items()}
    plot_runs(histories, output_dir / "report.png", title=title, start=config.pl_start)
    return summary


def _run(jobs: list[ArmJob], processes: int) -> list[ArmResult]:
    if processes == 1:
        return [run_arm(job) for job in jobs]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(
        processes, mp_context=context, initializer=tqdm.set_lock, initargs=(context.RLock(),)
    ) as pool:
        return list(pool.map(run_arm, jobs))


def gap_recovered(results: dict[str, dict[str, float]]) -> float | None:
    """Share of the gap from `labelled` to `topline` that `pseudo` closes, for the averages.

    None without all three arms, or where true labels gain nothing (runs too short to learn).
    """
    if any(arm not in results for arm in ARMS):
        return None
    labelled, pseudo, topline = (results[arm]["average_wer"] for arm in ARMS)
    if labelled <= topline:
        return None
    return (labelled - pseudo) / (labelled - topline)


def table(summary: dict[str, Any]) -> str:
    """The summary as people read it."""
    lines = [f"{'arm':>9}  {'student WER':>11}  {'average WER':>11}  {'steps':>6}  {'seconds':>8}"]
    for arm, row in summary["arms"].items():
        lines.append(
            f"{arm:>9}  {row['student_wer']:>11.3f}  {row['average_wer']:>11.3f}  {row['steps']:>6}  "
            f"{row['seconds']:>8.0f}"
        )
    if summary["gap_recovered"] is not None:
        lines.append(f"pseudo-labels recover {summary['gap_recovered']:.0%} of the gap to true labels")
    elif {"labelled", "pseudo"} <= summary["arms"].keys():
        ratio = summary["arms"]["pseudo"]["average_wer"] / summary["arms"]["labelled"]["average_wer"]
        lines.append(f"error with pseudo-labels: {ratio:.2f} x that of labelled data only")
    memory = summary["peak_memory_bytes"] / 2**20
    lines.append(f"kappa {summary['kappa']:g}, seed {summary['seed']}, peak memory of a process {memory:.0f} MiB")
    return "\n".join(lines)


def clear(folder: Path) -> None:
    """Makes room for a new demo; refuses to touch anything that is not one."""
    if folder.exists() and any(folder.iterdir()):
        strangers = {entry.name for entry in folder.iterdir()} - {
            *ARMS,
            LABELLED_PHASE,
            "corpus",
            "report.png",
            "summary.json",
        }
        if strangers:
            raise FileExistsError(
                f"{folder} holds other things than a demo ({', '.join(sorted(strangers)[:5])}): choose another"
            )
        for name in (*ARMS, LABELLED_PHASE):
            shutil.rmtree(folder / name, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
