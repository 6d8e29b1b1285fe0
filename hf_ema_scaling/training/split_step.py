"""One optimizer step: forward and backward passes micro-batch by micro-batch, clipping, and what is not finite."""

from __future__ import annotations

import contextlib
import math
from typing import Any

import torch
from torch import Tensor, nn

from hf_ema_scaling.data.collator import CTCCollator, MicroBatch
from hf_ema_scaling.data.sampler import SampledStep
from hf_ema_scaling.data.stream import UNLABELLED
from hf_ema_scaling.data.views import Augmentation, changes_length
from hf_ema_scaling.ema import gathered
from hf_ema_scaling.labels.decoder import with_decoder_inputs
from hf_ema_scaling.training.augment import augment, keep_fitting, refuse_augmentation
from hf_ema_scaling.training.checks import (
    check_ctc_setup,
    check_labelled,
    frozen_statistics,
    nonfinite_gradient,
)
from hf_ema_scaling.training.forward_state import ForwardState
from hf_ema_scaling.training.losses import ExampleLoss, cap_losses, is_ctc, loss_for
from hf_ema_scaling.training.noise import NoiseMeter
from hf_ema_scaling.training.reference_run import ReferenceRun
from hf_ema_scaling.training.sharded import without_sync
from hf_ema_scaling.training.skipped_steps import SkippedSteps


class SplitSteps(ReferenceRun):
    """Takes each step of a `ReferenceRun` in micro-batches, on losses per example over one constant of the plan.

    Args:
        *args, **kwargs: as for `Trainer`.
        example_loss: see `EMATrainerMixin`.
        augmentation: see `EMATrainerMixin`.

    Raises:
        ValueError, NotImplementedError: for heads, data and augmentations that do not fit each other.
    """

    def __init__(
        self,
        *args: Any,
        example_loss: ExampleLoss | None = None,
        augmentation: Augmentation | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        if "labels" not in self.label_names:
            # The loss needs them, whether or not the model's forward names them.
            self.label_names = [*self.label_names, "labels"]
        self.example_loss = example_loss or loss_for(self.model)
        refuse_augmentation(augmentation, self.model)
        self.augmentation = augmentation
        self.ctc = is_ctc(self.model)
        if self.ctc:
            check_ctc_setup(self.model, self.processing_class, kwargs.get("data_collator"))
        if self.ctc and kwargs.get("data_collator") is None:
            self.data_collator = CTCCollator.from_processor(self.processing_class)
        self._begin_counts()
        self._last_step: SampledStep | None = None
        self._skipped = False
        self._forward_state = ForwardState()
        self._clipped = 0

    def _begin_counts(self) -> None:
        """Counts of a run by the arguments and the accelerator as they are now."""
        batch = self.args.reference_batch_size or 1.0
        self._noise = NoiseMeter(self.args.noise_scale_every, batch, self.accelerator)
        self._skips = SkippedSteps(self.args.max_skipped_steps)

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
        self._forward_state.remember(self.model)
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
        if self.augmentation is not None and (self.args.augment_labelled or micro_batch["source"] == UNLABELLED):
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
        if self._skipped and getattr(self.accelerator, "scaler", None) is None:
            # Forward passes on bad input have already entered running statistics.
            self._forward_state.restore()
            if self.args.on_nonfinite == "raise":
                clock = self._last_step.start if self._last_step else 0.0
                raise nonfinite_gradient(float(norm), self.state.global_step, clock)
            model.zero_grad(set_to_none=True)
        return norm
