"""Runs what a sweep has not run yet, several at a time."""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from typing import Any

from tqdm.auto import tqdm
from transformers.trainer_callback import PrinterCallback

from hf_ema_scaling.recipe.config import parse
from hf_ema_scaling.recipe.registry import kind_of
from hf_ema_scaling.sweep.branch import branch_of
from hf_ema_scaling.sweep.jobs import PHASE, SweepJob
from hf_ema_scaling.sweep.trajectory import RESULT, TrajectoryRecorder, evaluated
from hf_ema_scaling.training.flow import StopAt
from hf_ema_scaling.training.process import prepare_process

DATA_KEYS = ("_items", "_sizes")
"""What the identity of a run says of its data."""

Done = Callable[[SweepJob, str | BaseException], None]


def run_sweep(jobs: Sequence[SweepJob], *, processes: int | None = None) -> int:
    """Trains every run that is not finished, one thread each; returns how many that were.

    A run is finished when its folder holds a `result.json`. What an interrupted run has left is removed and trained
    again. A bar and one line per run go to the terminal's error stream.

    Args:
        jobs: from `lay_out_sweep`.
        processes: runs at a time; by default as many as there are cores. Figures do not depend on it.

    Raises:
        FileExistsError: when a finished run had another configuration; nothing is trained then.
        RuntimeError: when runs failed, naming each with its error, once all others are done.
    """
    waiting = [job for job in jobs if not is_finished(job)]
    total = len(waiting)
    failed: dict[str, str] = {}
    with tqdm(total=total, desc="runs", disable=None) as bar:

        def done(job: SweepJob, outcome: str | BaseException) -> None:
            if isinstance(outcome, BaseException):
                outcome = failed[job.name] = f"{type(outcome).__name__}: {outcome}"
            bar.update()
            tqdm.write(f"{job.name}: {outcome}", file=sys.stderr)

        workers = min(processes or os.cpu_count() or 1, total)
        if workers <= 1:
            _run_here(waiting, done)
        else:
            _run_beside(waiting, workers, done)
    if failed:
        listed = "\n".join(f"  {name}: {error}" for name, error in failed.items())
        raise RuntimeError(
            f"{len(failed)} of {total} runs failed; the others are done and will not run again\n{listed}"
        )
    return total


def _ready(job: SweepJob) -> bool:
    return job.branch is None or (job.branch.folder / RESULT).is_file()


def _orphaned(job: SweepJob) -> RuntimeError:
    return RuntimeError(f"{'' if job.branch is None else job.branch.name} failed")


def _run_here(jobs: Sequence[SweepJob], done: Done) -> None:
    for job in jobs:
        try:
            done(job, run_job(job) if _ready(job) else _orphaned(job))
        except Exception as error:
            done(job, error)


def _run_beside(jobs: Sequence[SweepJob], workers: int, done: Done) -> None:
    context = multiprocessing.get_context("spawn")
    waiting, running = list(jobs), dict[Future[str], SweepJob]()
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        try:
            while waiting or running:
                ready = [job for job in waiting if _ready(job)]
                waiting = [job for job in waiting if job not in ready]
                running |= {pool.submit(run_job, job): job for job in ready}
                if not running:
                    for job in waiting:
                        done(job, _orphaned(job))
                    return
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    done(running.pop(future), future.exception() or future.result())
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def is_finished(job: SweepJob) -> bool:
    """Whether the run's folder holds its result.

    Raises:
        FileExistsError: when it holds the result of another configuration, with what differs.
    """
    path = job.folder / RESULT
    if not path.is_file():
        return False
    then = json.loads(path.read_text(encoding="utf-8"))
    if then["fingerprint"] == job.fingerprint:
        return True
    old, new = _flat(then["configuration"]), _flat(json.loads(json.dumps(job.configuration)))
    changed = [key for key in {**old, **new} if old.get(key) != new.get(key)]
    listed = ", ".join(f"{key}: {old.get(key)} then, {new.get(key)} now" for key in changed)
    raise FileExistsError(
        f"{job.folder} holds a run with another configuration ({listed}): choose another output_dir, or remove it"
    )


def _flat(values: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(values, dict):
        return {prefix: values}
    return {
        key: value
        for name, inner in values.items()
        for key, value in _flat(inner, f"{prefix}.{name}".lstrip(".")).items()
    }


def run_job(job: SweepJob) -> str:
    """Trains a run, in a folder made anew, and writes its result; returns a line about it."""
    prepare_process()
    shutil.rmtree(job.folder, ignore_errors=True)
    begun = time.time()
    trainer, result = (_phase if job.arm == PHASE else _trajectory)(job)
    result = {
        **{"arm": job.arm, "kappa": job.kappa, "seed": job.seed},
        **{"fingerprint": job.fingerprint, "configuration": job.configuration},
        **{"seconds": round(time.time() - begun, 1), "optimizer_steps": trainer.state.global_step},
        **result,
    }
    # The result is what says that the run is finished, so it appears at once and last.
    partial = job.folder / f"{RESULT}.partial"
    partial.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    partial.replace(job.folder / RESULT)
    ends = {key: values[-1] for key, values in result.get("metrics", {}).items() if values[-1] is not None}
    shown = [f"{key.removeprefix('eval_')} {ends[key]:.4g}" for key in ends if key.startswith("eval_ema_")]
    del trainer
    gc.collect()  # a trainer and its callbacks refer to each other
    return ", ".join([f"{result['seconds']:.0f} s", *shown])


def build(job: SweepJob) -> Any:
    """The trainer of a run, with no callbacks of its own yet."""
    path = job.write_recipe()
    kind = kind_of(job.settings)
    trainer = kind.build(*parse(kind.arguments, ["--config", str(path), "--output_dir", str(job.folder)]))
    trainer.pop_callback(PrinterCallback)
    return trainer


def _phase(job: SweepJob) -> tuple[Any, dict[str, Any]]:
    trainer = build(job)
    stop = StopAt(job.start)
    stop.trainer = trainer
    trainer.add_callback(stop)
    trainer.train()
    return trainer, {}


def _trajectory(job: SweepJob) -> tuple[Any, dict[str, Any]]:
    trainer = build(job)
    trainer.resume_random_state = not job.forks
    recorder = TrajectoryRecorder(job.folder, job.start)
    recorder.trainer = trainer
    trainer.add_callback(recorder)
    with branch_of(job) as branch:
        trainer.train(resume_from_checkpoint=branch)
    trainer.save_state()
    clock, metrics = evaluated(trainer.state.log_history, job.start)
    noise = [
        {key.partition("/")[2]: row[key] for key in ("clock/reference_step", "noise/scale", "noise/largest_kappa")}
        for row in trainer.state.log_history
        if "noise/scale" in row and row["clock/reference_step"] > job.start
    ]
    data = {key: value for key, value in trainer.layout.identity.items() if key.endswith(DATA_KEYS)}
    plan = {"warnings": trainer.layout.warnings(), "noise": noise}
    return trainer, {"clock": clock, "metrics": metrics, "data": data, **plan}
