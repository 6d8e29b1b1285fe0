"""The recipe for CTC speech recognition: its arguments, its data and model, its trainer."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from transformers import (
    CONFIG_MAPPING,
    AutoFeatureExtractor,
    AutoModelForCTC,
    AutoProcessor,
    Wav2Vec2BertProcessor,
    Wav2Vec2Processor,
    set_seed,
)

from hf_ema_scaling.data.bad_items import check_choice
from hf_ema_scaling.data.speech import SpecAugment, build_character_processor, longest_first, prepare_ctc
from hf_ema_scaling.data.speech_views import AdditiveNoise, SpeedPerturbation
from hf_ema_scaling.data.views import Augmentation, Chain
from hf_ema_scaling.labels import blank_id
from hf_ema_scaling.metrics import CTCMetrics
from hf_ema_scaling.recipe.config import close_names
from hf_ema_scaling.recipe.sources import load_speech, named_sources
from hf_ema_scaling.recipe.speech_streams import fitting_rows_of, prepare_ctc_stream, stream_speech
from hf_ema_scaling.training import EMATrainer, EMATrainingArguments, PseudoLabelArguments, PseudoLabelTrainer
from hf_ema_scaling.training.checks import drop_unfitting
from hf_ema_scaling.training.mixin import EMATrainerMixin


@dataclass
class SpeechDataArguments:
    """Where speech comes from. A source is written in one of these ways (see `load_speech`).

    `data/train.jsonl`: a manifest, one JSON object per line, audio paths relative to the manifest;
    `data/folder`: an audio folder (`metadata.jsonl` or `metadata.csv` with `file_name`, or audio files alone), or a
    saved `datasets` folder, there also `data/folder:split`;
    `owner/name:split`, `owner/name:config:split`: the Hub; splits are joined by `+`.
    """

    labelled: str = field(metadata={"help": "Source of labelled speech."})
    unlabelled: str | None = field(
        default=None,
        metadata={"help": "Source of unlabelled speech; its texts are never read. Turns pseudo-labels on."},
    )
    evaluation: str | None = field(
        default=None, metadata={"help": "Source of evaluation speech, or several: a mapping of names to sources."}
    )
    audio_column: str = field(default="audio", metadata={"help": "Column with the audio, in every source."})
    text_column: str = field(default="text", metadata={"help": "Column with the transcript."})
    text_case: str = field(default="keep", metadata={"help": "keep, lower or upper."})
    remove_characters: str = field(default="", metadata={"help": "Characters taken out of every text, as one string."})
    min_seconds: float = field(default=0.0, metadata={"help": "Shorter training audio is dropped."})
    max_seconds: float | None = field(default=None, metadata={"help": "Longer training audio is dropped."})
    max_labelled: int | None = field(default=None, metadata={"help": "Use the first so many rows only."})
    max_unlabelled: int | None = field(default=None, metadata={"help": "Use the first so many rows only."})
    max_evaluation: int | None = field(default=None, metadata={"help": "Use the first so many rows of each set only."})
    num_proc: int | None = field(default=None, metadata={"help": "Processes that compute features."})
    on_bad_item: str = field(
        default="raise",
        metadata={
            "help": "raise or skip: what to do with rows that are broken (audio that cannot be read, a text outside "
            "the vocabulary, a line that is no row); skipped ones are counted by reason and named in the log."
        },
    )

    streaming: bool = field(
        default=False,
        metadata={
            "help": "Read training speech row by row and compute features as it is read, in the place of preparing "
            "all of it first. Evaluation speech is prepared all the same."
        },
    )
    shuffle_buffer: int = field(
        default=1000, metadata={"help": "With streaming: rows (not decoded) of which the next is drawn; 0 for none."}
    )

    def __post_init__(self) -> None:
        check_choice(self.on_bad_item)
        if self.shuffle_buffer < 0:
            raise ValueError(f"shuffle_buffer must not be negative, got {self.shuffle_buffer}")
        if self.text_case not in ("keep", "lower", "upper"):
            raise ValueError(f"text_case must be keep, lower or upper, got {self.text_case!r}")
        for name in ("max_labelled", "max_unlabelled", "max_evaluation"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")

    def evaluation_sources(self) -> dict[str, str]:
        """Sources by name; a single one has the name ''."""
        return named_sources(self.evaluation)


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


@dataclass
class AugmentationArguments:
    """Views of the student's input from `augment_start` on: speed, then noise, then SpecAugment (bins and frames)."""

    spec_augment: bool = field(default=True, metadata={"help": "Mask bands and spans of log-mel features."})
    freq_masks: int = field(default=2, metadata={"help": "Masks over bins."})
    freq_width: int = field(default=15, metadata={"help": "Widest mask over bins."})
    time_masks: int = field(default=2, metadata={"help": "Masks over frames."})
    time_width: int = field(default=20, metadata={"help": "Widest mask over frames."})
    time_share: float = field(default=0.2, metadata={"help": "Widest mask over frames, as a share of the utterance."})

    speeds: list[float] = field(
        default_factory=list,
        metadata={
            "help": "Speeds with equal chances, such as 0.9 1.0 1.1; none: speech is left at its speed. Rows whose "
            "label would not fit the frames of faster speech stay at their own."
        },
    )
    noise: float = field(default=0.0, metadata={"help": "Probability with which a row gets white noise."})
    noise_snr_min: float = field(default=10.0, metadata={"help": "Lowest ratio of signal to noise, in dB."})
    noise_snr_max: float = field(default=30.0, metadata={"help": "Highest ratio of signal to noise, in dB."})

    def build(self) -> Augmentation | None:
        """The augmentation, None if all is off."""
        views: list[Augmentation] = []
        if self.speeds:
            views.append(SpeedPerturbation(self.speeds))
        if self.noise:
            views.append(AdditiveNoise(self.noise, (self.noise_snr_min, self.noise_snr_max)))
        if self.spec_augment:
            views.append(
                SpecAugment(self.freq_masks, self.freq_width, self.time_masks, self.time_width, self.time_share)
            )
        return Chain(*views) if len(views) > 1 else next(iter(views), None)


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
    if data.streaming and data.num_proc:
        raise ValueError(f"num_proc={data.num_proc} prepares features before the run, streaming computes them in it")
    limits: dict[str, Any] = {"min_seconds": data.min_seconds, "max_seconds": data.max_seconds or math.inf}

    def load(source: str, limit: int | None, texts: bool = True) -> Dataset:
        dataset = load_speech(
            source,
            audio_column=data.audio_column,
            text_column=data.text_column if texts else None,
            on_bad_item=data.on_bad_item,
        )
        dataset = dataset if limit is None else dataset.select(range(min(limit, len(dataset))))
        return _with_texts(dataset, data) if texts else dataset

    def stream(source: str, limit: int | None, texts: bool = True) -> IterableDataset:
        column = data.text_column if texts else None
        columns: dict[str, Any] = {"audio_column": data.audio_column, "text_column": column}
        rows = stream_speech(source, **columns, shards=args.world_size)
        rows = rows if limit is None else rows.take(limit)
        rows = rows.map(_text_normaliser(data)) if texts else rows
        if data.shuffle_buffer:
            seed = args.seed if args.data_seed is None else args.data_seed
            rows = rows.shuffle(seed=seed, buffer_size=data.shuffle_buffer)
        return prepare_ctc_stream(rows, processor, name=source, on_bad_item=data.on_bad_item, **columns, **limits)

    def prepare(source: str, dataset: Dataset, texts: bool = True, **limits: float) -> Dataset:
        try:
            return prepare_ctc(
                dataset,
                processor,
                audio_column=data.audio_column,
                text_column=data.text_column if texts else None,
                num_proc=data.num_proc,
                on_bad_item=data.on_bad_item,
                **limits,
            )
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from error

    config = None if model.model_config is None else new_config(model.model_config)
    with args.main_process_first(desc="preparing speech"):
        train: Any
        if data.streaming:
            processor = _processor(model, config, None)
            train = stream(data.labelled, data.max_labelled)
        else:
            labelled = load(data.labelled, data.max_labelled)
            texts = [text for text in labelled[data.text_column] if isinstance(text, str)]
            processor = _processor(model, config, texts)
            train = prepare(data.labelled, labelled, **limits)
        sets = {
            name: longest_first(prepare(source, load(source, data.max_evaluation)))
            for name, source in data.evaluation_sources().items()
        }
        unlabelled: Any = None
        if data.unlabelled is not None and data.streaming:
            unlabelled = stream(data.unlabelled, data.max_unlabelled, texts=False)
        elif data.unlabelled is not None:
            loaded = load(data.unlabelled, data.max_unlabelled, texts=False)
            unlabelled = prepare(data.unlabelled, loaded, texts=False, **limits)
    if augmentation.spec_augment and processor.feature_extractor.model_input_names[0] != "input_features":
        raise ValueError(
            "spec_augment masks log-mel features, and this model reads samples: set spec_augment to false"
        )
    set_seed(args.seed if model.init_seed is None else model.init_seed)
    network = _network(model, config, processor.tokenizer)
    shared: dict[str, Any] = {
        "model": network,
        "args": args,
        "train_dataset": (fitting_rows_of if data.streaming else drop_unfitting)(network, train, data.labelled),
        "eval_dataset": sets.get("", sets or None),
        "processing_class": processor,
        "compute_metrics": CTCMetrics(processor.tokenizer, blank_id(network.config)).compute,
        "augmentation": augmentation.build(),
    }
    if unlabelled is None:
        return EMATrainer(**shared)
    unlabelled = drop_unfitting(network, unlabelled, str(data.unlabelled))
    return PseudoLabelTrainer(**shared, unlabeled_dataset=unlabelled, pseudo_label_args=pseudo)


def _with_texts(dataset: Dataset, data: SpeechDataArguments) -> Dataset:
    """The data set with normalised texts."""
    if data.text_case == "keep" and not data.remove_characters:
        return dataset
    normalised = _text_normaliser(data)
    texts = [normalised({data.text_column: text})[data.text_column] for text in dataset[data.text_column]]
    # A column of its own: mapping would write the audio once more.
    return dataset.remove_columns(data.text_column).add_column(data.text_column, texts)


def _text_normaliser(data: SpeechDataArguments) -> Callable[[Mapping[str, Any]], dict[str, Any]]:
    """What makes the text column of a row; what is no text is left for the checks to come."""
    table = str.maketrans("", "", data.remove_characters)
    cases: dict[str, Callable[[str], str]] = {"keep": str, "lower": str.lower, "upper": str.upper}

    def normalised(row: Mapping[str, Any]) -> dict[str, Any]:
        text = row[data.text_column]
        return {data.text_column: cases[data.text_case](text.translate(table)) if isinstance(text, str) else text}

    return normalised


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
    if texts is None and model.alphabet is None:
        raise ValueError("streaming does not read all texts before the run: give the characters by alphabet")
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
