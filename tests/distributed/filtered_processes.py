"""What `test_filtered.py` runs on two gloo processes; each process writes what it saw to `<folder>/<rank>.pt`."""

from __future__ import annotations

import math
import os
import sys
from pathlib import Path
from typing import Any

import collapse_runs
import labelled_runs
import torch

from hf_ema_scaling.training import collapse
from hf_ema_scaling.training.collapse import CollapseError

PL = {
    "filters": {"confidence_quantile": {"share": 0.3, "momentum": 0.8}},
    "source_column": "origin",
    "hidden_reference_column": "truth",
    "calibration_rows": 5,
}


def run(folder: Path, **changes: Any) -> Any:
    values = {"save_strategy": "steps", "save_steps": 4, "kappa": 2.0, "eval_strategy": "steps", "eval_steps": 6}
    return labelled_runs.trainer(
        folder, pl=PL, more={"eval_dataset": labelled_runs.tiny.speech(4, 5)}, **(values | changes)
    )


def seen(made: Any) -> dict[str, Any]:
    counters = made.counters()
    return {
        "history": labelled_runs.history(made, ("pseudo/", "confidence/", "score/", "hidden/", "calibration/")),
        "ledger": made.ledger.to_dict(),
        "thresholds": counters["thresholds"],
        "weights": made.recorder.weights[-1],
    }


def collapsed(folder: Path, action: str) -> tuple[list[Any], list[Any], int]:
    """The alarms and pauses of a planted collapse, and the step it ended at."""
    # At the planted rate labelled rows alone end in one class at a time as well, and those rules would go on and on.
    collapse.LEAST_MINORITY = math.inf
    made = collapse_runs.trainer(folder, planted=True, pl={"on_collapse": action})
    try:
        made.train()
    except CollapseError as error:
        assert "The last good checkpoint is" in str(error)
    guard = made.collapse.guard
    return [clock for clock, _ in guard.alarms], guard.pauses, made.state.global_step


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    whole = run(folder / "whole")
    whole.train()
    resumed = run(folder / "resumed")
    resumed.train(resume_from_checkpoint=str(folder / "whole" / "checkpoint-5"))
    results = {"whole": seen(whole), "resumed": seen(resumed)}
    for action in ("stop", "rollback"):
        results[action] = collapsed(folder / action, action)
    torch.save(results, folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
