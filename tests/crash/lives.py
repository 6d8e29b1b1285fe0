"""Imports once, then forks the processes of each training run: each is a fresh life that may end at any operation.

Reads one JSON command per line, answers with `{"pids": [...]}` and, when these have ended, `{"status": ...}`. Where
one of several processes fails or is killed, the others are killed.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import resource
import signal
import sys
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import launch
import other_lives
import tiny
import torch
import transformers
from accelerate.utils import other as accelerating
from torch import Tensor
from transformers import TrainerCallback

from hf_ema_scaling.ema import storage
from hf_ema_scaling.training.checkpoints import newest_complete_checkpoint

SCHEDULE = json.dumps([{"batch_size": 4, "until": 4}, {"batch_size": 8, "until": 9}, {"batch_size": 12}])
# Steps end at 1, 2, 3, 4 | 6, 8, 9 | 12, 15, 18, 20; those that cross an even number are saved.


class Points:
    """Counts the operations of this process on files, and ends it in the one with number `kill_at`.

    Before opening, renaming, creating and deleting; and after a file of tensors was written, of which `share` remains.
    """

    EVENTS = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir")

    def __init__(self, folder: Path, kill_at: int | None, share: float) -> None:
        self.folder, self.kill_at, self.share = str(folder), kill_at, share
        self.then_kill_at: int | None = None
        self.count = 0
        self.tensors: list[int] = []
        """Numbers of the points after files of tensors."""

    def install(self) -> None:
        sys.addaudithook(self._audit)
        torch.save = self._tearing(torch.save, 1)
        storage.save_file = self._tearing(storage.save_file, 1)
        modeling: Any = transformers.modeling_utils
        modeling.safe_save_file = self._tearing(modeling.safe_save_file, 1)
        accelerating.safe_save_file = self._tearing(accelerating.safe_save_file, 1)

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event in self.EVENTS and (event != "open" or self._inside(arguments[0])):
            self.count += 1
            if self.count == self.kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

    def _inside(self, path: Any) -> bool:
        return isinstance(path, (str, os.PathLike)) and os.fspath(path).startswith(self.folder)

    def _tearing(self, write: Any, position: int) -> Any:
        def torn(*arguments: Any, **more: Any) -> Any:
            result = write(*arguments, **more)
            self.count += 1
            self.tensors.append(self.count)
            if self.count == self.kill_at:
                path = arguments[position]
                os.truncate(path, int(self.share * os.path.getsize(path)))
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return torn


def augment(inputs: Mapping[str, Tensor], seeds: Sequence[int]) -> dict[str, Tensor]:
    features = inputs["input_features"]
    rows = [
        torch.randn(row.shape, generator=torch.Generator().manual_seed(s))
        for row, s in zip(features, seeds, strict=True)
    ]
    return {"input_features": features + 0.3 * torch.stack(rows)}


class Diary(TrainerCallback):
    """Writes down what each step drew; raises, limits files or asks to end in the steps where it is told to."""

    trainer: Any = None

    def __init__(self, path: Path, command: dict[str, Any]) -> None:
        self.path, self.command = path, command

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps([state.global_step + 1, self.trainer.drawn[-1]]) + "\n")

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step + 1 == self.command.get("limit_files_in"):
            other_lives.limit_files(self.command["limit"])
        if state.global_step + 1 == self.command.get("sigterm_in"):
            self._tell()

    def on_prediction_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.command.get("sigterm_in_evaluation_of"):
            self._tell()

    def _tell(self) -> None:
        if not self.command.get("to_group"):
            os.kill(os.getpid(), signal.SIGTERM)
            return
        workers = multiprocessing.active_children()
        print("WORKERS", len(workers), len({os.getpgid(worker.pid or 0) for worker in workers}), flush=True)
        assert os.getpgrp() == os.getpid()
        os.killpg(os.getpgrp(), signal.SIGTERM)


class Rows:
    """Rows in memory: reading them from a table costs more than training on them."""

    def __init__(self, table: datasets.Dataset) -> None:
        self.rows = [dict(row) for row in table]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return dict(self.rows[index])


DATA = {
    "train": Rows(tiny.speech(18, features=8)),
    "unlabelled": Rows(tiny.speech(22, 1, features=8, labels=False)),
    "eval": Rows(tiny.speech(4, 5, features=8)),
}


def trainer(folder: Path, command: dict[str, Any], *, init: int) -> Any:
    values = {
        "max_steps": 20,
        "learning_rate": 3e-3,
        "augment_start": 3,
        "per_device_train_batch_size": 3,
        "batch_schedule": SCHEDULE,
        "logging_strategy": "steps",
        "logging_steps": 5,
        "eval_strategy": "steps",
        "eval_steps": 7,
        "metric_for_best_model": "eval_ema_loss",
        "save_strategy": "steps",
        "save_steps": 2,
        "save_total_limit": 2,
    }
    args = tiny.arguments(folder, **values | command.get("arguments", {}))
    diary = Diary(folder.with_suffix(f".drawn{os.environ.get('RANK', '')}"), command)
    made = tiny.trainer(
        tiny.parakeet(dropout=0.1, seed=init),
        args,
        DATA["train"],
        unlabeled_dataset=DATA["unlabelled"],
        pseudo_label_args=tiny.pseudo(
            pl_start=2.0, unlabeled_ratio=2.0, min_confidence=0.15, cache_steps=3.0, cache_refresh=0.4
        ),
        augmentation=augment,
        eval_dataset=DATA["eval"],
        callbacks=[diary],
    )
    diary.trainer = made
    return made


def live(command: dict[str, Any]) -> None:
    folder, kind = Path(command["folder"]), command.get("kind", "trainer")
    points = Points(folder, command.get("kill_at"), command.get("share", 0.5))
    if kind == "overwriting":
        points.kill_at, points.then_kill_at = None, points.kill_at
    points.install()
    if kind == "trainer":
        trainers_life(folder, command)
    elif kind == "callback":
        other_lives.callback_life(folder, command)
    elif kind == "loop":
        other_lives.loop_life(folder)
    elif kind == "overwriting":
        other_lives.overwriting_life(folder, points)
    else:
        other_lives.loading_life(folder)
    print("ENDED", json.dumps({"points": points.count, "tensors": points.tensors}), flush=True)


def trainers_life(folder: Path, command: dict[str, Any]) -> None:
    """As a launcher does that may start a run again: resume if there is what to resume from, else start."""
    try:
        newest_complete_checkpoint(folder)
        resume = True
    except ValueError:
        resume = False
    # Whatever is not restored from the checkpoint is another here.
    seed = 99 if resume else 0
    random.seed(seed)
    torch.manual_seed(seed)
    made = trainer(folder, command, init=7 if resume else 0)
    if command.get("handler"):
        signal.signal(signal.SIGTERM, lambda *_: print("HANDLER", made.state.global_step, flush=True))
    whole = made._save_rng_state

    def save_rng_state(output_dir: str) -> None:
        whole(output_dir)
        if made.state.global_step == command.get("limit_before_commit_of"):
            other_lives.limit_files(100)  # Trainer's state is smaller than what is written before it
        if made.state.global_step == command.get("sigterm_while_saving"):
            os.kill(os.getpid(), signal.SIGTERM)

    made._save_rng_state = save_rng_state
    before = signal.getsignal(signal.SIGTERM)
    try:
        made.train(resume_from_checkpoint=resume)
    finally:
        assert signal.getsignal(signal.SIGTERM) is before


def fork(command: dict[str, Any], environment: dict[str, str]) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.environ.update(environment)
        if command.get("to_group"):
            os.setsid()
        suffix = f".log{environment.get('RANK', '')}"
        with Path(command["folder"]).with_suffix(suffix).open("a", encoding="utf-8") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
            live(command)
            code = 0
    except SystemExit as end:
        code = int(end.code or 0)
    except BaseException:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def processes(command: dict[str, Any]) -> list[int]:
    """Starts one process, or as many as are asked for, joined as by a launcher; only one has points to end at."""
    count = command.get("processes", 1)
    if count == 1:
        return [fork(command, {})]
    common = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(launch.free_port()),
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "ACCELERATE_USE_CPU": "true",
    }
    ended, others = command.get("rank", 0), {key: value for key, value in command.items() if key != "kill_at"}
    ranks = range(count)
    return [
        fork(command if rank == ended else others, common | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in ranks
    ]


def wait(pids: list[int]) -> int:
    """Until all have ended: the status of the first that did not end well, 0 if there was none."""
    left, status = set(pids), 0
    while left:
        pid, code = os.wait()
        left.discard(pid)
        if not status and (status := os.waitstatus_to_exitcode(code)):
            for other in left:
                os.kill(other, signal.SIGKILL)
    return status


def main() -> None:
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    for line in sys.stdin:
        pids = processes(json.loads(line))
        print(json.dumps({"pids": pids}), flush=True)
        print(json.dumps({"status": wait(pids)}), flush=True)


if __name__ == "__main__":
    main()
