"""SIGTERM ends training only where that is wanted, and whatever was there before is put back."""

from __future__ import annotations

import multiprocessing
import signal
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import tiny
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from hf_ema_scaling.training.checkpoints import newest_complete_checkpoint
from hf_ema_scaling.training.run_state import read_run_state
from hf_ema_scaling.training.signals import StopOnSigterm, leave_to_parent


@pytest.fixture(autouse=True)
def before() -> Iterator[list[int]]:
    """What a handler of the user's is called with; a signal in a test must not end the tests."""
    called: list[int] = []
    old = signal.signal(signal.SIGTERM, lambda signum, frame: called.append(signum))
    yield called
    signal.signal(signal.SIGTERM, old)


class Terminate(TrainerCallback):
    """SIGTERM in the optimizer step with this number, as many times."""

    def __init__(self, step: int, times: int = 1) -> None:
        self.step, self.times = step, times
        self.handlers: list[Any] = []

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.handlers.append(signal.getsignal(signal.SIGTERM))
        if state.global_step + 1 == self.step:
            for _ in range(self.times):
                signal.raise_signal(signal.SIGTERM)


def run(folder: Path, *callbacks: TrainerCallback, **changes: Any) -> Any:
    values = {"max_steps": 6, "save_strategy": "steps", "save_steps": 4}
    args = tiny.arguments(folder, **values | changes)
    more = {"eval_dataset": tiny.sentences(4, 5)} if "eval_strategy" in changes else {}
    return tiny.trainer(tiny.bert(), args, tiny.sentences(30), callbacks=list(callbacks), **more)


