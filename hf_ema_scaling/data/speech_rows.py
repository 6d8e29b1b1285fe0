"""From audio and texts to the rows that a speech recogniser trains on, by CTC or with a decoder."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from datasets import Array2D, Audio, Dataset, Features, List, Value

from hf_ema_scaling.data.speech import FRAME_SECONDS, Waveform, quiet_unless_terminal, read_audio
from hf_ema_scaling.labels.ctc import non_target_ids

logger = logging.getLogger(__name__)

Ids = List(Value("int64"))


def prepare_ctc(
    dataset: Dataset,
    processor: Any,
    *,
    audio_column: str = "audio",
    text_column: str | None = "text",
    num_proc: int | None = None,
    min_seconds: float = 0.0,
    max_seconds: float = float("inf"),
) -> Dataset:
    """The rows a CTC model trains on; every column that is not named here is left behind.

    Rows are dropped, counted and logged when their audio is shorter than `min_seconds` ("too_short") or longer than
    `max_seconds` ("too_long"), too short for one frame or digitally silent, which normalisation turns into NaN
    ("no_features"), or when their text is blank ("empty_text").

    Args:
        dataset: audio as in `read_audio`, or an `Audio` column, which is read without `torchcodec`.
        processor: a processor, or with `text_column=None` a feature extractor.
        audio_column: name of the audio column.
        text_column: name of the transcript column; None for unlabelled data, whose rows then hold no `labels`.
        num_proc: processes, as in `Dataset.map`.
        min_seconds: shortest audio kept.
        max_seconds: longest audio kept.

    Returns:
        A data set in numpy format: `input_features` float32 (frames, bins) or `input_values` float32 (samples,),
        whichever the extractor makes; `labels` int64 (tokens,); `duration` in seconds.

    Raises:
        ValueError: when a column is missing, a text has characters that the vocabulary lacks or holds a special
            token, or no row is left.
        AudioError: when audio cannot be read.
    """
    _check_columns(dataset, audio_column, text_column)
    labels = None
    if text_column is not None:
        texts = dataset[text_column][:]
        _check_characters(texts, processor.tokenizer)
        labels = [_ctc_labels(str(text), processor.tokenizer) for text in texts]
    extractor = getattr(processor, "feature_extractor", processor)
    return _prepared(dataset, extractor, labels, audio_column, num_proc, (min_seconds, max_seconds))


def prepare_seq2seq(
    dataset: Dataset,
    processor: Any,
    target: Callable[[str], Sequence[int]],
    *,
    audio_column: str = "audio",
    text_column: str | None = "text",
    num_proc: int | None = None,
    min_seconds: float = 0.0,
    max_seconds: float = float("inf"),
    max_tokens: int | None = None,
) -> Dataset:
    """As `prepare_ctc`, the rows that an encoder-decoder for speech trains on.

    Features of extractors with a fixed window (Whisper's 30 s) are cut behind the speech and one frame of the padding
    that follows it, with which `WindowCollator` fills the window again, bit for bit. A row longer than the window is
    "too_long" whatever `max_seconds` is; one whose target has more than `max_tokens` ids is "too_many_tokens".

    Args:
        dataset: as in `prepare_ctc`.
        processor: a processor, or its feature extractor.
        target: the ids that the decoder is to learn for a text, such as `TextTargets`; none for a blank text.
        audio_column: name of the audio column.
        text_column: name of the transcript column; None for unlabelled data, whose rows then hold no `labels`.
        num_proc: processes, as in `Dataset.map`.
        min_seconds: shortest audio kept.
        max_seconds: longest audio kept.
        max_tokens: room of the decoder; None for no limit.

    Raises:
        ValueError: when a column is missing, `target` refuses a text, or no row is left.
        AudioError: when audio cannot be read.
    """
    _check_columns(dataset, audio_column, text_column)
    labels = None if text_column is None else [list(target(str(text))) for text in dataset[text_column]]
    extractor = getattr(processor, "feature_extractor", processor)
    seconds = min_seconds, min(max_seconds, window_frames(extractor)[1])
    return _prepared(dataset, extractor, labels, audio_column, num_proc, seconds, max_tokens)


def window_frames(extractor: Any) -> tuple[int | None, float]:
    """Frames and seconds of an extractor's fixed window; None and infinity where it has none."""
    frames = getattr(extractor, "nb_max_frames", None)
    return (None, math.inf) if frames is None else (int(frames), extractor.n_samples / extractor.sampling_rate)


def longest_first(dataset: Dataset) -> Dataset:
    """The rows by falling `duration`, for evaluation: batches hold little padding, and one too large shows at once."""
    return dataset.select(np.argsort(-np.asarray(dataset["duration"][:]), kind="stable"))


def _check_columns(dataset: Dataset, audio_column: str, text_column: str | None) -> None:
    for column in filter(None, (audio_column, text_column)):
        if column not in dataset.column_names:
            raise ValueError(f"no column '{column}' in the data set: it has {', '.join(dataset.column_names)}")
    if not len(dataset):
        raise ValueError("the data set has no rows")


def _prepared(
    dataset: Dataset,
    extractor: Any,
    labels: list[list[int]] | None,
    audio_column: str,
    num_proc: int | None,
    seconds: tuple[float, float],
    max_tokens: int | None = None,
) -> Dataset:
    """Rows of features, durations and, where there are any, labels, without those that cannot be used."""
    dataset = dataset.select_columns([audio_column])
    if isinstance(dataset.features[audio_column], Audio):
        dataset = dataset.cast_column(audio_column, Audio(decode=False))
    name = extractor.model_input_names[0]
    bins = _bins(extractor) if name == "input_features" else None
    # Array2D is read several times as fast as a list of lists, and rows keep their shape.
    inputs = List(Value("float32")) if bins is None else Array2D((None, bins), "float32")
    features = {name: inputs, "duration": Value("float32"), "dropped": Value("string")}
    if labels is not None:
        # Not a column of texts: tokenizers change as they work, and the cache would not know the data again.
        dataset = dataset.add_column("labels", labels, feature=Ids)
        features["labels"] = Ids
    with quiet_unless_terminal():
        # Through numpy: samples become an array without becoming a Python list first.
        prepared = dataset.with_format("numpy").map(
            _prepare_row,
            fn_kwargs={
                "extractor": extractor,
                "audio_column": audio_column,
                "seconds": seconds,
                "max_tokens": max_tokens,
                "missing": np.zeros(0 if bins is None else (0, bins), dtype=np.float32),
            },
            remove_columns=[audio_column],
            features=Features(features),
            num_proc=num_proc,
            desc="preparing speech",
        )
    reasons = [str(reason) for reason in prepared["dropped"]]
    prepared = prepared.remove_columns("dropped").with_format("numpy")
    dropped = Counter(reason for reason in reasons if reason)
    if not dropped:
        return prepared
    summary = ", ".join(f"{count} {reason}" for reason, count in sorted(dropped.items()))
    if dropped.total() == len(reasons):
        raise ValueError(f"all {len(reasons)} rows were dropped: {summary}")
    logger.warning("dropped %d of %d rows: %s", dropped.total(), len(reasons), summary)
    return prepared.select([row for row, reason in enumerate(reasons) if not reason])


def _bins(extractor: Any) -> int:
    """Width of a row of features, measured: extractors that stack frames give more than their `feature_size`."""
    noise = np.random.default_rng(0).standard_normal(extractor.sampling_rate).astype(np.float32)
    features = _features(noise, extractor, "input_features")
    assert features is not None
    return int(features.shape[-1])


def _check_characters(texts: Iterable[str], tokenizer: Any) -> None:
    texts = list(texts)
    missing = {
        character
        for character in {character for text in texts for character in text}
        if tokenizer.unk_token_id in tokenizer(character, add_special_tokens=False).input_ids
    }
    if missing:
        rows = [row for row, text in enumerate(texts) if not missing.isdisjoint(text)]
        raise ValueError(
            f"{len(missing)} characters are not in the vocabulary: {' '.join(map(repr, sorted(missing)[:40]))} (in "
            f"{len(rows)} of {len(texts)} texts, first in row {rows[0]}): normalise the texts (case, digits, "
            "punctuation), or build the processor from them"
        )


def _ctc_labels(text: str, tokenizer: Any) -> list[int]:
    ids: list[int] = tokenizer(" ".join(text.split()), add_special_tokens=False).input_ids
    special = non_target_ids(tokenizer).intersection(ids)
    if special:
        tokens = tokenizer.convert_ids_to_tokens(sorted(special))
        raise ValueError(f"text {text!r} holds {tokens}, which are special tokens and no CTC target: take them out")
    return ids


def _features(waveform: Waveform, extractor: Any, name: str) -> Waveform | None:
    """Features of one utterance without padding; None when there is no frame, or it cannot be normalised."""
    if name == "input_features" and len(waveform) < extractor.sampling_rate * FRAME_SECONDS:
        return None
    with np.errstate(divide="ignore", invalid="ignore"):
        made = extractor(waveform, sampling_rate=extractor.sampling_rate)
    features = np.asarray(made[name][0], dtype=np.float32)
    if window_frames(extractor)[0] is not None:
        # Frames are centred; behind the last one that reaches into the samples all are alike.
        frames = math.ceil((len(waveform) + extractor.n_fft // 2) / extractor.hop_length) + 1
        features = features.T[:frames]
        return features if features.min() < features.max() else None
    mask = made.get("attention_mask")
    if mask is not None:
        features = features[: int(np.asarray(mask[0]).sum())]
    return features if len(features) and np.isfinite(features).all() else None


def _prepare_row(
    row: Mapping[str, Any],
    extractor: Any,
    audio_column: str,
    seconds: tuple[float, float],
    max_tokens: int | None,
    missing: Waveform,
) -> dict[str, Any]:
    name = extractor.model_input_names[0]
    waveform = read_audio(row[audio_column], extractor.sampling_rate)
    duration = len(waveform) / extractor.sampling_rate
    prepared: dict[str, Any] = {name: missing, "duration": duration, "dropped": ""}
    tokens = None if "labels" not in row else len(row["labels"])
    if tokens == 0:
        prepared["dropped"] = "empty_text"
    elif tokens is not None and max_tokens is not None and tokens > max_tokens:
        prepared["dropped"] = "too_many_tokens"
    elif duration < seconds[0]:
        prepared["dropped"] = "too_short"
    elif duration > seconds[1]:
        prepared["dropped"] = "too_long"
    elif (features := _features(waveform, extractor, name)) is None:
        prepared["dropped"] = "no_features"
    else:
        prepared[name] = features
    return prepared
