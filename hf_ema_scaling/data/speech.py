"""From audio to the rows of a CTC model: features, characters, SpecAugment."""

from __future__ import annotations

import json
import logging
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
import torchaudio
from datasets import Array2D, Audio, Dataset, Features, List, Value
from torch import Tensor
from transformers import Speech2TextFeatureExtractor, Wav2Vec2BertProcessor, Wav2Vec2CTCTokenizer

from hf_ema_scaling.data.audio import Waveform, read_audio
from hf_ema_scaling.data.bad_items import (
    RAISE,
    UNWANTED,
    BadItemError,
    check_choice,
    counted,
    listed,
    text_of,
)
from hf_ema_scaling.data.seeding import spread_seed
from hf_ema_scaling.labels.ctc import non_target_ids

logger = logging.getLogger(__name__)

PAD, DELIMITER, UNKNOWN = "<pad>", "|", "<unk>"
FRAME_SECONDS = 0.025  # window of the log-mel extractors of transformers


def build_character_processor(
    texts: Iterable[str], *, sampling_rate: int = 16_000, num_mel_bins: int = 80
) -> Wav2Vec2BertProcessor:
    """A processor for a CTC model trained from scratch on log-mel features and characters.

    Features are Kaldi log-mel filter banks, every 10 ms, each bin with mean 0 and variance 1 over the utterance
    (`Speech2TextFeatureExtractor`). Ids are 0 `<pad>`, which is also the CTC blank, 1 `|` between words, 2 `<unk>`,
    then the characters in code point order. `Wav2Vec2BertProcessor` is the processor class of transformers that pairs
    `input_features` with this tokenizer; `AutoProcessor.from_pretrained` reads it back from its own folder.

    Args:
        texts: texts whose characters make the vocabulary, or an alphabet as one string. Case counts.
        sampling_rate: in hertz.
        num_mel_bins: features per frame.

    Raises:
        ValueError: when there are no characters.
    """
    characters = sorted({character for text in texts for character in text if not character.isspace()} - {DELIMITER})
    if not characters:
        raise ValueError("no characters to make a vocabulary of: give training texts, or an alphabet")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "vocab.json"
        file.write_text(json.dumps({token: i for i, token in enumerate([PAD, DELIMITER, UNKNOWN, *characters])}))
        tokenizer = Wav2Vec2CTCTokenizer(
            str(file), bos_token=None, eos_token=None, unk_token=UNKNOWN, pad_token=PAD, word_delimiter_token=DELIMITER
        )
    extractor = Speech2TextFeatureExtractor(
        feature_size=num_mel_bins, num_mel_bins=num_mel_bins, sampling_rate=sampling_rate
    )
    return Wav2Vec2BertProcessor(feature_extractor=extractor, tokenizer=tokenizer)


@contextmanager
def quiet_unless_terminal() -> Iterator[None]:
    """No progress bars of `datasets` where nobody would see them move."""
    silence = not sys.stderr.isatty() and not datasets.are_progress_bars_disabled()
    if silence:
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        if silence:
            datasets.enable_progress_bars()


