"""The arguments of runs that generate in evaluation."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import Seq2SeqTrainingArguments

from hf_ema_scaling.training.arguments import EMATrainingArguments


@dataclass
class EMASeq2SeqTrainingArguments(EMATrainingArguments, Seq2SeqTrainingArguments):
    """`EMATrainingArguments` with `predict_with_generate`, `generation_max_length`, `generation_num_beams` and
    `generation_config` of transformers' `Seq2SeqTrainingArguments`, for evaluation and prediction.

    Raises:
        ValueError: as `EMATrainingArguments`, and for `sortish_sampler`.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sortish_sampler:
            raise ValueError("sortish_sampler is not used: set bucket_window to put items of like length together")
