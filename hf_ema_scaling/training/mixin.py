"""What a Trainer needs to run on the reference clock and to own an average; only this file overrides its internals."""

from __future__ import annotations

import contextlib
import copy
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel
from transformers.trainer_callback import DefaultFlowCallback
from transformers.utils import logging

from hf_ema_scaling.data.collator import CTCCollator, MicroBatch, MicroBatchCollator, TwoSourceDataset
from hf_ema_scaling.data.sampler import SampledStep, ScheduledBatchSampler
from hf_ema_scaling.data.views import Augmentation, changes_length
from hf_ema_scaling.ema import WeightAverage, gathered, load_average, save_average, unwrap
from hf_ema_scaling.ema.adapter_storage import load_added_adapter
from hf_ema_scaling.ema.skipped import SkipWatch
from hf_ema_scaling.labels.decoder import with_decoder_inputs
from hf_ema_scaling.scaling import OptimizerValues, ScalingPlan
from hf_ema_scaling.training.arguments import EMATrainingArguments, PseudoLabelArguments
from hf_ema_scaling.training.augment import augment, keep_fitting, refuse_augmentation
from hf_ema_scaling.training.average_update import AverageMover, new_average
from hf_ema_scaling.training.checkpoints import checkpoint_to_resume, committed, restored_average
from hf_ema_scaling.training.checks import (
    LivenessWatch,
    batch_statistics_of,
    check_ctc_setup,
    check_labelled,
    frozen_statistics,
    has_batch_statistics,
    nonfinite_gradient,
    refuse_unsupported,
    share_statistics,
)
from hf_ema_scaling.training.evaluation import BothWeightsEvaluation
from hf_ema_scaling.training.flow import AverageUpdate, ReferenceFlow
from hf_ema_scaling.training.layout import RunLayout, lay_out
from hf_ema_scaling.training.losses import ExampleLoss, cap_losses, is_ctc, loss_for
from hf_ema_scaling.training.noise import NoiseMeter
from hf_ema_scaling.training.optimizer_values import hyper_parameters, reference_values
from hf_ema_scaling.training.progress import show_scaling
from hf_ema_scaling.training.publishing import push_checkpoint, push_trained
from hf_ema_scaling.training.run_state import RunState, optimizer_family, run_state_to_resume
from hf_ema_scaling.training.scheduler import PlanScheduler
from hf_ema_scaling.training.sharded import check_optimizer_state, refuse_resume, without_sync
from hf_ema_scaling.training.signals import StopOnSigterm, take_over_just_in_time
from hf_ema_scaling.training.stock import learns
from hf_ema_scaling.training.streaming import save_places, stream_loader
from hf_ema_scaling.training.student_files import student_checksums
from hf_ema_scaling.training.tracking import scalar_logs

logger = logging.get_logger(__name__)


