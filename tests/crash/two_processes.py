"""What `test_two_processes.py` runs on two gloo processes; each writes what it saw to `<folder>/<rank>.pt`."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import tiny
import torch
from transformers import TrainerCallback

from hf_ema_scaling.training.checkpoints import IncompleteCheckpointError

STEPS = 6


class Told(TrainerCallback):
    """SIGTERM in the third step, in one process of the two."""

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 2 and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGTERM)


def run(folder: Path, *callbacks: TrainerCallback, init: int = 0) -> Any:
    args = tiny.arguments(
        folder,
        max_steps=STEPS,
        per_device_train_batch_size=1,
        save_strategy="steps",
        save_steps=2,
        save_total_limit=1,
        logging_strategy="steps",
        logging_steps=4,
    )
    return tiny.trainer(tiny.bert(dropout=0.1, seed=init), args, tiny.sentences(40), callbacks=list(callbacks))


def seen(made: Any) -> dict[str, Any]:
    return {
        "weights": tiny.parameters(made.model),
        "average": tiny.average(made),
        "drawn": made.drawn,
        "losses": [entry["loss"] for entry in made.state.log_history if "loss" in entry],
    }


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    results: dict[str, Any] = {}
    made = run(folder / "whole")
    made.train()
    results["whole"] = seen(made)

    made = run(folder / "told", Told())
    try:
        made.train()
    except SystemExit as end:
        results["code"] = end.code
    results["stopped"] = made.state.global_step

    if made.is_world_process_zero():
        (folder / "told" / "checkpoint-5").mkdir()  # as if a later save had been killed
    made.accelerator.wait_for_everyone()
    made = run(folder / "told", init=5)
    try:
        made.train(resume_from_checkpoint=str(folder / "told" / "checkpoint-5"))
    except IncompleteCheckpointError as error:
        results["refused"] = str(error)
    torch.manual_seed(99)
    made.train(resume_from_checkpoint=True)
    results["resumed"] = seen(made)
    torch.save(results, folder / f"{made.args.process_index}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