def prepare_ctc(
    dataset: Dataset,
    processor: Any,
    *,
    audio_column: str = "audio",
    text_column: str | None = "text",
    num_proc: int | None = None,
    min_seconds: float = 0.0,
    max_seconds: float = float("inf"),
    on_bad_item: str = RAISE,
) -> Dataset:
    """The rows a CTC model trains on; every column that is not named here is left behind.

    Rows are dropped, counted and logged when their audio is shorter than `min_seconds` ("too_short") or longer than
    `max_seconds` ("too_long"), too short for one frame ("no_features") or digitally silent ("silent"), or when their
    text is blank ("empty_text"). Rows that are broken (audio that cannot be read, see `read_audio`; a text that is
    null, has characters that the vocabulary lacks or holds a special token) are errors, or dropped likewise.

    Args:
        dataset: audio as in `read_audio`, or an `Audio` column, which is read without `torchcodec`.
        processor: a processor, or with `text_column=None` a feature extractor.
        audio_column: name of the audio column.
        text_column: name of the transcript column; None for unlabelled data, whose rows then hold no `labels`.
        num_proc: processes, as in `Dataset.map`.
        min_seconds: shortest audio kept.
        max_seconds: longest audio kept.
        on_bad_item: `raise` an error for a broken row, or `skip` it, counted by reason and named in the log.

    Returns:
        A data set in numpy format: `input_features` float32 (frames, bins) or `input_values` float32 (samples,),
        whichever the extractor makes; `labels` int64 (tokens,); `duration` in seconds.

    Raises:
        ValueError: when a column is missing, or no row is left; with `on_bad_item="raise"` also for a broken row
            (`BadItemError`, of audio `AudioError`), naming it, counted from 1.
    """
    check_choice(on_bad_item)
    extractor = getattr(processor, "feature_extractor", processor)
    for column in filter(None, (audio_column, text_column)):
        if column not in dataset.column_names:
            raise ValueError(f"no column '{column}' in the data set: it has {', '.join(dataset.column_names)}")
    if not len(dataset):
        raise ValueError("the data set has no rows")
    columns = [audio_column] if text_column is None else [audio_column, text_column]
    dataset = dataset.select_columns(columns)
    if isinstance(dataset.features[audio_column], Audio):
        dataset = dataset.cast_column(audio_column, Audio(decode=False))
    if text_column is not None and on_bad_item == RAISE:
        _check_characters(dataset[text_column], processor.tokenizer)
    name, labelled = extractor.model_input_names[0], text_column is not None
    bins = _bins(extractor) if name == "input_features" else None
    # Array2D is read several times as fast as a list of lists, and rows keep their shape.
    inputs = List(Value("float32")) if bins is None else Array2D((None, bins), "float32")
    features = {name: inputs, "duration": Value("float32"), "dropped": Value("string"), "why": Value("string")}
    if labelled:
        features["labels"] = List(Value("int64"))
    with quiet_unless_terminal():
        # Through numpy: samples become an array without becoming a Python list first.
        prepared = dataset.with_format("numpy").map(
            _prepare_row,
            fn_kwargs={
                "processor": processor,
                "audio_column": audio_column,
                "text_column": text_column,
                "seconds": (min_seconds, max_seconds),
                "missing": np.zeros(0 if bins is None else (0, bins), dtype=np.float32),
                "on_bad_item": on_bad_item,
            },
            with_indices=True,
            remove_columns=columns,
            features=Features(features),
            num_proc=num_proc,
            desc="preparing speech",
        )
    reasons = [str(reason) for reason in prepared["dropped"]]
    why = [str(detail) for detail in prepared["why"] if detail]
    prepared = prepared.remove_columns(["dropped", "why"]).with_format("numpy")
    dropped = Counter(reason for reason in reasons if reason)
    if not dropped:
        return prepared
    summary = f"{counted(dropped)}; {listed(why, dropped.total())}"
    if dropped.total() == len(reasons):
        raise ValueError(f"all {len(reasons)} rows were dropped: {summary}")
    logger.warning("dropped %d of %d rows: %s", dropped.total(), len(reasons), summary)
    return prepared.select([row for row, reason in enumerate(reasons) if not reason])


def longest_first(dataset: Dataset) -> Dataset:
    """The rows by falling `duration`, for evaluation: batches hold little padding, and one too large shows at once."""
    return dataset.select(np.argsort(-np.asarray(dataset["duration"][:]), kind="stable"))


def _bins(extractor: Any) -> int:
    """Width of a row of features, measured: extractors that stack frames give more than their `feature_size`."""
    noise = np.random.default_rng(0).standard_normal(extractor.sampling_rate).astype(np.float32)
    features = extractor(noise, sampling_rate=extractor.sampling_rate)["input_features"]
    return int(np.asarray(features[0]).shape[-1])