class EMATrainerMixin(BothWeightsEvaluation):
    """Trainer on the reference clock, with an average of its weights.

    Args:
        example_loss: loss per example, for heads that the library does not know.
        augmentation: changes the student's inputs, of labelled and unlabelled rows; each row by a seed of its own.
        **kwargs: as for `Trainer`. Training data may be streams (`IterableDataset`), read in their own order.

    Raises:
        ValueError, TypeError, NotImplementedError: for what is not supported, with the reason and the way out.
    """

    lr_scheduler: Any
    optimizer: Any
    push_in_progress: Any
    resume_random_state = True
    """Whether a resumed run draws the dropout masks of the run that was interrupted; False draws others."""

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
        super().__init__(model=model, args=args, **kwargs)
        refuse_unsupported(self)
        if "labels" not in self.label_names:
            # The loss needs them, whether or not the model's forward names them.
            self.label_names = [*self.label_names, "labels"]
        self.example_loss = example_loss or loss_for(self.model)
        refuse_augmentation(augmentation, self.model)
        self.augmentation = augmentation
        self.average: WeightAverage | None = None
        self.ctc = is_ctc(self.model)
        if self.ctc:
            check_ctc_setup(self.model, self.processing_class, kwargs.get("data_collator"))
        if self.ctc and kwargs.get("data_collator") is None:
            self.data_collator = CTCCollator.from_processor(self.processing_class)
        self.batch_statistics = has_batch_statistics(self.model)
        self._optimizer_family = optimizer_family(args.optim, self.optimizer)
        self._has = hyper_parameters(self._optimizer_family, args.scaling_rule)
        self._given = None if self.optimizer is None else reference_values(self.optimizer.param_groups[0], self._has)
        self._reference: list[OptimizerValues] | None = None
        self._resumed: RunState | None = None
        self._watch: LivenessWatch | None = None
        self._skipped = False
        self._skip_watch = SkipWatch()
        self._statistics: list[tuple[Tensor, Tensor]] = []
        self._student: WeightAverage | None = None
        self._mover = AverageMover()
        self._noise = NoiseMeter(args.noise_scale_every, args.reference_batch_size or 1.0, self.accelerator)
        self._clipped = 0
        self._logged_before = 0
        self._last_step: SampledStep | None = None
        self._places: str | None = None
        self._sigterm = StopOnSigterm(self.accelerator)
        self.pop_callback(DefaultFlowCallback)
        take_over_just_in_time(self)
        show_scaling(self)
        self.callback_handler.callbacks[:0] = [ReferenceFlow(self), AverageUpdate(self), self._sigterm]
        self.layout: RunLayout | None = self._lay_out(None) if self.train_dataset is not None else None

    # ---- What the run consists of

    def unlabelled_data(self) -> tuple[Any | None, PseudoLabelArguments | None]:
        """The unlabelled data set and its arguments; none here."""
        return None, None

    @property
    def plan(self) -> ScalingPlan:
        """The values of every step."""
        return self._laid_out().plan

    @property
    def sampler(self) -> ScheduledBatchSampler:
        """What every step draws."""
        return self._laid_out().sampler

    def _laid_out(self) -> RunLayout:
        if self.layout is None:
            raise ValueError("there is no run without a train_dataset")
        return self.layout

    def _lay_out(self, resumed: RunState | None) -> RunLayout:
        unlabelled, pseudo = self.unlabelled_data()
        return lay_out(
            self.args,
            self.train_dataset,
            optimizer=self._optimizer_family,
            given=self._given,
            unlabelled=unlabelled,
            pseudo=pseudo,
            world_size=self.accelerator.num_processes,
            batch_statistics=self.batch_statistics,
            resumed=resumed,
        )

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

    def get_train_dataloader(self) -> DataLoader:
        """One batch per optimizer step and process: a list of micro-batches, left on the CPU."""
        if self.train_dataset is None:
            raise ValueError("training needs a train_dataset")
        self.layout = self._lay_out(self._resumed)
        if self._resumed is not None:
            changed = self._resumed.changed_values(asdict(self.plan.recipe))
            if changed:
                listed = ", ".join(f"{key} {then} then, {now} now" for key, (then, now) in changed.items())
                logger.warning(f"The recipe is another from here on than before the checkpoint: {listed}.")
        dataset = self.run_dataset()
        self._places = None
        if (streamed := stream_loader(self, dataset)) is not None:
            return streamed
        workers = self.args.dataloader_num_workers
        loader = DataLoader(
            dataset,
            batch_sampler=self.sampler,
            collate_fn=MicroBatchCollator(self.data_collator),
            num_workers=workers,
            worker_init_fn=self._sigterm.worker_init_fn,
            pin_memory=self.args.dataloader_pin_memory,
            persistent_workers=self.args.dataloader_persistent_workers,
            prefetch_factor=self.args.dataloader_prefetch_factor,
        )
        return self.accelerator.prepare_data_loader(loader, device_placement=False)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """As Trainer; while it trains, the workers leave SIGTERM to this process."""
        return self._sigterm.shield(super().get_eval_dataloader(eval_dataset))

    def run_dataset(self) -> TwoSourceDataset:
        """The rows of the run by `Draw`, without the columns that nobody takes."""
        unlabelled, _ = self.unlabelled_data()
        keep = None
        if self.args.remove_unused_columns:
            self._set_signature_columns_if_needed()
            keep = self._signature_columns
        return TwoSourceDataset(self.train_dataset, unlabelled, keep=keep, for_labeler=self.columns_for_labeler())

    def columns_for_labeler(self) -> tuple[str, ...]:
        """Columns of unlabelled data that its labeler takes beside the model's inputs; none here."""
        return ()

    def set_initial_training_values(self, args: Any, dataloader: DataLoader) -> Any:
        """Trainer's counts, with the number of optimizer steps in the place of the recipe's reference steps."""
        run = copy.copy(args)
        run.max_steps = len(dataloader)
        values = list(super().set_initial_training_values(run, dataloader))
        values[3] = len(self.sampler.stream)  # num_train_samples
        return tuple(values)

    def create_optimizer(self, model: nn.Module | None = None) -> Any:
        """As Trainer; notes the values of each param group as those of the reference batch."""
        created = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if created or self._reference is None:
            self._reference = [reference_values(group, self._has) for group in optimizer.param_groups]
        return optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any | None = None) -> Any:
        """The plan's values in the place of a learning-rate scheduler."""
        assert self._reference is not None
        before = self.lr_scheduler
        self.lr_scheduler = PlanScheduler(self.plan, optimizer or self.optimizer, self._reference)
        if isinstance(before, PlanScheduler) and self.optimizer.state:
            self.lr_scheduler.load_state_dict(before.state_dict())
        return self.lr_scheduler

    def floating_point_ops(self, inputs: Any) -> int:
        """Not estimated: a batch is a list of micro-batches."""
        return 0

    # ---- One step

    def begin_training(self) -> None:
        """At the start of `train()`: the average, the counters of the log, the liveness watch."""
        self._last_step = None
        if self.is_world_process_zero():
            for warning in self._laid_out().warnings():
                logger.warning(f"Plan: {warning}")
        if self._resumed is None:
            self._ensure_average()
            self.load_counters({})
        else:
            self._tr_loss += self._resumed.loss_of(self.accelerator.process_index, self.accelerator.num_processes)
            self._globalstep_last_logged = self._resumed.last_logged
            self.load_counters(self._resumed.counters)
        self._logged_before = self._globalstep_last_logged
        assert self.average is not None
        self._watch = LivenessWatch(self.average) if self.average.num_updates < LivenessWatch.UPDATES else None

    def _ensure_average(self) -> WeightAverage:
        if self.average is not None and not self.average.same_parameters(self.model):
            logger.warning("The model's parameters are other objects than before: the average is rebuilt from them.")
            self.average = None
        if self.average is None:
            self.average = new_average(self.model, self.args)
        return self.average

    def label_micro_batches(self, inputs: dict[str, list[MicroBatch]]) -> list[MicroBatch]:
        """The micro-batches of a step, unlabelled ones with their targets; here there are none: all have labels."""
        check_labelled(self.model, inputs["micro_batches"], self.ctc)
        return inputs["micro_batches"]

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """One optimizer step's forward and backward passes, micro-batch by micro-batch.

        The loss is the sum of the example losses over `n_ref * kappa`, a constant of the plan, so its gradient does
        not depend on micro-batches, processes or dropped labels.
        """
        step = self._last_step = self.sampler.step(self.state.global_step)
        self._places = inputs.get("stream")
        self.lr_scheduler.begin(step)
        if self.batch_statistics:
            self._statistics = [(buffer, buffer.clone()) for buffer in batch_statistics_of(self.model)]
        micro_batches = self.label_micro_batches(inputs)
        model.train()
        # Processes average their gradients, so each multiplies its share by their number.
        scale = self.accelerator.num_processes / (self.sampler.stream.examples_per_reference_batch * step.kappa)
        total = torch.zeros((), device=self.args.device)
        self._noise.begin(self.sampler, self.state.global_step, model)
        for number, micro_batch in enumerate(micro_batches, start=1):
            last = number == len(micro_batches)
            with without_sync(self.accelerator, model, unless=last or self._noise.needs_sync(number)):
                loss = self.micro_batch_loss(model, micro_batch) * scale
                self.accelerator.backward(loss)
            total += loss.detach()
            self._noise.after_micro_batch(model, number, last)
        return total

    def micro_batch_loss(self, model: nn.Module, micro_batch: MicroBatch) -> Tensor:
        """Sum of the weighted example losses of a micro-batch; zero, but part of the graph, where nothing is kept."""
        padding = micro_batch["weight"] == 0
        inputs = self._prepare_inputs(dict(micro_batch["inputs"]))
        labels = inputs.pop("labels")
        weights = micro_batch.get("example_weights")
        rows = None if weights is None else torch.nonzero(weights).flatten().to(labels.device)
        if self.augmentation is not None:
            begun = self.sampler.stream.position(self.args.augment_start)
            clean = inputs
            inputs = augment(self.augmentation, clean, micro_batch["positions"], int(begun), self.args.seed)
            if self.ctc and changes_length(self.augmentation):
                inputs = keep_fitting(self.model, clean, inputs, labels)
        inputs = with_decoder_inputs(self.model, inputs, labels)
        frozen = frozen_statistics(model) if padding and self.batch_statistics else contextlib.nullcontext()
        with self.compute_loss_context_manager(), frozen:
            logits = model(**inputs).logits
            if padding or (rows is not None and len(rows) == 0):
                return logits.float().sum() * 0.0
            if rows is not None:
                logits, labels = logits[rows], labels[rows]
                inputs = {name: value[rows] for name, value in inputs.items()}
            cap = self.largest_loss(micro_batch)
            losses = cap_losses(self.example_loss(self.model, inputs, logits, labels), cap)
            kept = None if weights is None else weights.to(losses)[rows]
            self.observe_losses(micro_batch, inputs, logits, labels, losses, kept)
            return losses.sum() if kept is None else (losses * kept).sum()

    def largest_loss(self, micro_batch: MicroBatch) -> float | None:
        """Cap on the loss of an example of a micro-batch; None for none."""
        return self.args.max_example_loss

    def observe_losses(
        self,
        micro_batch: MicroBatch,
        inputs: dict[str, Tensor],
        logits: Tensor,
        labels: Tensor,
        losses: Tensor,
        weights: Tensor | None,
    ) -> None:
        """Called with the rows of a micro-batch that have a target, before the backward pass; nothing here."""

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        assert self._last_step is not None
        maximum = self.plan.max_grad_norm(self._last_step.kappa)
        norm = gathered(self.accelerator.clip_grad_norm_(model.parameters(), math.inf if maximum is None else maximum))
        if maximum is not None and float(norm) > maximum:
            self._clipped += 1
        return norm

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        norm = gathered(super()._get_grad_norm(model, grad_norm))
        self._skipped = not math.isfinite(float(norm))
        # A gradient scaler meets such gradients in the normal course of things and skips the step itself.
        if self._skipped:
            # Forward passes on bad input have already entered the running statistics of BatchNorm.
            for buffer, before in self._statistics:
                buffer.copy_(before)
        if self._skipped and getattr(self.accelerator, "scaler", None) is None:
            if self.args.on_nonfinite == "raise":
                clock = self._last_step.start if self._last_step else 0.0
                raise nonfinite_gradient(float(norm), self.state.global_step, clock)
            model.zero_grad(set_to_none=True)
        return norm

    def lead_average(self) -> None:
        """What the average takes from the weights before the optimizer step; nothing if the step is dropped."""
        assert self.average is not None and self._last_step is not None
        self._skip_watch.before_step(self.optimizer)
        if not self._skipped:
            self._mover.before_step(self.plan, self.average, self.model, self._last_step)

    def update_average(self) -> None:
        """Move the average by what the step just taken drew; a skipped step moves nothing."""
        assert self.average is not None and self._last_step is not None
        if self.batch_statistics and self.accelerator.num_processes > 1:
            share_statistics(self.model)
        # Under a gradient scaler only the scaler knows: it steps on finite gradients whose norm overflows.
        dropped = self._skipped and getattr(self.accelerator, "scaler", None) is None
        if dropped or self._skip_watch.was_skipped(self.optimizer):
            return
        number = self.state.global_step + 1
        moved = (self.plan, self.average, self.model, self._last_step)
        weight = self._mover.after_step(*moved, number=number, last=number == self.sampler.num_steps)
        if self._watch is None or weight is None or weight == 1 or not learns(self.optimizer):
            return
        if self._watch.after_update(self.model, self.average, weight):
            self._watch = None

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
            **self._noise.logs(),
        }

    # ---- Save, resume, best model

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The student at the root of `output_dir`, the average in `ema/`; both before any push."""
        with self._as_student():
            super().save_model(output_dir, _internal_call=True)
        if self.average is not None:
            folder, state = Path(output_dir or self.args.output_dir or "."), self._run_state()
            if self.args.should_save:
                state.student = student_checksums(folder)
            saved: dict[str, Any] = {"state": state.to_dict(), "processing_class": self.processing_class}
            save_average(folder / "ema", self.model, self.average, write=self.args.should_save, **saved)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def counters(self) -> dict[str, Any]:
        """What is counted between logs, for the checkpoint; JSON values."""
        state = {"pending_log_momentum": self._mover.pending, "noise": self._noise.state_dict()}
        return {"clipped": self._clipped, **state}

    def load_counters(self, counters: dict[str, Any]) -> None:
        """Restore `counters()`; an empty dictionary starts them anew."""
        self._clipped = int(counters.get("clipped", 0))
        self._mover.pending = float(counters.get("pending_log_momentum", 0.0))
        self._noise.load_state_dict(counters.get("noise", {}))

    def _run_state(self) -> RunState:
        done = self.state.global_step
        running = self.is_in_train and hasattr(self, "_tr_loss")
        losses = self.accelerator.gather(self._tr_loss.reshape(1)) if running else torch.zeros(1)
        losses = losses.nan_to_num(0.0, 0.0, 0.0)
        return RunState(
            global_step=done,
            clock=float(self.sampler.stream.clock(int(self.sampler.positions[done]))),
            borders=self.sampler.done(done).to_json(),
            identity=self._laid_out().identity,
            recipe=asdict(self.plan.recipe),
            loss=float(losses.mean()),
            losses=losses.tolist(),
            last_logged=self._globalstep_last_logged if running else done,
            counters=self.counters(),
        )

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        with committed(self, trial):
            super()._save_checkpoint(model, trial)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if self.resume_random_state:
            super()._load_rng_state(checkpoint)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        save_places(self._places, output_dir, self.accelerator.process_index)
        self.accelerator.wait_for_everyone()  # no commit before every process has written its part

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if not load_added_adapter(unwrap(self.model if model is None else model), resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        check_optimizer_state(self, checkpoint)
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            self.average = restored_average(self, checkpoint)

    def _load_best_model(self) -> None:
        """The best checkpoint's pair of weights: its average in `average`, and in the model what the metric named."""
        if not load_added_adapter(self.model, self.state.best_model_checkpoint or ""):
            super()._load_best_model()
        if self.average is None or self.state.best_model_checkpoint is None:
            return
        load_average(Path(self.state.best_model_checkpoint) / "ema", self.model, self.average)
        metric = (self.args.metric_for_best_model or "").removeprefix("eval_")
        if metric.startswith("ema_"):
            self._student = WeightAverage(self.model, share_frozen=False)
            self.average.copy_to(self.model)

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