def test_the_handler_is_there_during_training_only(tmp_path: Path, before: list[int]) -> None:
    ours = signal.getsignal(signal.SIGTERM)
    watch = Terminate(0)
    run(tmp_path, watch).train()
    assert ours not in watch.handlers and len(watch.handlers) == 6
    assert signal.getsignal(signal.SIGTERM) is ours and before == []

    class Fail(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            raise ArithmeticError

    with pytest.raises(ArithmeticError):
        run(tmp_path, Fail()).train()
    assert signal.getsignal(signal.SIGTERM) is ours


def test_one_checkpoint_whatever_the_number_of_signals(tmp_path: Path, before: list[int]) -> None:
    made = run(tmp_path, Terminate(3, times=3))
    made.train()
    assert made.state.global_step == 3 and before == [signal.SIGTERM]
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["checkpoint-3"]
    assert made.recorder.clocks("save") == [3]
    # The next train() is not told any more.
    made.train(resume_from_checkpoint=True)
    assert made.state.global_step == 6 and before == [signal.SIGTERM]


def test_a_signal_while_saving_needs_no_second_checkpoint(tmp_path: Path, before: list[int]) -> None:
    made = run(tmp_path)
    save = made._save_rng_state

    def told(output_dir: str) -> None:
        signal.raise_signal(signal.SIGTERM)
        save(output_dir)

    made._save_rng_state = told
    made.train()
    assert made.state.global_step == 4 and before == [signal.SIGTERM]
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["checkpoint-4"]
    assert made.recorder.clocks("save") == [4]


def test_nobody_elses_handler_means_the_exit_code_of_a_terminated_process(tmp_path: Path) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    made = run(tmp_path, Terminate(3))
    with pytest.raises(SystemExit) as end:
        made.train()
    assert end.value.code == 143 and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert newest_complete_checkpoint(tmp_path).name == "checkpoint-3"
    assert not made.is_in_train


def test_where_it_is_not_wanted_there_is_none(tmp_path: Path) -> None:
    ours = signal.getsignal(signal.SIGTERM)
    watch = Terminate(0)
    run(tmp_path, watch, max_steps=2, save_strategy="no").train()
    assert signal.getsignal(signal.SIGTERM) is ours and watch.handlers == [ours, ours]


# ---- Just-in-time checkpoints


def semi_supervised(folder: Path, *, init: int = 0, **changes: Any) -> Any:
    """Steps of several micro-batches, with dropout, labels in a cache and a path-corrected average."""
    values = {
        "max_steps": 14,
        "kappa": 2.0,  # in eight steps
        "learning_rate": 3e-3,
        "per_device_train_batch_size": 2,
        "ema_correction": "path",
        "logging_strategy": "steps",
        "logging_steps": 2,
        "eval_strategy": "steps",
        "eval_steps": 8,
    }
    return tiny.trainer(
        tiny.wav2vec2(dropout=0.1, seed=init),
        tiny.arguments(folder, **values | changes),
        tiny.speech(12),
        unlabeled_dataset=tiny.speech(12, 1, labels=False),
        pseudo_label_args=tiny.pseudo(pl_start=2.0, unlabeled_ratio=1.0, cache_steps=2.0, cache_refresh=0.5),
        labeler=tiny.ContentLabeler(),
        eval_dataset=tiny.speech(3, 2),
    )


def logs(made: Any) -> list[dict[str, float]]:
    timed = ("runtime", "per_second", "train_loss")
    entries = made.state.log_history
    return [{k: v for k, v in entry.items() if not any(word in k for word in timed)} for entry in entries]


@pytest.mark.parametrize("strategy", ["no", "steps"])
def test_a_just_in_time_checkpoint_in_the_midst_of_a_step_is_of_the_step_it_claims(
    tmp_path: Path, before: list[int], strategy: str
) -> None:
    whole = semi_supervised(tmp_path / "whole")
    whole.train()

    made = semi_supervised(tmp_path, enable_jit_checkpoint=True, save_strategy=strategy, save_steps=3)
    forward, seen = made.micro_batch_loss, []

    def told(*arguments: Any) -> torch.Tensor:
        seen.append(made.state.global_step)
        if seen.count(4) == 1:  # in the first micro-batch of the fifth step, after which an evaluation is due
            signal.raise_signal(signal.SIGTERM)
        return forward(*arguments)

    made.micro_batch_loss = told
    made.train()  # returns, as Trainer's own way does
    assert made.state.global_step == 5 and before == [] and seen.count(4) == 4
    saved = newest_complete_checkpoint(tmp_path)
    assert saved.name == "checkpoint-5"
    step = whole.recorder.averages[4], whole.recorder.weights[4]
    average, student = load_file(saved / "ema" / "model.safetensors"), load_file(saved / "model.safetensors")
    assert tiny.same_bits({name: average[name] for name in step[1]}, {name: step[0][name] for name in step[1]})
    assert tiny.same_bits({name: student[name] for name in step[1]}, step[1])
    assert read_run_state(saved).global_step == 5 and tiny.difference(step[1], {n: step[0][n] for n in step[1]}) > 1e-4

    resumed = semi_supervised(tmp_path, init=7)
    torch.manual_seed(99)
    resumed.train(resume_from_checkpoint=True)
    assert tiny.same_bits(tiny.average(resumed), tiny.average(whole))
    assert tiny.same_bits(tiny.parameters(resumed.model), tiny.parameters(whole.model))
    assert resumed.drawn == whole.drawn[5:] and logs(resumed) == logs(whole) and len(logs(whole)) == 10


def test_what_is_ignored_stays_ignored(tmp_path: Path) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    made = run(tmp_path, Terminate(3))
    made.train()
    assert made.state.global_step == 6 and signal.getsignal(signal.SIGTERM) is signal.SIG_IGN


def test_other_threads_train_without(tmp_path: Path) -> None:
    watch = Terminate(0)
    made = run(tmp_path, watch, max_steps=2)
    ours = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=made.train)
    thread.start()
    thread.join()
    assert made.state.global_step == 2 and watch.handlers == [ours, ours]


def test_with_save_strategy_best_the_next_step_that_evaluates_nothing_is_saved(
    tmp_path: Path, before: list[int]
) -> None:
    """There an evaluation decides whether to save, and would overrule the signal."""
    more = {"metric_for_best_model": "loss", "greater_is_better": True, "learning_rate": 1e-2}  # never a new best
    made = run(tmp_path, Terminate(4), save_strategy="best", eval_strategy="steps", eval_steps=2, **more)
    made.train()
    assert made.state.global_step == 5 and before == [signal.SIGTERM]
    assert newest_complete_checkpoint(tmp_path).name == "checkpoint-5"