def _check_characters(texts: Iterable[Any], tokenizer: Any) -> None:
    # White space becomes one space, see `_labels`.
    texts = [" ".join(text.split()) if isinstance(text, str) else "" for text in texts]
    missing = _unknown({character for text in texts for character in text}, tokenizer)
    if missing:
        rows = [row for row, text in enumerate(texts, start=1) if not missing.isdisjoint(text)]
        raise BadItemError(
            f"{_not_known(missing)} (in {len(rows)} of {len(texts)} texts, first in row {rows[0]}): normalise the "
            "texts (case, digits, punctuation), or build the processor from them",
            "unknown_characters",
        )


def _unknown(characters: Iterable[str], tokenizer: Any) -> set[str]:
    unknown = tokenizer.unk_token_id
    return {
        character
        for character in set(characters)
        if unknown in tokenizer(character, add_special_tokens=False).input_ids
    }


def _not_known(characters: Iterable[str]) -> str:
    characters = sorted(characters)
    return f"{len(characters)} characters are not in the vocabulary: {' '.join(map(repr, characters[:40]))}"


def _labels(text: str, tokenizer: Any) -> list[int]:
    text = " ".join(text.split())
    ids: list[int] = tokenizer(text, add_special_tokens=False).input_ids
    special = non_target_ids(tokenizer).intersection(ids)
    if special:
        if tokenizer.unk_token_id in special and (missing := _unknown(text, tokenizer)):
            raise BadItemError(f"text {text[:60]!r}: {_not_known(missing)}", "unknown_characters")
        tokens = tokenizer.convert_ids_to_tokens(sorted(special))
        raise BadItemError(
            f"text {text[:60]!r} holds {tokens}, which are special tokens and no CTC target: take them out",
            "special_tokens",
        )
    return ids


def features_of(waveform: Waveform, extractor: Any) -> Waveform:
    """Features of one utterance without padding, as the extractor makes them.

    Args:
        waveform: float32 (samples,) at the extractor's rate.
        extractor: a feature extractor of transformers.

    Returns:
        float32 `input_features` (frames, bins) or `input_values` (samples,).

    Raises:
        BadItemError: for digital silence ("silent"), which normalisation turns into NaN or noise; when there is no
            frame, or features are not finite ("no_features").
    """
    name, rate = extractor.model_input_names[0], extractor.sampling_rate
    if name == "input_features" and len(waveform) < rate * FRAME_SECONDS:
        raise BadItemError(f"{len(waveform)} samples make no frame", "no_features")
    if waveform.min() == waveform.max():
        raise BadItemError(f"digital silence of {len(waveform) / rate:.2f} s", "silent")
    with np.errstate(divide="ignore", invalid="ignore"):
        made = extractor(waveform, sampling_rate=rate)
    features = np.asarray(made[name][0], dtype=np.float32)
    mask = made.get("attention_mask")
    if mask is not None:
        features = features[: int(np.asarray(mask[0]).sum())]
    if not len(features) or not np.isfinite(features).all():
        raise BadItemError("no frame, or features that are not finite", "no_features")
    return features


def check_seconds(duration: float, seconds: tuple[float, float]) -> None:
    """Refuses audio outside a range of seconds.

    Raises:
        BadItemError: "too_short" or "too_long".
    """
    if duration < seconds[0]:
        raise BadItemError(f"{duration:.3f} s of audio, at least {seconds[0]:g} s are wanted", "too_short")
    if duration > seconds[1]:
        raise BadItemError(f"{duration:.3f} s of audio, at most {seconds[1]:g} s are wanted", "too_long")


def _prepare_row(
    row: Mapping[str, Any],
    index: int,
    processor: Any,
    audio_column: str,
    text_column: str | None,
    seconds: tuple[float, float],
    missing: Waveform,
    on_bad_item: str,
) -> dict[str, Any]:
    extractor = getattr(processor, "feature_extractor", processor)
    name = extractor.model_input_names[0]
    prepared: dict[str, Any] = {name: missing, "duration": 0.0, "dropped": "", "why": ""}
    if text_column is not None:
        prepared["labels"] = []
    try:
        waveform = read_audio(row[audio_column], extractor.sampling_rate)
        prepared["duration"] = len(waveform) / extractor.sampling_rate
        if text_column is not None:
            prepared["labels"] = _labels(text_of(row[text_column], text_column), processor.tokenizer)
            if not prepared["labels"]:
                raise BadItemError(f"{text_column} is empty", "empty_text")
        check_seconds(prepared["duration"], seconds)
        prepared[name] = features_of(waveform, extractor)
    except BadItemError as error:
        if on_bad_item == RAISE and error.reason not in UNWANTED:
            raise error.of(f"row {index + 1}") from error
        prepared |= {"dropped": error.reason, "why": f"row {index + 1}: {error}"}
    return prepared


