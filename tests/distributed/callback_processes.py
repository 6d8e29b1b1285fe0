"""What `test_callback_ddp.py` runs on two gloo processes; each process writes what it saw to `<folder>/<rank>.pt`."""

from __future__ import annotations

import os
import shutil
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from stock_runs import Recorder, Sentences, arguments, bert, callback
from torch import nn
from transformers import Trainer, TrainerCallback
from transformers.trainer_jit_checkpoint import JITCheckpointCallback


class Preempted(TrainerCallback):
    """Every process is asked for a just-in-time checkpoint in step 5."""

    manager: Any = None

    def on_optimizer_step(self, _: Any, state: Any, *__: Any, **___: Any) -> None:
        if state.global_step == 4:
            self.manager.is_checkpoint_requested = True


class Normalised(nn.Module):
    """A model with batch statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.head = nn.BatchNorm1d(3), nn.Linear(3, 1)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": self.head(self.norm(x)).square().mean()}


def main(folder: Path) -> None:
    rank = int(os.environ["RANK"])
    settings: dict[str, Any] = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3}

    def run(name: str, averages: list[Any], *more: Any, resume: str | None = None, **changes: Any) -> Trainer:
        args = arguments(folder / name, **(settings | changes))
        made = Trainer(bert(), args, train_dataset=Sentences(), callbacks=[*averages, *more])
        for callback_ in made.callback_handler.callbacks:
            if isinstance(callback_, JITCheckpointCallback):
                next(x for x in more if isinstance(x, Preempted)).manager = callback_.jit_manager
        made.train(resume_from_checkpoint=resume)
        return made

    def tensors(average: Any) -> dict[str, torch.Tensor]:
        return {name: tensor.clone() for name, tensor in average.average.tensors().items()}

    seen: dict[str, Any] = {}
    slow, fast = callback(), callback(momentum=0.5, name="fast")
    recorder = Recorder(slow)
    start = {name: p.detach().clone() for name, p in bert().named_parameters()}
    made = run("whole", [slow, fast], recorder)
    seen["whole"] = {
        "kappa": slow.kappa,
        "start": start,
        "students": recorder.student,
        "averages": recorder.average,
        "slow": tensors(slow),
        "fast": tensors(fast),
    }
    slow.export(folder / "export")

    again = [callback(), callback(momentum=0.5, name="fast")]
    run("whole", again, resume=str(folder / "whole" / "checkpoint-3"), save_strategy="no")
    seen["resumed"] = {"slow": tensors(again[0]), "fast": tensors(again[1])}

    preempted, jit = callback(), Preempted()
    run("jit", [preempted], jit, enable_jit_checkpoint=True)
    made.accelerator.wait_for_everyone()
    resumed = callback()
    run("jit", [resumed], resume=str(folder / "jit" / "checkpoint-5"), save_strategy="no")
    seen["jit"] = {"stopped_at": preempted.global_step, "slow": tensors(resumed)}

    made.accelerator.wait_for_everyone()
    if rank == 0:
        shutil.rmtree(folder / "whole" / "checkpoint-3" / "ema")
    made.accelerator.wait_for_everyone()
    rebuilt = callback(on_missing_average="rebuild")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run("whole", [rebuilt], resume=str(folder / "whole" / "checkpoint-3"), save_strategy="no")
    seen["rebuilt"] = {"slow": tensors(rebuilt), "said": sum("is rebuilt" in str(w.message) for w in caught)}

    # Each process sees other rows, and so other statistics, until the next forward pass shares them.
    statistics = callback()
    args = arguments(folder / "batch_norm", max_steps=3, save_strategy="no")
    rows = [{"x": torch.randn(3, generator=torch.Generator().manual_seed(number)) * number} for number in range(48)]
    torch.manual_seed(0)
    Trainer(Normalised(), args, train_dataset=rows, callbacks=[statistics]).train()
    seen["batch_norm"] = tensors(statistics)
    torch.save(seen, folder / f"{rank}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
