"""What a Trainer needs to run on the reference clock and to own an average, put together.

Each part is a class of one idea, and Trainer's methods are overridden in these files alone:

    reference_run    what every step draws, and the values that it is taken with
    split_step       one step: micro-batches, losses, clipping
    averaged_steps   the average's update after it
    evaluation       scores of both weight sets; the best model
    saved_run        checkpoints and resuming
    mixin            beginning and ending a run, its log, the Hub
"""

from __future__ import annotations

import math
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from hf_ema_scaling.data.views import Augmentation
from hf_ema_scaling.training.arguments import EMATrainingArguments
from hf_ema_scaling.training.checkpoints import checkpoint_to_resume
from hf_ema_scaling.training.checks import LivenessWatch
from hf_ema_scaling.training.flow import AverageUpdate, ReferenceFlow
from hf_ema_scaling.training.losses import ExampleLoss
from hf_ema_scaling.training.progress import show_scaling
from hf_ema_scaling.training.publishing import push_checkpoint, push_trained
from hf_ema_scaling.training.records import KeepRecords
from hf_ema_scaling.training.run_state import run_state_to_resume
from hf_ema_scaling.training.saved_run import SavedRun
from hf_ema_scaling.training.scheduler import PlanScheduler
from hf_ema_scaling.training.sharded import refuse_resume
from hf_ema_scaling.training.signals import take_over_just_in_time
from hf_ema_scaling.training.tracking import scalar_logs

logger = logging.get_logger(__name__)


class EMATrainerMixin(SavedRun):
    """Trainer on the reference clock, with an average of its weights.

    `hyperparameter_search` may vary all of `EMATrainingArguments` (kappa, ema_momentum, learning_rate, ...), one at
    a time: each trial is the run that a new trainer with these arguments would make. Files of a run beside its
    checkpoints (`scaling_plan.json`, `ledger.json`) lie in `output_dir` and are those of the last trial.

    Args:
        example_loss: loss per example, for heads that the library does not know.
        augmentation: changes the student's inputs, of unlabelled rows and, with `augment_labelled`, of labelled ones;
            each row by a seed of its own.
        **kwargs: as for `Trainer`. Training data may be streams (`IterableDataset`), read in their own order.

    Raises:
        ValueError, TypeError, NotImplementedError: for what is not supported, with the reason and the way out.
    """

    push_in_progress: Any

    def __init__(
        self,
        model: PreTrainedModel | nn.Module | None = None,
        args: EMATrainingArguments | None = None,
        *,
        example_loss: ExampleLoss | None = None,
        augmentation: Augmentation | None = None,
        **kwargs: Any,
    ) -> None:
        if not isinstance(args, EMATrainingArguments):
            raise TypeError(f"args must be EMATrainingArguments, got {type(args).__name__}")
        super().__init__(model=model, args=args, example_loss=example_loss, augmentation=augmentation, **kwargs)
        self._logged_before = 0
        take_over_just_in_time(self)
        show_scaling(self)
        self.callback_handler.callbacks[:0] = [ReferenceFlow(self), AverageUpdate(self), self._sigterm]
        self.add_callback(KeepRecords(self))
        self.layout = self._lay_out(None) if self.train_dataset is not None else None

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As `Trainer.train`. On resume the steps done stay as they were; another kappa changes only what follows.

        `resume_from_checkpoint=True` takes the newest checkpoint that is complete. SIGTERM: see `StopOnSigterm`. After
        an error or Ctrl-C, `save_model(folder)` still writes student and average: those after the last step, for an
        error in an evaluation or in loading data; Ctrl-C may come in the midst of a step.
        """
        refuse_resume(self, resume_from_checkpoint)
        checkpoint = checkpoint_to_resume(self, resume_from_checkpoint)
        self._resumed = run_state_to_resume(checkpoint, rebuild=self.args.on_missing_average == "rebuild")
        self._student = None
        try:
            with self._sigterm.installed(self.args):
                return super().train(checkpoint, *args, **kwargs)
        finally:
            if isinstance(self.lr_scheduler, PlanScheduler):
                self.lr_scheduler.end()

    def begin_training(self) -> None:
        """At the start of `train()`: the average, the counters of the log, the liveness watch."""
        self._last_step = None
        self._begin_counts()
        if self.is_world_process_zero():
            for warning in self._laid_out().warnings():
                logger.warning(f"Plan: {warning}")
        if self._resumed is None:
            self.ensure_average()
            self.load_counters({})
        else:
            self._tr_loss += self._resumed.loss_of(self.accelerator.process_index, self.accelerator.num_processes)
            self._globalstep_last_logged = self._resumed.last_logged
            self.load_counters(self._resumed.counters)
        self._logged_before = self._globalstep_last_logged
        assert self.average is not None
        self._watch = LivenessWatch(self.average) if self.average.num_updates < LivenessWatch.UPDATES else None

    # ---- Log

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the reference clock to every log of a run, and the state of scaling to the training logs.

        Trackers, `log_history` and `trainer_state.json` get `scalar_logs` of it.
        """
        if self.is_in_train and self._last_step is not None:
            logs["clock/reference_step"] = self._last_step.end
            if "loss" in logs:
                logs.update(self.training_logs())
        super().log(scalar_logs(logs), start_time)

    def training_logs(self) -> dict[str, float]:
        """What a training log says beside loss, gradient norm and learning rate; called on every process."""
        assert self.average is not None and self._last_step is not None
        step, since = self._last_step, max(1, self.state.global_step - self._logged_before)
        self._logged_before = self.state.global_step
        clipped, self._clipped = self._clipped, 0
        return {
            "ema/momentum": math.exp(self.plan.log_momentum(step.start, step.end)),
            "ema/kappa": step.kappa,
            "ema/distance": self.average.distance(self.model),
            "batch/units": step.units,
            "clip/rate": clipped / since,
            **self._skips.logs(),
            **self._noise.logs(),
        }

    # ---- Hub

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """As `Trainer.push_to_hub`: one commit with student and average by `hub_weights`, plan, metrics and card.

        `details=CardDetails(...)` is what the card should say besides; `hf-ema-scaling push` does the same later.

        Raises:
            PushError: it did not reach the Hub; all is saved in `output_dir`, and the message says how to go on.
        """
        target = {"token": token, "revision": revision, "private": private}
        return push_trained(self, commit_message, blocking, kwargs, **target)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        push_checkpoint(self, checkpoint_folder)
