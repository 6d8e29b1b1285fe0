"""The recipe for speech recognition with a decoder (Whisper and others): its arguments, its model, its trainer."""

from __future__ import annotations

import bisect
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from transformers import AutoModelForSpeechSeq2Seq, AutoProcessor

from hf_ema_scaling.data.collator import CTCCollator, WindowCollator
from hf_ema_scaling.data.speech_rows import prepare_seq2seq, window_frames
from hf_ema_scaling.data.targets import TextTargets
from hf_ema_scaling.labels.ctc import LENGTH_METHODS, frames_of
from hf_ema_scaling.metrics import TextMetrics, character_error_rate, word_error_rate
from hf_ema_scaling.recipe.generating import GeneratingTrainingArguments, labeler_of
from hf_ema_scaling.recipe.speech import AugmentationArguments, SpeechDataArguments, load_transcribed, prepare_sets
from hf_ema_scaling.recipe.speech_streams import refuse_settings, stream_sets
from hf_ema_scaling.training import PseudoLabelArguments
from hf_ema_scaling.training.mixin import EMATrainerMixin
from hf_ema_scaling.training.seq2seq import EMASeq2SeqTrainer, PseudoLabelSeq2SeqTrainer


@dataclass
class SpeechModelArguments:
    """Which recogniser, and what it writes."""

    model_name_or_path: str = field(metadata={"help": "An encoder-decoder for speech to start from."})
    language: str | None = field(
        default=None,
        metadata={"help": "Of the texts: a code or name for Whisper, a code of SeamlessM4T. Where a model knows one."},
    )
    task: str | None = field(default=None, metadata={"help": "Whisper's: transcribe (the default) or translate."})
    max_label_tokens: int | None = field(
        default=None,
        metadata={"help": "Tokens after which a pseudo-label without an end is given up; default: the model's limit."},
    )
    window_seconds: int | None = field(
        default=None,
        metadata={
            "help": "Whisper: a shorter window than its 30 s, for short speech on small machines. The encoder then "
            "hears less silence than it was trained with, and the model must get used to that."
        },
    )


ASR_SEQ2SEQ = (
    SpeechDataArguments,
    SpeechModelArguments,
    AugmentationArguments,
    GeneratingTrainingArguments,
    PseudoLabelArguments,
)
"""The arguments of `build_asr_seq2seq`, for `parse`."""


def build_asr_seq2seq(
    data: SpeechDataArguments,
    model: SpeechModelArguments,
    augmentation: AugmentationArguments,
    args: GeneratingTrainingArguments,
    pseudo: PseudoLabelArguments,
) -> EMATrainerMixin:
    """The trainer of a recogniser: with pseudo-labels if there is unlabelled speech, else on labelled speech alone.

    Data is prepared by the main process first; features stay in the cache of `datasets`. Error rates are those of
    texts normalised as `text_case` and `remove_characters` say, on both sides. Speech that is longer than the window
    of the model is broken, as `on_bad_item` has it, unless `max_seconds` leaves it out of training.

    Raises:
        ValueError, FileNotFoundError, NotImplementedError: for what cannot be used, by name.
    """
    refuse_settings(data, args, pseudo)
    processor = AutoProcessor.from_pretrained(model.model_name_or_path)
    # The checkpoint's own dtype would have the optimizer work in bfloat16 too.
    network = AutoModelForSpeechSeq2Seq.from_pretrained(model.model_name_or_path, dtype=torch.float32)
    if model.window_seconds is not None:
        shorten_window(network, processor.feature_extractor, model.window_seconds)
    labeler = labeler_of(
        network, processor, language=model.language, task=model.task, max_label_tokens=model.max_label_tokens
    )
    shortest = shortest_seconds(network, processor.feature_extractor)
    data = replace(data, min_seconds=max(data.min_seconds, shortest))
    whisper = network.config.model_type == "whisper"
    targets = TextTargets(labeler, processor.tokenizer, leading_space=whisper)

    def prepare(dataset: Dataset, text_column: str | None, **limits: float) -> Dataset:
        limits["min_seconds"] = max(limits.get("min_seconds", 0.0), shortest)
        return prepare_seq2seq(
            dataset,
            processor,
            targets,
            audio_column=data.audio_column,
            text_column=text_column,
            num_proc=data.num_proc,
            max_tokens=labeler.max_target_tokens,
            on_bad_item=data.on_bad_item,
            **limits,
        )

    extractor = processor.feature_extractor
    frames, _ = window_frames(extractor)
    augmentation.check(extractor)
    views = augmentation.build(extractor, bins_first=frames is not None)
    with args.main_process_first(desc="preparing speech"):
        if data.streaming:
            sets = stream_sets(data, args, extractor, targets, prepare, max_tokens=labeler.max_target_tokens)
        else:
            sets = prepare_sets(data, load_transcribed(data, data.labelled, data.max_labelled), prepare)
    rates = {"wer": word_error_rate, "cer": character_error_rate}
    metrics = TextMetrics(processor.tokenizer, rates, data.normalised)
    shared: dict[str, Any] = {
        "model": network,
        "args": args,
        "train_dataset": sets.labelled,
        "eval_dataset": sets.eval_dataset,
        "processing_class": processor,
        "data_collator": CTCCollator.from_processor(processor) if frames is None else WindowCollator(frames),
        "compute_metrics": metrics.compute if args.predict_with_generate else None,
        "augmentation": views,
    }
    if sets.unlabelled is None:
        return EMASeq2SeqTrainer(**shared)
    return PseudoLabelSeq2SeqTrainer(
        **shared, unlabeled_dataset=sets.unlabelled, pseudo_label_args=pseudo, labeler=labeler
    )


def shortest_seconds(network: Any, extractor: Any) -> float:
    """Seconds of the shortest audio that the encoder can hear at all; 0 where it takes any.

    Convolutions over samples (Moonshine's) fail on what is shorter than they reach.

    Args:
        network: an encoder-decoder for speech.
        extractor: its feature extractor.
    """
    counts = any(hasattr(network, method) for method in LENGTH_METHODS)
    if not counts or extractor.model_input_names[0] != "input_values":
        return 0.0
    shortest = bisect.bisect_left(
        range(extractor.sampling_rate), 1, key=lambda samples: int(frames_of(network, torch.tensor([samples])))
    )
    return shortest / float(extractor.sampling_rate)


def shorten_window(network: Any, extractor: Any, seconds: int) -> None:
    """Cuts the window of a Whisper model and of its feature extractor to the first `seconds`, in place.

    The encoder keeps its first positions. Both are saved with the new window.

    Raises:
        ValueError: for another model, or a window that is not shorter than the model's.
    """
    frames, longest = window_frames(extractor)
    if network.config.model_type != "whisper" or frames is None:
        raise ValueError(f"window_seconds={seconds} is for Whisper, and the model is a {type(network).__name__}")
    if not 0 < seconds < longest:
        raise ValueError(
            f"window_seconds must be above 0 and below {longest:g}, the window of the model, got {seconds}"
        )
    encoder = network.get_encoder()
    known = encoder.embed_positions.weight
    positions = round(len(known) * seconds / longest)
    encoder.embed_positions = nn.Embedding.from_pretrained(known.detach()[:positions].clone(), freeze=True)
    encoder.max_source_positions = network.config.max_source_positions = positions
    extractor.chunk_length = seconds
    extractor.n_samples = seconds * extractor.sampling_rate
    extractor.nb_max_frames = extractor.n_samples // extractor.hop_length
