"""`BYOLTrainer`: self-supervised training whose target network is the average of the weights."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import EvalPrediction, PreTrainedModel

from hf_ema_scaling.data.collator import MicroBatch
from hf_ema_scaling.data.images import ImageRows, RandomViews
from hf_ema_scaling.data.sampler import Draw
from hf_ema_scaling.data.stream import LABELLED
from hf_ema_scaling.ema import EMATeacher, WeightAverage, check_before_labelling
from hf_ema_scaling.training.arguments import EMATrainingArguments
from hf_ema_scaling.training.augment import SEEDS_PER_RUN
from hf_ema_scaling.training.losses import byol_losses
from hf_ema_scaling.training.mixin import EMATrainerMixin
from hf_ema_scaling.training.probe import probe_accuracy


class BYOLTrainer(EMATrainerMixin):
    """Trainer for "Bootstrap your own latent" (arXiv 2006.07733): each view predicts the average's view of the other.

    Each item is seen in two random views, seeded by the run's seed and the item's place in the stream, so that they
    are the same at every kappa. The loss per item is `byol_losses`. Labels of the training set are never read. The
    momentum schedule of the paper is `ema_momentum_schedule="cosine"`.

    **The target network** is the average in eval mode: its BatchNorm normalises by the averaged running statistics
    (as EMAN does, arXiv 2101.08482), where BYOL's own target normalises by the statistics of its batch. A target thus
    depends on its own view alone, and what is averaged is what is evaluated and saved. The student normalises by the
    statistics of the micro-batch and view, which never span two reference batches.

    Evaluation reports `eval_loss` and `eval_ema_loss`, on views seeded by the content of a row, and with a
    `probe_dataset` `eval_probe_accuracy` and `eval_ema_probe_accuracy`: accuracy on the evaluation set of ridge
    regression from the encoder's features to the labels of the probe set (`probe_accuracy`).

    Args:
        model: a `BYOLModel`, or another model with its outputs.
        args: the recipe at the reference batch, and the batch of this run.
        views: makes the views.
        probe_dataset: map-style rows with `labels`, for the linear probe.
        teacher_factory: builds the target network where class and configuration do not suffice.
        **kwargs: as for `EMATrainer`, without `example_loss`, `augmentation` and `compute_metrics`.

    Raises:
        ValueError: for micro-batches of one row, which BatchNorm cannot normalise.
    """

    def __init__(
        self,
        model: PreTrainedModel | nn.Module | None = None,
        args: EMATrainingArguments | None = None,
        *,
        views: RandomViews,
        probe_dataset: ImageRows | None = None,
        teacher_factory: Callable[[], nn.Module] | None = None,
        **kwargs: Any,
    ) -> None:
        self.views = views
        self.probe_dataset = probe_dataset
        self.teacher_factory = teacher_factory
        self._target: EMATeacher | None = None
        measure = None if probe_dataset is None else self.measure
        super().__init__(model, args, example_loss=_example_loss, compute_metrics=measure, **kwargs)
        if self.batch_statistics and self.layout is not None:
            self._refuse_single_rows()

    def _refuse_single_rows(self) -> None:
        for number in range(self.sampler.num_steps):
            if any(len(rows) == 1 for rows in self.sampler.micro_batches(number)):
                raise ValueError(
                    f"optimizer step {number} has a micro-batch of one row, which BatchNorm cannot normalise "
                    f"(per_device_train_batch_size={self.args.per_device_train_batch_size}, reference batch "
                    f"{self.args.reference_batch_size:g}): make batches multiples of the reference batch, and "
                    "per_device_train_batch_size the reference batch"
                )

    def begin_training(self) -> None:
        """Also tests that the target network says what the student would say, and follows it."""
        super().begin_training()
        assert self.average is not None
        row = self.data_collator(
            [{"pixel_values": self.run_dataset()[Draw(LABELLED, 0, 0, 0, 1.0)][1]["pixel_values"]}]
        )
        inputs, autocast = self._prepare_inputs(row), self.accelerator.autocast
        check_before_labelling(self.model, self.average, self.target(), inputs, autocast=autocast)

    def target(self) -> EMATeacher:
        """The target network over the average's storage; before training, over a copy of the weights as they are."""
        if self.average is None:
            return EMATeacher(self.model, WeightAverage(self.model), factory=self.teacher_factory)
        if self._target is None or self._target.average is not self.average:
            self._target = EMATeacher(self.model, self.average, factory=self.teacher_factory)
        return self._target

    def label_micro_batches(self, inputs: dict[str, list[MicroBatch]]) -> list[MicroBatch]:
        """Leaves them as they are: views and targets are made of one micro-batch at a time, to save memory."""
        return inputs["micro_batches"]

    def micro_batch_loss(self, model: nn.Module, micro_batch: MicroBatch) -> Tensor:
        """Sum of the losses of a micro-batch's items, from their views and the target network's projections."""
        seeds = [self.args.seed * SEEDS_PER_RUN + position for position in micro_batch["positions"]]
        prepared = micro_batch.copy()
        prepared["inputs"] = self.two_views(micro_batch["inputs"]["pixel_values"], seeds)
        return super().micro_batch_loss(model, prepared)

    def two_views(self, images: Tensor, seeds: list[int]) -> dict[str, Tensor]:
        """Two views of each image, and as `labels` what the target network makes of them.

        Args:
            images: float `(rows, channels, height, width)` in [0, 1].
            seeds: one per row.

        Returns:
            `pixel_values`, `(rows, 2, channels, height, width)`, and `labels`, `(rows, 2, size)`.
        """
        images = self._prepare_inputs({"pixel_values": images})["pixel_values"]
        pairs = [self.views(images, [2 * seed + view for seed in seeds]) for view in (0, 1)]
        both = torch.stack(pairs, 1)
        with self.accelerator.autocast():
            return {"pixel_values": both, "labels": self.target()(pixel_values=both).projections}

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Loss against the target network; features of the images as they are; labels, if there are any."""
        images = inputs["pixel_values"]
        seeds = [zlib.crc32(image.numpy().tobytes()) for image in images.cpu()]
        loss, _, _ = super().prediction_step(model, self.two_views(images, seeds), prediction_loss_only=True)
        if prediction_loss_only:
            return loss, None, None
        return loss, self.features(model, images), self._prepare_inputs(inputs).get("labels")

    def features(self, model: nn.Module, images: Tensor) -> Tensor:
        """The encoder's features `(rows, features)`, float32, of images as they are."""
        inputs = self._prepare_inputs({"pixel_values": images})
        with torch.no_grad(), self.compute_loss_context_manager():
            return model(**inputs).features.float()

    def measure(self, prediction: EvalPrediction) -> dict[str, float]:
        """Accuracy of the linear probe, by the weights that the model holds while it is evaluated."""
        assert self.probe_dataset is not None
        size, probe = self.args.per_device_eval_batch_size, self.probe_dataset
        found = []
        labels: list[int] = []
        for first in range(0, len(probe), size):
            rows = probe.__getitems__(list(range(first, min(first + size, len(probe)))))
            labels += [row["labels"] for row in rows]
            found.append(self.features(self.model, torch.stack([row["pixel_values"] for row in rows])).cpu())
        accuracy = probe_accuracy(
            torch.cat(found),
            torch.tensor(labels),
            torch.as_tensor(prediction.predictions),
            torch.as_tensor(prediction.label_ids),
        )
        return {"probe_accuracy": accuracy}


def _example_loss(model: nn.Module, inputs: Any, predictions: Tensor, targets: Tensor) -> Tensor:
    return byol_losses(predictions, targets)