def test_a_signal_after_the_last_step_is_passed_on(tmp_path: Path, before: list[int]) -> None:
    class AtTheEnd(TrainerCallback):
        def on_train_end(self, *_: Any, **__: Any) -> None:
            signal.raise_signal(signal.SIGTERM)

    made = run(tmp_path, AtTheEnd())
    made.train()
    assert made.state.global_step == 6 and before == [signal.SIGTERM]


@pytest.mark.skipif(not hasattr(signal, "sigwaitinfo"), reason="needs sigwaitinfo")
def test_workers_leave_the_signal_to_the_process_that_trains(tmp_path: Path, before: list[int]) -> None:
    """A scheduler sends it to every process there is."""

    class ToAll(TrainerCallback):
        workers: ClassVar[list[Any]] = []

        def on_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 2:
                self.workers.extend(multiprocessing.active_children())
                subprocess.run(["kill", "-TERM", *(str(worker.pid) for worker in self.workers)], check=True)
                signal.raise_signal(signal.SIGTERM)

    made = run(tmp_path, ToAll(), dataloader_num_workers=2, dataloader_prefetch_factor=1)
    made.train()
    assert made.state.global_step == 3 and before == [signal.SIGTERM] and len(ToAll.workers) == 2
    assert newest_complete_checkpoint(tmp_path).name == "checkpoint-3"
    # The parent's own SIGTERM still ends a worker.
    reader, writer = multiprocessing.Pipe(duplex=False)
    worker = multiprocessing.get_context("fork").Process(target=_shielded, args=(writer,), daemon=True)
    worker.start()
    assert reader.recv() == "ready"
    subprocess.run(["kill", "-TERM", str(worker.pid)], check=True)
    assert reader.recv() == "alive"
    worker.terminate()
    worker.join(60)
    assert worker.exitcode == 0


@pytest.mark.skipif(not hasattr(signal, "sigwaitinfo"), reason="needs sigwaitinfo")
@pytest.mark.parametrize("lasting", [False, True])
def test_workers_of_an_evaluation_leave_it_as_well(tmp_path: Path, before: list[int], lasting: bool) -> None:
    told: list[int] = []

    class InEvaluation(TrainerCallback):
        def on_prediction_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 2 and not told:
                told.extend(worker.pid for worker in multiprocessing.active_children() if worker.pid)
                subprocess.run(["kill", "-TERM", *map(str, told)], check=True)
                signal.raise_signal(signal.SIGTERM)

    more = {"dataloader_num_workers": 1, "eval_strategy": "steps", "eval_steps": 2, "per_device_eval_batch_size": 1}
    made = run(tmp_path, InEvaluation(), dataloader_persistent_workers=lasting, **more)
    if lasting:
        made.evaluate()  # its workers stay
    made.train()
    assert made.state.global_step == 2 and before == [signal.SIGTERM] and len(told) == 2
    assert {"eval_loss", "eval_ema_loss"} <= made.state.log_history[-2].keys()
    assert newest_complete_checkpoint(tmp_path).name == "checkpoint-2"


def _shielded(writer: Any) -> None:
    leave_to_parent(0)
    writer.send("ready")
    # The signal of another is consumed before the parent's comes.
    while signal.SIGTERM in signal.sigpending():
        pass
    writer.send("alive")
    threading.Event().wait()


class Others:
    """Another process that is told in the second of its steps."""

    device = torch.device("cpu")
    num_processes = 2

    def __init__(self) -> None:
        self.asked: list[int] = []

    def reduce(self, told: torch.Tensor) -> torch.Tensor:
        self.asked.append(int(told))
        return told + int(len(self.asked) == 2)


def test_processes_agree(tmp_path: Path, before: list[int]) -> None:
    made = run(tmp_path)
    others = Others()
    made._sigterm.accelerator = lambda: others
    made.train()
    # Asked after two steps and the save; then all is said.
    assert made.state.global_step == 2 and others.asked == [0, 0] and before == [signal.SIGTERM]
    assert newest_complete_checkpoint(tmp_path).name == "checkpoint-2"


def test_outside_of_training_nothing_is_asked(tmp_path: Path) -> None:
    others = Others()
    stop = StopOnSigterm(lambda: others)
    made = run(tmp_path)
    stop.on_evaluate(made.args, made.state, made.control)
    assert others.asked == []
