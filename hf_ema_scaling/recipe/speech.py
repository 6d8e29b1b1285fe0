"""What recipes of speech share: where speech comes from, how texts are normalised, views, the sets of a run."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from datasets import Dataset, IterableDataset

from hf_ema_scaling.data.bad_items import check_choice
from hf_ema_scaling.data.named_views import build_views, read_views
from hf_ema_scaling.data.speech import SpecAugment
from hf_ema_scaling.data.speech_rows import longest_first
from hf_ema_scaling.data.speech_views import AdditiveNoise, SpeedPerturbation
from hf_ema_scaling.data.views import Augmentation, Chain
from hf_ema_scaling.recipe.sources import load_speech, named_sources, naming
from hf_ema_scaling.recipe.text_views import refuse_both


@dataclass
class SpeechDataArguments:
    """Where speech comes from. A source is written in one of these ways (see `load_speech`).

    `data/train.jsonl`, `data/train.csv`: a manifest, one JSON object per line or a table with a header, audio paths
    relative to the manifest;
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

    def normalised(self, text: Any) -> Any:
        """The text in the case, and without the characters, that the arguments say; what is no string as it is."""
        if not isinstance(text, str):
            return text
        cases: dict[str, Callable[[str], str]] = {"keep": str, "lower": str.lower, "upper": str.upper}
        return cases[self.text_case](text.translate(str.maketrans("", "", self.remove_characters)))

    def limits(self) -> dict[str, float]:
        """Shortest and longest training audio, in seconds, as `prepare_ctc` takes them."""
        return {"min_seconds": self.min_seconds, "max_seconds": self.max_seconds or math.inf}

    def evaluation_sources(self) -> dict[str, str]:
        """Sources by name; a single one has the name ''."""
        return named_sources(self.evaluation)


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
    views: str | None = field(
        default=None,
        metadata={
            "help": "Views by name in an order of your own, in the place of all arguments above, as a mapping: "
            "{speed: {speeds: [0.9, 1.1]}, noise: {probability: 0.5}, spec_augment: {time_masks: 10}}."
        },
    )

    def __post_init__(self) -> None:
        if self.views is not None:
            read_views(self.views)
            refuse_both(self, {"speeds", "noise"})

    def check(self, extractor: Any) -> None:
        """Refuses views that do not go with what a model hears.

        Raises:
            ValueError: for SpecAugment where the model reads samples, and views that `build_views` refuses.
        """
        if self.views is not None:
            build_views(self.views, extractor)
        elif self.spec_augment and extractor.model_input_names[0] != "input_features":
            raise ValueError(
                "spec_augment masks log-mel features, and this model reads samples: set spec_augment to false"
            )

    def build(self, extractor: Any = None, *, bins_first: bool = False) -> Augmentation | None:
        """The augmentation, None if all is off.

        Args:
            extractor: of the model, for `views`.
            bins_first: as in `SpecAugment`: the model hears a window of fixed length.

        Raises:
            ValueError: for speeds in such a window, and views that `build_views` refuses.
        """
        if self.views is not None:
            return build_views(self.views, extractor)
        if self.speeds and bins_first:
            raise ValueError(
                f"speeds={self.speeds} change how long speech is, and this model hears a window of fixed length: "
                "leave speeds out"
            )
        views: list[Augmentation] = []
        if self.speeds:
            views.append(SpeedPerturbation(self.speeds))
        if self.noise:
            views.append(AdditiveNoise(self.noise, (self.noise_snr_min, self.noise_snr_max)))
        if self.spec_augment:
            views.append(
                SpecAugment(
                    self.freq_masks,
                    self.freq_width,
                    self.time_masks,
                    self.time_width,
                    self.time_share,
                    bins_first=bins_first,
                )
            )
        return Chain(*views) if len(views) > 1 else next(iter(views), None)


class Prepare(Protocol):
    """Makes rows for a model of loaded audio and texts; without texts where `text_column` is None."""

    def __call__(self, dataset: Dataset, text_column: str | None, **limits: float) -> Dataset:
        """The rows within the limits `min_seconds` and `max_seconds`; all lengths without."""
        ...


@dataclass
class SpeechSets:
    """The data of a run, ready for a trainer."""

    labelled: Dataset | IterableDataset
    unlabelled: Dataset | IterableDataset | None
    evaluation: dict[str, Dataset]
    """Sets by name, the longest rows first; a single one has the name ''."""

    @property
    def eval_dataset(self) -> Dataset | dict[str, Dataset] | None:
        """As a trainer takes it."""
        return self.evaluation.get("", self.evaluation or None)


def load_transcribed(data: SpeechDataArguments, source: str, limit: int | None, *, texts: bool = True) -> Dataset:
    """Audio of a source, undecoded, and normalised texts; of unlabelled speech no texts are read.

    Raises:
        ValueError, FileNotFoundError, NotImplementedError: see `load_speech`.
    """
    dataset = load_speech(
        source,
        audio_column=data.audio_column,
        text_column=data.text_column if texts else None,
        on_bad_item=data.on_bad_item,
    )
    dataset = dataset if limit is None else dataset.select(range(min(limit, len(dataset))))
    if not texts or (data.text_case == "keep" and not data.remove_characters):
        return dataset
    normalised = [data.normalised(text) for text in dataset[data.text_column]]
    # A column of its own: mapping would write the audio once more.
    return dataset.remove_columns(data.text_column).add_column(data.text_column, normalised)


def prepare_sets(data: SpeechDataArguments, labelled: Dataset, prepare: Prepare) -> SpeechSets:
    """All sets of a run, prepared; lengths are limited in training only.

    Args:
        data: where speech comes from.
        labelled: loaded already, by `load_transcribed`: a vocabulary may have been made of its texts.
        prepare: makes the rows.

    Raises:
        ValueError, FileNotFoundError, NotImplementedError: for what cannot be used, naming its source.
    """
    limits = data.limits()
    with naming(data.labelled):
        train = prepare(labelled, data.text_column, **limits)
    sets = prepare_evaluation(data, prepare)
    if data.unlabelled is None:
        return SpeechSets(train, None, sets)
    rows = load_transcribed(data, data.unlabelled, data.max_unlabelled, texts=False)
    with naming(data.unlabelled):
        return SpeechSets(train, prepare(rows, None, **limits), sets)


def prepare_evaluation(data: SpeechDataArguments, prepare: Prepare) -> dict[str, Dataset]:
    """The evaluation sets by name, the longest rows first; otherwise as `prepare_sets`."""
    sets = {}
    for name, source in data.evaluation_sources().items():
        rows = load_transcribed(data, source, data.max_evaluation)
        with naming(source):
            sets[name] = longest_first(prepare(rows, data.text_column))
    return sets
