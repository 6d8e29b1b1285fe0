"""A run on the reference clock: what every step draws, and the values that it is taken with."""

from __future__ import annotations

import copy
from dataclasses import asdict
from typing import Any

from torch import nn
from torch.utils.data import DataLoader
from transformers import Trainer
from transformers.trainer_callback import DefaultFlowCallback
from transformers.utils import logging

from hf_ema_scaling.data.collator import MicroBatchCollator, TwoSourceDataset
from hf_ema_scaling.data.sampler import ScheduledBatchSampler
from hf_ema_scaling.scaling import OptimizerValues, ScalingPlan
from hf_ema_scaling.training.arguments import EMATrainingArguments, PseudoLabelArguments
from hf_ema_scaling.training.checks import has_batch_statistics, refuse_unsupported
from hf_ema_scaling.training.layout import RunLayout, lay_out
from hf_ema_scaling.training.optimizer_values import hyper_parameters, reference_values
from hf_ema_scaling.training.run_state import RunState, optimizer_family
from hf_ema_scaling.training.scheduler import PlanScheduler
from hf_ema_scaling.training.signals import StopOnSigterm
from hf_ema_scaling.training.streaming import stream_loader

logger = logging.get_logger(__name__)


class ReferenceRun(Trainer):
    """Trainer whose data loader, optimizer and scheduler follow a `ScalingPlan`.

    Args:
        *args, **kwargs: as for `Trainer`.

    Raises:
        ValueError, NotImplementedError: for what is not supported, with the reason and the way out.
    """

    args: EMATrainingArguments
    model: Any
    lr_scheduler: Any
    optimizer: Any
    layout: RunLayout | None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        refuse_unsupported(self)
        self.batch_statistics = has_batch_statistics(self.model)
        self._optimizer_family = optimizer_family(self.args.optim, self.optimizer)
        self._has = hyper_parameters(self._optimizer_family, self.args.scaling_rule)
        self._given = None if self.optimizer is None else reference_values(self.optimizer.param_groups[0], self._has)
        self._reference: list[OptimizerValues] | None = None
        self._resumed: RunState | None = None
        self._places: str | None = None
        self._sigterm = StopOnSigterm(lambda: self.accelerator)
        self.pop_callback(DefaultFlowCallback)

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

    def get_train_dataloader(self) -> DataLoader:
        """One batch per optimizer step and process: a list of micro-batches, left on the CPU."""
        if self.train_dataset is None:
            raise ValueError("training needs a train_dataset")
        self._follow_arguments()
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

    def _follow_arguments(self) -> None:
        """Takes up what a hyper-parameter search has set since construction."""
        self.args.check()
        if self.model_init is not None:  # else the optimizer may be one that was passed
            self._optimizer_family = optimizer_family(self.args.optim, None)
            self._has = hyper_parameters(self._optimizer_family, self.args.scaling_rule)

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
