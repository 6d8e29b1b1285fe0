"""The recipe for CTC speech recognition: its arguments, its data and model, its trainer."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from datasets import Dataset
from transformers import (
    CONFIG_MAPPING,
    AutoFeatureExtractor,
    AutoModelForCTC,
    AutoProcessor,
    Wav2Vec2BertProcessor,
    Wav2Vec2Processor,
    set_seed,
)

from hf_ema_scaling.data.speech import build_character_processor
from hf_ema_scaling.data.speech_rows import ctc_ids, prepare_ctc
from hf_ema_scaling.labels import blank_id
from hf_ema_scaling.metrics import CTCMetrics
from hf_ema_scaling.recipe.config import close_names
from hf_ema_scaling.recipe.speech import AugmentationArguments, SpeechDataArguments, load_transcribed, prepare_sets
from hf_ema_scaling.recipe.speech_streams import fitting_rows_of, refuse_settings, stream_sets
from hf_ema_scaling.training import EMATrainer, EMATrainingArguments, PseudoLabelArguments, PseudoLabelTrainer
from hf_ema_scaling.training.checks import drop_unfitting
from hf_ema_scaling.training.mixin import EMATrainerMixin


@dataclass
class ModelArguments:
    """Which model: pre-trained, or from scratch on log-mel features and characters."""

    model_name_or_path: str | None = field(default=None, metadata={"help": "A CTC model to start from, or ..."})
    model_config: str | None = field(
        default=None,
        metadata={"help": "... the configuration of one to train from scratch: a mapping with model_type."},
    )
    new_vocabulary: bool = field(
        default=False,
        metadata={"help": "With model_name_or_path: a new output layer for the characters of the texts."},
    )
    alphabet: str | None = field(
        default=None, metadata={"help": "Characters of a new vocabulary; default: those of the labelled texts."}
    )
    init_seed: int | None = field(
        default=None,
        metadata={
            "help": "Seed of the initialisation of new weights; default: seed. Runs that share it may differ in "
            "order, dropout and augmentation."
        },
    )

    def __post_init__(self) -> None:
        if (self.model_name_or_path is None) == (self.model_config is None):
            raise ValueError(
                f"give model_name_or_path or model_config, one of them: got {self.model_name_or_path!r} and "
                f"{self.model_config!r}"
            )


ASR_CTC = (SpeechDataArguments, ModelArguments, AugmentationArguments, EMATrainingArguments, PseudoLabelArguments)
"""The arguments of `build_asr_ctc`, for `parse`."""


def build_asr_ctc(
    data: SpeechDataArguments,
    model: ModelArguments,
    augmentation: AugmentationArguments,
    args: EMATrainingArguments,
    pseudo: PseudoLabelArguments,
) -> EMATrainerMixin:
    """The trainer of a CTC recipe: with pseudo-labels if there is unlabelled speech, else on labelled speech alone.

    Data is prepared by the main process first; features stay in the cache of `datasets`. Labelled rows whose text
    needs more frames than the model makes of their audio are dropped and counted.

    Raises:
        ValueError, FileNotFoundError, NotImplementedError: for what cannot be used, by name.
    """
    if data.unlabelled is not None and model.model_config is not None and pseudo.pl_start <= 0:
        raise ValueError("pl_start must be above 0: a model from scratch has nothing to teach at reference step 0")
    made_of_texts = (model.model_name_or_path is None or model.new_vocabulary) and model.alphabet is None
    refuse_settings(data, args, pseudo, needs_alphabet=made_of_texts)

    def prepare(dataset: Dataset, text_column: str | None, **limits: float) -> Dataset:
        return prepare_ctc(
            dataset,
            processor,
            audio_column=data.audio_column,
            text_column=text_column,
            num_proc=data.num_proc,
            on_bad_item=data.on_bad_item,
            **limits,
        )

    config = None if model.model_config is None else new_config(model.model_config)
    with args.main_process_first(desc="preparing speech"):
        if data.streaming:
            processor = _processor(model, config, None)
            target = partial(ctc_ids, tokenizer=processor.tokenizer)
            sets = stream_sets(data, args, processor.feature_extractor, target, prepare)
        else:
            labelled = load_transcribed(data, data.labelled, data.max_labelled)
            texts = [text for text in labelled[data.text_column] if isinstance(text, str)]
            processor = _processor(model, config, texts)
            sets = prepare_sets(data, labelled, prepare)
    augmentation.check(processor.feature_extractor)
    set_seed(args.seed if model.init_seed is None else model.init_seed)
    network = _network(model, config, processor.tokenizer)
    fitting: Any = fitting_rows_of if data.streaming else drop_unfitting
    shared: dict[str, Any] = {
        "model": network,
        "args": args,
        "train_dataset": fitting(network, sets.labelled, data.labelled),
        "eval_dataset": sets.eval_dataset,
        "processing_class": processor,
        "compute_metrics": CTCMetrics(processor.tokenizer, blank_id(network.config)).compute,
        "augmentation": augmentation.build(processor.feature_extractor),
    }
    if sets.unlabelled is None:
        return EMATrainer(**shared)
    unlabelled = fitting(network, sets.unlabelled, str(data.unlabelled))
    return PseudoLabelTrainer(**shared, unlabeled_dataset=unlabelled, pseudo_label_args=pseudo)


def new_config(text: str) -> Any:
    """The configuration in a JSON mapping; transformers would keep a misspelt key, so all must be known."""
    values = json.loads(text)
    if not isinstance(values, dict) or values.get("model_type") not in CONFIG_MAPPING:
        raise ValueError(f"model_config must be a mapping with a model_type that transformers knows, got {values!r}")
    kind = CONFIG_MAPPING[values.pop("model_type")]

    def check(given: Mapping[str, Any], known: Mapping[str, Any], path: str) -> None:
        for name, value in given.items():
            if name not in known:
                raise ValueError(f"{path} has no {name!r}{close_names(name, known)}")
            if isinstance(value, Mapping) and isinstance(known[name], Mapping):
                check(value, known[name], f"{path}.{name}")

    check(values, kind().to_dict(), "model_config")
    return kind(**values)


def _processor(model: ModelArguments, config: Any | None, texts: Iterable[str] | None) -> Any:
    name = model.model_name_or_path
    if name is not None and not model.new_vocabulary:
        return AutoProcessor.from_pretrained(name)
    bins = {}
    if config is not None:
        measured = getattr(getattr(config, "encoder_config", config), "num_mel_bins", None)
        if measured is None:
            raise NotImplementedError(
                f"{type(config).__name__} has no num_mel_bins: only models on log-mel features are trained from "
                "scratch; start others from model_name_or_path with new_vocabulary"
            )
        bins = {"num_mel_bins": int(measured)}
    processor = build_character_processor(texts or [] if model.alphabet is None else [model.alphabet], **bins)
    if name is None:
        return processor
    extractor = AutoFeatureExtractor.from_pretrained(name)
    mel = extractor.model_input_names[0] == "input_features"
    return (Wav2Vec2BertProcessor if mel else Wav2Vec2Processor)(extractor, processor.tokenizer)


def _network(model: ModelArguments, config: Any | None, tokenizer: Any) -> Any:
    vocabulary = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
    if config is not None:
        for name, value in vocabulary.items():
            setattr(config, name, value)
        return AutoModelForCTC.from_config(config)
    changed = {**vocabulary, "ignore_mismatched_sizes": True} if model.new_vocabulary else {}
    # The checkpoint's own dtype would have the optimizer work in bfloat16 too.
    return AutoModelForCTC.from_pretrained(str(model.model_name_or_path), dtype=torch.float32, **changed)
