"""Evaluation of both weight sets, student and average, on the loss of training; and the best model by either."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer
from transformers.trainer_utils import EvalLoopOutput

from hf_ema_scaling.data.collator import pad_labels
from hf_ema_scaling.ema import WeightAverage, load_average
from hf_ema_scaling.ema.adapter_storage import load_added_adapter
from hf_ema_scaling.labels.ctc import blank_id, ctc_frame_lengths, greedy_ctc
from hf_ema_scaling.labels.decoder import with_decoder_inputs, with_decoder_start
from hf_ema_scaling.training.arguments import EMATrainingArguments
from hf_ema_scaling.training.checkpoints import refuse_damaged_best
from hf_ema_scaling.training.losses import ExampleLoss, cap_losses


class BothWeightsEvaluation(Trainer):
    """Trainer that evaluates the student as `eval_*` and the average of its weights as `eval_ema_*`."""

    args: EMATrainingArguments
    model: Any
    average: WeightAverage | None
    example_loss: ExampleLoss
    ctc: bool

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._student: WeightAverage | None = None
        """The student, while the model holds the best average."""

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Loss as in training, predictions and labels.

        Predictions of a CTC model are its greedy labels, int64 `(rows, tokens)` padded with -100, unless
        `preprocess_logits_for_metrics` asks for the logits.
        """
        inputs = self._prepare_inputs(inputs)
        labels = inputs.pop("labels", None)
        if labels is None:
            inputs = with_decoder_start(self.model, inputs)
        else:
            inputs = with_decoder_inputs(self.model, inputs, labels)
        with torch.no_grad(), self.compute_loss_context_manager():
            logits = model(**inputs).logits
            loss = None
            if labels is not None:
                # An utterance without words has a word error rate, but no CTC loss per token.
                rows = (labels >= 0).any(-1) if self.ctc else torch.ones(len(labels), dtype=torch.bool)
                chosen = {name: value[rows] for name, value in inputs.items()} if self.ctc else inputs
                losses = self.example_loss(self.model, chosen, logits[rows], labels[rows])
                loss = cap_losses(losses, self.args.max_example_loss).sum() / max(1, int(rows.sum()))
        if prediction_loss_only:
            return loss, None, None
        if self.ctc and self.preprocess_logits_for_metrics is None:
            frames = ctc_frame_lengths(self.model, inputs)
            predicted = greedy_ctc(logits, frames, blank_id(self.model.config))
            return loss, pad_labels(predicted).to(logits.device), labels
        return loss, logits.detach(), labels

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Once per weight set: `<prefix>_*` for the student, `<prefix>_ema_*` (`eval_ema_<set>_*`) for the average.

        Predictions are those of the weights in the model: the student's, or after load-best by the average its own.
        """
        passed = (dataloader, description, prediction_loss_only, ignore_keys)
        which = self.args.evaluate_weights
        student = None
        if self.average is None or which != "ema":
            with self._as_student():
                student = super().evaluation_loop(*passed, metric_key_prefix)
        if self.average is None or which == "student":
            assert student is not None
            return student
        split, _, rest = metric_key_prefix.partition("_")
        with self.average.swapped(self.model):
            output = super().evaluation_loop(*passed, f"{split}_ema" + (f"_{rest}" if rest else ""))
        if student is None:
            return output
        held = student if self._student is None else output
        return held._replace(metrics={**(student.metrics or {}), **(output.metrics or {})})

    def _as_student(self) -> contextlib.AbstractContextManager[None]:
        """Inside, the model holds the student, also after the best average was loaded into it."""
        return contextlib.nullcontext() if self._student is None else self._student.swapped(self.model)

    def _load_best_model(self) -> None:
        """The best checkpoint's pair of weights: its average in `average`, and in the model what the metric named."""
        if self.average is not None and self.state.best_model_checkpoint is not None:
            refuse_damaged_best(self)
        if not load_added_adapter(self.model, self.state.best_model_checkpoint or ""):
            super()._load_best_model()
        if self.average is None or self.state.best_model_checkpoint is None:
            return
        load_average(Path(self.state.best_model_checkpoint) / "ema", self.model, self.average)
        metric = (self.args.metric_for_best_model or "").removeprefix("eval_")
        if metric.startswith("ema_"):
            self._student = WeightAverage(self.model, share_frozen=False)
            self.average.copy_to(self.model)
