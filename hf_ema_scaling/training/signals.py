"""SIGTERM, the word of schedulers and preemptible machines for "you have seconds left"."""

from __future__ import annotations

import functools
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_jit_checkpoint import CheckpointManager, JITCheckpointCallback
from transformers.trainer_utils import SaveStrategy
from transformers.utils import logging

logger = logging.get_logger(__name__)


def leave_to_parent(worker: int) -> None:
    """In a worker of a `DataLoader`: SIGTERM counts only when the parent sends it, to end its workers."""
    # torch's own handler in a worker also asks who sent it, and dies of all others'.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    # A fork server would be the parent to the system.
    parent = multiprocessing.parent_process()
    pid = os.getppid() if parent is None or parent.pid is None else parent.pid
    threading.Thread(target=_await_parents, args=(pid,), daemon=True).start()


def _await_parents(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)


def _leave_to_parent_and(before: Callable[[int], Any] | None, worker: int) -> None:
    leave_to_parent(worker)
    if before is not None:
        before(worker)


def _starts_workers(loader: Any) -> Any:
    return getattr(loader, "base_dataloader", loader)  # inside accelerate's wrapper


def shield_workers(loader: Any) -> None:
    """Lets the workers that a `DataLoader` will start survive SIGTERM, where Python can (Linux)."""
    inner = _starts_workers(loader)
    before = inner.worker_init_fn
    if hasattr(signal, "sigwaitinfo") and getattr(before, "func", None) is not _leave_to_parent_and:
        inner.worker_init_fn = functools.partial(_leave_to_parent_and, before)


def shield_evaluations(state: TrainerState) -> None:
    """Lets the workers of a stock Trainer's evaluations survive, where its own watch for SIGTERM is on.

    No event comes between the making of an evaluation's loader and the start of its workers, and callbacks are not
    told their trainer. Whoever handles the signal is: a trainer with `enable_jit_checkpoint`, from its construction
    on. Workers that an evaluation started before this call, and that stay, are not reached.

    Args:
        state: Of the trainer that is meant.
    """
    manager = getattr(signal.getsignal(signal.SIGTERM), "__self__", None)
    if not isinstance(manager, CheckpointManager) or manager.trainer.state is not state:
        return
    trainer = manager.trainer
    before = trainer.get_eval_dataloader
    if getattr(before, "func", None) is not _with_shielded_workers:
        trainer.get_eval_dataloader = functools.partial(_with_shielded_workers, before)


def _with_shielded_workers(before: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    loader = before(*args, **kwargs)
    if isinstance(_starts_workers(loader), DataLoader):
        shield_workers(loader)
    return loader


class StopOnSigterm(TrainerCallback):
    """On SIGTERM: finishes the optimizer step, saves a complete checkpoint, stops, and ends the process as told.

    What is due at that step comes first, an evaluation too: `train(resume_from_checkpoint=True)` then continues bit
    for bit. When the checkpoint is complete and `train()` has cleaned up, a handler that was installed before is
    called; without one `SystemExit(143)` is raised, as a shell reports a process ended by SIGTERM. Further signals
    in the meantime change nothing.

    With several processes one that was told suffices: all agree after every step, evaluation and save, at the cost of
    one reduction of a number. Where a scheduler sends SIGTERM to every process there is, the workers that load data
    for training and evaluations leave it to the process that trains (Linux). Workers that an `evaluate()` before
    training has left running (`dataloader_persistent_workers`) do so, too.

    With `enable_jit_checkpoint` the same happens in the place of Trainer's own way, with any `save_strategy`, and
    `train()` then returns as it does there, without a call or an exception. Trainer's way saves where a signal finds
    it: before an optimizer step, when labels, random numbers and half of a path-corrected update are already those of
    that step, or before the log and evaluation of the last; and each process at a moment of its own.

    Nothing is installed with `save_strategy="no"`, which keeps the signal's default; outside the main thread, where
    Python has no handlers; or where SIGTERM is ignored.

    Args:
        accelerator: Gives the trainer's, which a hyper-parameter search makes anew for each trial.
    """

    def __init__(self, accelerator: Callable[[], Any]) -> None:
        self.accelerator = accelerator
        self._active = False
        self._received = False
        self._agreed = False

    @contextmanager
    def installed(self, args: TrainingArguments) -> Iterator[None]:
        """Watches for SIGTERM inside a `with` block, and passes on one that came when the block ends.

        Raises:
            SystemExit: SIGTERM came, and nobody else handles it.
        """
        self._received = self._agreed = False
        self._active = args.save_strategy != SaveStrategy.NO or args.enable_jit_checkpoint
        previous = self._install() if self._active else None
        try:
            yield
        finally:
            self._active = False
            if previous is not None:
                signal.signal(signal.SIGTERM, previous)
        if (self._received or self._agreed) and not args.enable_jit_checkpoint:
            if callable(previous):
                previous(signal.SIGTERM, None)
            else:
                raise SystemExit(128 + signal.SIGTERM)

    @property
    def worker_init_fn(self) -> Callable[[int], None] | None:
        """For the workers of the training's `DataLoader`; they must not die of what the training survives."""
        return leave_to_parent if self._active and hasattr(signal, "sigwaitinfo") else None

    def shield(self, loader: Any) -> Any:
        """Lets the workers of an evaluation's `DataLoader` survive, too, and returns it."""
        inner = _starts_workers(loader)
        if self._active or (inner.num_workers > 0 and inner.persistent_workers):
            shield_workers(loader)
        return loader

    def _install(self) -> Callable[..., Any] | int | None:
        previous = signal.getsignal(signal.SIGTERM)
        # None: a handler that was not installed by Python, and could not be put back.
        if threading.current_thread() is not threading.main_thread() or previous in (None, signal.SIG_IGN):
            return None
        signal.signal(signal.SIGTERM, self._receive)
        return previous

    def _receive(self, signum: int, frame: Any) -> None:
        self._received = True

    def _told(self) -> bool:
        """Whether any process was told to stop; called by all of them at the same points."""
        if self._active and not self._agreed:
            accelerator = self.accelerator()
            told = torch.tensor(int(self._received), device=accelerator.device)
            self._agreed = bool(accelerator.reduce(told) if accelerator.num_processes > 1 else told)
            if self._agreed:
                logger.warning("SIGTERM: training saves a checkpoint and stops.")
        return self._agreed

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Save and stop, after what else is due."""
        # With "best" an evaluation decides whether to save; then the next step does.
        if self._told() and not (args.save_strategy == SaveStrategy.BEST and control.should_evaluate):
            control.should_save = control.should_training_stop = True

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Save and stop, when told during the evaluation."""
        if self._told() and args.save_strategy != SaveStrategy.BEST:
            control.should_save = control.should_training_stop = True

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Stop: there is a checkpoint now."""
        if self._told():
            control.should_training_stop = True


def take_over_just_in_time(trainer: Trainer) -> None:
    """Ends Trainer's own watch for SIGTERM (`enable_jit_checkpoint`); `StopOnSigterm` does it instead."""
    theirs = trainer.pop_callback(JITCheckpointCallback)
    if isinstance(theirs, JITCheckpointCallback) and theirs.jit_manager is not None:
        signal.signal(signal.SIGTERM, theirs.jit_manager._original_sigterm_handler)