class SpecAugment:
    """Masks bands of bins and spans of frames with zeros (SpecAugment, arXiv 1904.08779, without time warping).

    Zero is the mean of features that were normalised per utterance, as `build_character_processor` makes them. What a
    row becomes depends on its seed, content and length, not on its neighbours, the padding, the device or the global
    random state, which is left as it was.

    Args:
        num_freq_masks: masks over bins.
        freq_width: each is narrower than this many bins.
        num_time_masks: masks over frames.
        time_width: each is shorter than this many frames,
        time_share: and than this share of the utterance.

    Raises:
        ValueError: when a number is negative, or `time_share` is not in [0, 1].
    """

    def __init__(
        self,
        num_freq_masks: int = 2,
        freq_width: int = 15,
        num_time_masks: int = 2,
        time_width: int = 20,
        time_share: float = 0.2,
    ) -> None:
        counts = (num_freq_masks, freq_width, num_time_masks, time_width)
        if min(counts) < 0 or not 0.0 <= time_share <= 1.0:
            raise ValueError(f"masks {counts} must not be negative, and time_share {time_share} must be in [0, 1]")
        self.num_freq_masks = num_freq_masks
        self.freq_width = freq_width
        self.num_time_masks = num_time_masks
        self.time_width = time_width
        self.time_share = time_share

    def __call__(self, inputs: Mapping[str, Tensor], seeds: Sequence[int]) -> dict[str, Tensor]:
        """The `input_features` of padded inputs, masked; `attention_mask` tells their lengths where there is one.

        Raises:
            ValueError: when the inputs have no `input_features`.
        """
        features = inputs.get("input_features")
        if features is None:
            raise ValueError(f"SpecAugment masks 'input_features', which are not among the inputs {sorted(inputs)}")
        mask = inputs.get("attention_mask")
        lengths = [features.shape[1]] * len(features) if mask is None else mask.sum(-1)
        return {"input_features": self.masked(features, lengths, seeds)}

    def masked(self, features: Tensor, lengths: Tensor | Sequence[int], seeds: Sequence[int]) -> Tensor:
        """A masked copy of `features` (rows, frames, bins); padding behind `lengths` is not touched.

        Raises:
            ValueError: when there is not one length and one seed per row.
        """
        rows, frames, bins = features.shape
        sizes = [int(length) for length in lengths]
        if len(sizes) != rows or len(seeds) != rows or max(sizes, default=0) > frames:
            raise ValueError(
                f"features {tuple(features.shape)} need {rows} lengths of at most {frames} and {rows} seeds, got "
                f"{sizes} and {len(seeds)} seeds"
            )
        masked = torch.zeros(rows, frames, bins, dtype=torch.bool)
        # torchaudio draws from the global CPU generator, so each row seeds it and the fork puts it back.
        with torch.random.fork_rng(devices=[]):
            for row, (size, seed) in enumerate(zip(sizes, seeds, strict=True)):
                torch.default_generator.manual_seed(spread_seed(seed))
                masked[row, :size] = self._mask(size, bins)
        return features.masked_fill(masked.to(features.device), 0.0)

    def _mask(self, frames: int, bins: int) -> Tensor:
        """True (frames, bins) where one utterance is masked."""
        kept = torch.ones(1, frames, bins)
        time_width = min(self.time_width, int(frames * self.time_share))
        for _ in range(self.num_time_masks):
            kept = torchaudio.functional.mask_along_axis(kept, time_width, 0.0, axis=1)
        for _ in range(self.num_freq_masks):
            kept = torchaudio.functional.mask_along_axis(kept, min(self.freq_width, bins), 0.0, axis=2)
        return kept[0] == 0
