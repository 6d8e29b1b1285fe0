"""What recipes of generating models share: their training arguments, and how a model is told what to write."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from hf_ema_scaling.labels import generative_labeler_for
from hf_ema_scaling.labels.seq2seq import Seq2SeqLabeler
from hf_ema_scaling.training.seq2seq_arguments import EMASeq2SeqTrainingArguments


@dataclass
class GeneratingTrainingArguments(EMASeq2SeqTrainingArguments):
    """`EMASeq2SeqTrainingArguments` that evaluates what the model writes, unless told not to."""

    predict_with_generate: bool = field(
        default=True,
        metadata={"help": "Evaluate on generated texts; without, on the loss alone, which is much faster."},
    )


def labeler_of(
    network: Any, processor: Any, *, language: str | None, task: str | None = None, max_label_tokens: int | None = None
) -> Seq2SeqLabeler:
    """The labeler of an encoder-decoder, whose own generation is told to begin like the labels.

    What is said of language and task goes into `network.generation_config`, which is saved with the model: evaluation,
    and whoever loads the model, then gets what it was trained to write.

    Args:
        network: of transformers.
        processor: its processor or tokenizer.
        language: as in `generative_labeler_for`.
        task: as in `generative_labeler_for`.
        max_label_tokens: tokens after which a label without an end is given up; None for the model's own limit.

    Raises:
        ValueError: for a model that is no encoder-decoder, and as `generative_labeler_for`.
    """
    labeler = generative_labeler_for(network, processor, language=language, task=task, max_new_tokens=max_label_tokens)
    if not isinstance(labeler, Seq2SeqLabeler):
        raise ValueError(f"{type(network).__name__} is no encoder-decoder")
    config = network.generation_config
    if str(network.config.model_type) == "whisper":
        if getattr(config, "is_multilingual", False):
            config.language, config.task = language, task or "transcribe"
        return labeler
    config.decoder_start_token_id = labeler.prompt[0]
    if len(labeler.prompt) > 1:
        config.forced_bos_token_id = labeler.prompt[1]
    return labeler
