"""Trainers of generating models: metrics on what both weight sets generate, and pseudo-labels by generation."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn
from transformers import DataCollatorForSeq2Seq, PreTrainedModel, Seq2SeqTrainer, Seq2SeqTrainingArguments
from transformers.trainer_utils import EvalLoopOutput

from hf_ema_scaling.data.collator import CTCCollator
from hf_ema_scaling.labels import Labeler, generative_labeler_for
from hf_ema_scaling.labels.decoder import bare
from hf_ema_scaling.labels.generative import end_ids
from hf_ema_scaling.training.mixin import EMATrainerMixin
from hf_ema_scaling.training.seq2seq_arguments import EMASeq2SeqTrainingArguments
from hf_ema_scaling.training.trainer import PseudoLabelTrainer


class EMASeq2SeqTrainer(EMATrainerMixin, Seq2SeqTrainer):
    """`EMATrainer` for encoder-decoders, on top of transformers' `Seq2SeqTrainer`.

    With `predict_with_generate` the predictions that `compute_metrics` gets are generated token ids, padded on the
    right, and the labels are padded with -100: `eval_*` from what the student generates, `eval_ema_*` from what the
    average does. The KV cache is on.

    Args:
        model: the model to train.
        args: the recipe at the reference batch, and how to generate in evaluation.
        data_collator: by default, audio is padded by `CTCCollator` and text by `DataCollatorForSeq2Seq`.
        **kwargs: as for `EMATrainer`.

    Raises:
        TypeError: for arguments that are not `EMASeq2SeqTrainingArguments`.
    """

    args: EMASeq2SeqTrainingArguments
    _gen_kwargs: dict[str, Any]

    def __init__(
        self,
        model: PreTrainedModel | nn.Module | None = None,
        args: EMASeq2SeqTrainingArguments | None = None,
        *,
        data_collator: Any | None = None,
        **kwargs: Any,
    ) -> None:
        if not isinstance(args, Seq2SeqTrainingArguments):
            raise TypeError(f"args must be EMASeq2SeqTrainingArguments, got {type(args).__name__}")
        super().__init__(model, args, data_collator=data_collator, **kwargs)
        if data_collator is None and self.processing_class is not None:
            self.data_collator = _collator(self.model, self.processing_class)

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
        **gen_kwargs: Any,
    ) -> tuple[Any, Tensor | None, Tensor | None]:
        """Loss as in training; with `predict_with_generate`, generated ids in the place of logits."""
        generates = self.args.predict_with_generate and not prediction_loss_only
        step = super().prediction_step(model, inputs, prediction_loss_only or generates, ignore_keys)
        if not generates:
            return step
        labels = inputs.get("labels")
        given = {name: value for name, value in inputs.items() if name != "labels" and "decoder_" not in name}
        settings = {"use_cache": True, **(gen_kwargs or getattr(self, "_gen_kwargs", {}))}
        bare_model = bare(self.model)
        before = bare_model.generation_config
        # Seq2SeqTrainer writes into the generation config, which is saved, and from which labels are decoded.
        bare_model.generation_config = copy.deepcopy(before)
        padding = getattr(bare_model.config, "pad_token_id", None)
        if padding is None:
            # Seq2SeqTrainer fills up what was generated, and Moonshine has nothing to do it with but its end.
            bare_model.config.pad_token_id = end_ids(bare_model)[0]
        try:
            _, predictions, _ = Seq2SeqTrainer.prediction_step(self, model, given, False, ignore_keys, **settings)
        finally:
            bare_model.generation_config = before
            bare_model.config.pad_token_id = padding
        return step[0], predictions, None if labels is None else self._prepare_input(labels)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """As of `EMATrainer`; the last, smaller batch counts its rows once.

        Seq2SeqTrainer gathers it as if it were full, so that its loss weighs too much, and over several processes
        some rows twice.
        """
        self.gather_function = self.accelerator.gather_for_metrics
        return super().evaluation_loop(*args, **kwargs)


class PseudoLabelSeq2SeqTrainer(PseudoLabelTrainer, EMASeq2SeqTrainer):
    """`PseudoLabelTrainer` for generating models: the average writes the labels of unlabelled speech or text.

    Args:
        model: the student.
        args: as for `EMASeq2SeqTrainer`.
        labeler: turns teacher output into labels; `generative_labeler_for(model, processing_class)` where it is not
            given. For another language, beams, sampling or lengths pass one that is made with these options.
        **kwargs: as for `PseudoLabelTrainer`.
    """

    def __init__(
        self,
        model: PreTrainedModel | nn.Module | None = None,
        args: EMASeq2SeqTrainingArguments | None = None,
        *,
        labeler: Labeler | None = None,
        **kwargs: Any,
    ) -> None:
        if labeler is None and model is not None:
            labeler = generative_labeler_for(model, kwargs.get("processing_class"))
        super().__init__(model, args, labeler=labeler, **kwargs)


def _collator(model: Any, processing_class: Any) -> Any:
    if bare(model).main_input_name == "input_ids":
        # Without the model: it would make decoder inputs, and the trainer makes them by the model's own rule.
        return DataCollatorForSeq2Seq(getattr(processing_class, "tokenizer", processing_class))
    return CTCCollator.from_processor(processing_class)
