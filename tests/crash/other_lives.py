"""Lives of runs that are not a trainer of ours: `EMACallback` in a stock `Trainer`, and plain Accelerate loops."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import random
import resource
from pathlib import Path
from types import ModuleType
from typing import Any

import stock_runs
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback

from hf_ema_scaling import EMACallback, ReferenceClock, WeightAverage, register_average
from hf_ema_scaling.ema import AverageStateError

SCRIPT = Path(__file__).parents[2] / "scripts" / "accelerate_loop.py"


def digest(*tensors: Tensor) -> str:
    return hashlib.sha256(b"".join(tensor.detach().numpy().tobytes() for tensor in tensors)).hexdigest()[:16]


def write(path: Path, *entry: Any) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(entry) + "\n")


def seed(resumed: bool) -> None:
    # Whatever is not restored from the checkpoint is another here.
    random.seed(99 if resumed else 0)
    torch.manual_seed(99 if resumed else 0)


def limit_files(size: int) -> None:
    """Files can grow to `size` bytes; writing more fails as on a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


# ---- EMACallback


class Steps(TrainerCallback):
    """Writes down the rows that each optimizer step drew."""

    def __init__(self, path: Path, model: nn.Module) -> None:
        self.path = path
        self.rows: list[str] = []
        model.register_forward_pre_hook(self._note, with_kwargs=True)

    def _note(self, _: nn.Module, arguments: Any, inputs: dict[str, Any]) -> None:
        self.rows.append(digest(inputs["input_ids"], inputs["labels"]))

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        write(self.path, state.global_step + 1, self.rows)
        self.rows = []


class FullDisk(TrainerCallback):
    """Limits files in an optimizer step, or when Trainer has written its part of a checkpoint."""

    def __init__(self, command: dict[str, Any]) -> None:
        self.command = command

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step + 1 == self.command.get("limit_files_in"):
            limit_files(self.command["limit"])

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.command.get("limit_average_of"):
            limit_files(self.command["limit"])


def callback_life(folder: Path, command: dict[str, Any]) -> None:
    averages = [EMACallback(0.9, reference_batch_size=4)]
    if command.get("fast"):
        averages.append(EMACallback(0.5, reference_batch_size=4, name="fast"))
    checkpoint = averages[0].newest_checkpoint(folder, *averages[1:])
    seed(checkpoint is not None)
    model = stock_runs.bert()  # with dropout
    if checkpoint is not None:
        nn.init.normal_(model.classifier.weight)
    changes = {
        "max_steps": 20,
        "gradient_accumulation_steps": 2,
        "per_device_train_batch_size": 2,  # sixteen steps to an epoch
        "save_strategy": "steps",
        "save_steps": 3,
        "save_total_limit": command.get("keep", 2),
        "logging_strategy": "steps",
        "logging_steps": 1,  # Trainer forgets what it has not logged
        "lr_scheduler_type": "linear",
    }
    trainer = Trainer(
        model,
        stock_runs.arguments(folder, **changes),
        train_dataset=stock_runs.Sentences(),
        callbacks=[FullDisk(command), *averages, Steps(folder.with_suffix(".drawn"), model)],
    )
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))


# ---- scripts/accelerate_loop.py


def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("accelerate_loop", SCRIPT)
    assert spec is not None and spec.loader is not None
    module: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.PL_START, module.CONFIDENCE = 8, 0.0
    module.ROWS = 192  # three steps to an epoch, so checkpoints are in the midst of one
    return module


def loop_life(folder: Path) -> None:
    module: Any = script()
    resume = any(folder.glob("step-*"))
    begun = int(module.newest(folder).name.removeprefix("step-")) if resume else 0
    inner, steps = module.batch_loss, iter(range(begun + 1, 1000))

    def batch_loss(model: Any, teacher: Any, rows: Tensor, labels: Tensor) -> Tensor:
        loss: Tensor = inner(model, teacher, rows, labels)
        write(folder.with_suffix(".drawn"), next(steps), [digest(rows, labels), loss.item(), teacher is not None])
        return loss

    module.batch_loss = batch_loss
    seed(resume)
    module.main(folder, kappa=4, reference_steps=48, save_every=8, resume=resume, pseudo_labels=True, dropout=0.1)


# ---- register_average without any care for the folder


class Loop:
    def __init__(self, seed: int) -> None:
        torch.manual_seed(seed)
        self.accelerator = Accelerator(cpu=True)
        self.inner = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2))
        optimizer: Any = torch.optim.AdamW(self.inner.parameters(), lr=0.1)
        self.model, self.optimizer = self.accelerator.prepare(self.inner, optimizer)
        self.average, self.clock = WeightAverage(self.model), ReferenceClock(3)
        register_average(self.accelerator, self.model, self.average, self.clock)

    def steps(self, count: int) -> None:
        for _ in range(count):
            self.accelerator.backward(self.model(torch.randn(3, 4)).square().mean())
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.average.update(self.model, 0.9, self.clock.advance(3))

    def state(self) -> str:
        """Of all that a checkpoint holds: average, student, optimizer, clock, random numbers."""
        moments = [value for state in self.optimizer.state.values() for value in state.values()]
        tensors = [*self.average.tensors().values(), *self.inner.state_dict().values(), *moments]
        return f"{self.clock.units:g} {digest(*tensors, torch.randn(4))}"


def overwriting_life(folder: Path, points: Any) -> None:
    """Saves twice into one folder; the operations of the second save are counted."""
    loop = Loop(0)
    loop.steps(2)
    loop.accelerator.save_state(str(folder))
    loop.steps(1)
    points.count = 0
    points.tensors.clear()
    points.kill_at = points.then_kill_at
    loop.accelerator.save_state(str(folder))
    points.kill_at = None


def loading_life(folder: Path) -> None:
    """Says what the folder holds."""
    loop = Loop(1)
    loop.steps(1)
    try:
        loop.accelerator.load_state(str(folder))
    except AverageStateError as error:
        print("REFUSED", error, flush=True)
    else:
        print("LOADED", loop.state(), flush=True)
