"""What recipes of speech share: where speech comes from, how texts are normalised, SpecAugment, the sets of a run."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

from datasets import Dataset

from hf_ema_scaling.data.speech import SpecAugment
from hf_ema_scaling.data.speech_rows import longest_first
from hf_ema_scaling.recipe.sources import load_speech, named_sources


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

    def __post_init__(self) -> None:
        if self.text_case not in ("keep", "lower", "upper"):
            raise ValueError(f"text_case must be keep, lower or upper, got {self.text_case!r}")
        for name in ("max_labelled", "max_unlabelled", "max_evaluation"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")

    def normalised(self, text: str) -> str:
        """The text in the case, and without the characters, that the arguments say."""
        cases: dict[str, Callable[[str], str]] = {"keep": str, "lower": str.lower, "upper": str.upper}
        return cases[self.text_case](text.translate(str.maketrans("", "", self.remove_characters)))

    def evaluation_sources(self) -> dict[str, str]:
        """Sources by name; a single one has the name ''."""
        return named_sources(self.evaluation)


@dataclass
class AugmentationArguments:
    """SpecAugment on the student's input, from `augment_start` on; widths are in bins and frames."""

    spec_augment: bool = field(default=True, metadata={"help": "Mask bands and spans of log-mel features."})
    freq_masks: int = field(default=2, metadata={"help": "Masks over bins."})
    freq_width: int = field(default=15, metadata={"help": "Widest mask over bins."})
    time_masks: int = field(default=2, metadata={"help": "Masks over frames."})
    time_width: int = field(default=20, metadata={"help": "Widest mask over frames."})
    time_share: float = field(default=0.2, metadata={"help": "Widest mask over frames, as a share of the utterance."})

    def build(self, *, bins_first: bool = False) -> SpecAugment | None:
        """The augmentation, None if it is off; `bins_first` as in `SpecAugment`."""
        if not self.spec_augment:
            return None
        return SpecAugment(
            self.freq_masks,
            self.freq_width,
            self.time_masks,
            self.time_width,
            self.time_share,
            bins_first=bins_first,
        )


class Prepare(Protocol):
    """Makes rows for a model of loaded audio and texts; without texts where `text_column` is None."""

    def __call__(self, dataset: Dataset, text_column: str | None, **limits: float) -> Dataset:
        """The rows within the limits `min_seconds` and `max_seconds`; all lengths without."""
        ...


@dataclass
class SpeechSets:
    """The data of a run, ready for a trainer."""

    labelled: Dataset
    unlabelled: Dataset | None
    evaluation: dict[str, Dataset]
    """Sets by name, the longest rows first; a single one has the name ''."""

    @property
    def eval_dataset(self) -> Dataset | dict[str, Dataset] | None:
        """As a trainer takes it."""
        return self.evaluation.get("", self.evaluation or None)


def load_rows(data: SpeechDataArguments, source: str, limit: int | None, *, texts: bool = True) -> Dataset:
    """Audio of a source, undecoded, and normalised texts; of unlabelled speech no texts are read.

    Raises:
        ValueError, FileNotFoundError, NotImplementedError: see `load_speech`.
    """
    dataset = load_speech(source, audio_column=data.audio_column, text_column=data.text_column if texts else None)
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
        labelled: loaded already, by `load_rows`: a vocabulary may have been made of its texts.
        prepare: makes the rows.

    Raises:
        ValueError, FileNotFoundError, NotImplementedError: for what cannot be used, naming its source.
    """
    limits = {"min_seconds": data.min_seconds, "max_seconds": data.max_seconds or math.inf}
    with _naming(data.labelled):
        train = prepare(labelled, data.text_column, **limits)
    sets = {}
    for name, source in data.evaluation_sources().items():
        rows = load_rows(data, source, data.max_evaluation)
        with _naming(source):
            sets[name] = longest_first(prepare(rows, data.text_column))
    if data.unlabelled is None:
        return SpeechSets(train, None, sets)
    rows = load_rows(data, data.unlabelled, data.max_unlabelled, texts=False)
    with _naming(data.unlabelled):
        return SpeechSets(train, prepare(rows, None, **limits), sets)


@contextmanager
def _naming(source: str) -> Iterator[None]:
    """Inside, errors about values name the source."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error
