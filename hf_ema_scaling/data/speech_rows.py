"""From audio and texts to the rows that a speech recogniser trains on, by CTC or with a decoder."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from datasets import Array2D, Audio, Dataset, Features, List, Value

from hf_ema_scaling.data.audio import Waveform, read_audio
from hf_ema_scaling.data.bad_items import RAISE, UNWANTED, BadItemError, check_choice, counted, listed, text_of
from hf_ema_scaling.data.speech import quiet_unless_terminal
from hf_ema_scaling.labels.ctc import non_target_ids

logger = logging.getLogger(__name__)

FRAME_SECONDS = 0.025  # window of the log-mel extractors of transformers
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
    _check(dataset, audio_column, text_column, on_bad_item)
    labels: list[list[int]] | None = None
    bad_texts: dict[int, BadItemError] = {}
    if text_column is not None:
        if on_bad_item == RAISE:
            _check_characters(dataset[text_column], processor.tokenizer)
        target = partial(ctc_ids, tokenizer=processor.tokenizer)
        labels, bad_texts = _targets(dataset[text_column], text_column, target, on_bad_item)
    extractor = getattr(processor, "feature_extractor", processor)
    seconds = min_seconds, max_seconds
    return _prepared(dataset, extractor, audio_column, labels, bad_texts, seconds, num_proc, on_bad_item)


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
    on_bad_item: str = RAISE,
) -> Dataset:
    """As `prepare_ctc`, the rows that an encoder-decoder for speech trains on.

    Features of extractors with a fixed window (Whisper's 30 s) are cut behind the speech and one frame of the padding
    that follows it, with which `WindowCollator` fills the window again, bit for bit. A row longer than the window is
    broken ("beyond_window"), unless `max_seconds` leaves it out; one whose target has more than `max_tokens` ids is
    "too_many_tokens".

    Args:
        dataset: as in `prepare_ctc`.
        processor: a processor, or its feature extractor.
        target: the ids that the decoder is to learn for a text, such as `TextTargets`; none for a blank text. Refuses
            a broken text by `BadItemError`.
        audio_column: name of the audio column.
        text_column: name of the transcript column; None for unlabelled data, whose rows then hold no `labels`.
        num_proc: processes, as in `Dataset.map`.
        min_seconds: shortest audio kept.
        max_seconds: longest audio kept.
        max_tokens: room of the decoder; None for no limit.
        on_bad_item: as in `prepare_ctc`; broken is a text that is null or that `target` refuses.

    Raises:
        ValueError: as `prepare_ctc`.
    """
    _check(dataset, audio_column, text_column, on_bad_item)
    labels: list[list[int]] | None = None
    bad_texts: dict[int, BadItemError] = {}
    if text_column is not None:
        labels, bad_texts = _targets(dataset[text_column], text_column, target, on_bad_item, max_tokens)
    extractor = getattr(processor, "feature_extractor", processor)
    seconds = min_seconds, max_seconds
    return _prepared(dataset, extractor, audio_column, labels, bad_texts, seconds, num_proc, on_bad_item)


def window_frames(extractor: Any) -> tuple[int | None, float]:
    """Frames and seconds of an extractor's fixed window; None and infinity where it has none."""
    frames = getattr(extractor, "nb_max_frames", None)
    return (None, math.inf) if frames is None else (int(frames), extractor.n_samples / extractor.sampling_rate)


def longest_first(dataset: Dataset) -> Dataset:
    """The rows by falling `duration`, for evaluation: batches hold little padding, and one too large shows at once."""
    return dataset.select(np.argsort(-np.asarray(dataset["duration"][:]), kind="stable"))


def features_of(waveform: Waveform, extractor: Any) -> Waveform:
    """Features of one utterance without padding, as the extractor makes them.

    Args:
        waveform: float32 (samples,) at the extractor's rate; not longer than its window where it has one.
        extractor: a feature extractor of transformers.

    Returns:
        float32 `input_features` (frames, bins) or `input_values` (samples,); of a window the frames that hold speech
        and one of the padding behind it.

    Raises:
        BadItemError: for digital silence ("silent"), which normalisation turns into NaN or noise; when there is no
            frame, or features are all alike in a window or not finite ("no_features").
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
    if window_frames(extractor)[0] is not None:
        # Frames are centred; behind the last one that reaches into the samples all are alike.
        frames = math.ceil((len(waveform) + extractor.n_fft // 2) / extractor.hop_length) + 1
        features = features.T[:frames]
        if features.min() == features.max():
            raise BadItemError("sound below the floor of the logarithm: features are all alike", "no_features")
    elif mask is not None:
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


def check_window(duration: float, extractor: Any) -> None:
    """Refuses audio that a model with a fixed window would hear the beginning of only.

    Raises:
        BadItemError: "beyond_window".
    """
    longest = window_frames(extractor)[1]
    if duration > longest:
        raise BadItemError(
            f"{duration:.3f} s of audio, and the model hears {longest:g} s at once, without times to go on from: cut "
            f"the audio into pieces, or leave longer rows out by max_seconds={longest:g}",
            "beyond_window",
            duration,
        )


def ctc_ids(text: str, tokenizer: Any) -> list[int]:
    """The ids that a CTC model learns for a text, whose white space counts as single spaces; none for a blank one.

    Raises:
        BadItemError: for characters that the vocabulary lacks ("unknown_characters"), and for special tokens.
    """
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


def target_ids(
    value: Any, text_column: str, target: Callable[[str], Sequence[int]], max_tokens: int | None = None
) -> list[int]:
    """The labels of one row.

    Args:
        value: what the row holds as its text.
        text_column: where it holds it.
        target: the ids that are to be learnt for a text.
        max_tokens: most of them; None for no limit.

    Raises:
        BadItemError: for no text ("no_text", "not_utf8", "empty_text"), one with more ids ("too_many_tokens"), and
            what `target` refuses.
    """
    ids = list(target(text_of(value, text_column)))
    if not ids:
        raise BadItemError(f"{text_column} is empty", "empty_text")
    if max_tokens is not None and len(ids) > max_tokens:
        raise BadItemError(f"{text_column} has {len(ids)} tokens, there is room for {max_tokens}", "too_many_tokens")
    return ids


def prepare_row(
    row: Mapping[str, Any],
    index: int,
    extractor: Any,
    audio_column: str,
    bad_texts: Mapping[int, BadItemError],
    seconds: tuple[float, float],
    missing: Waveform,
    on_bad_item: str,
) -> dict[str, Any]:
    """Features of one row, its `duration`, and why it is `dropped` (a reason, or '') with the message (`why`).

    Args:
        row: with its audio.
        index: of the row, from 0.
        extractor: a feature extractor.
        audio_column: name of the audio column.
        bad_texts: what is wrong with the texts of rows, by index.
        seconds: shortest and longest audio kept.
        missing: the features of rows that are dropped.
        on_bad_item: as in `prepare_ctc`.

    Raises:
        BadItemError: for a broken row, naming it, unless it is skipped.
    """
    name = extractor.model_input_names[0]
    prepared: dict[str, Any] = {name: missing, "duration": 0.0, "dropped": "", "why": ""}
    try:
        longest = math.inf if index in bad_texts else seconds[1]
        waveform = read_audio(row[audio_column], extractor.sampling_rate, longest)
        prepared["duration"] = len(waveform) / extractor.sampling_rate
        if index in bad_texts:
            raise bad_texts[index]
        check_seconds(prepared["duration"], seconds)
        check_window(prepared["duration"], extractor)
        prepared[name] = features_of(waveform, extractor)
    except BadItemError as error:
        prepared |= {"dropped": error.reason, "why": str(_left_out(error, index, on_bad_item))}
    return prepared


def _left_out(error: BadItemError, index: int, on_bad_item: str) -> BadItemError:
    """The error with the row's number; raised where the row is broken and is not skipped."""
    named = error.of(f"row {index + 1}")
    if on_bad_item == RAISE and error.reason not in UNWANTED:
        raise named from error
    return named


def _check(dataset: Dataset, audio_column: str, text_column: str | None, on_bad_item: str) -> None:
    check_choice(on_bad_item)
    for column in filter(None, (audio_column, text_column)):
        if column not in dataset.column_names:
            raise ValueError(f"no column '{column}' in the data set: it has {', '.join(dataset.column_names)}")
    if not len(dataset):
        raise ValueError("the data set has no rows")


def _targets(
    texts: Iterable[Any],
    text_column: str,
    target: Callable[[str], Sequence[int]],
    on_bad_item: str,
    max_tokens: int | None = None,
) -> tuple[list[list[int]], dict[int, BadItemError]]:
    """Labels of all rows, empty where the text is of no use, and what is wrong with those texts."""
    labels: list[list[int]] = []
    bad: dict[int, BadItemError] = {}
    for index, text in enumerate(texts):
        try:
            labels.append(target_ids(text, text_column, target, max_tokens))
        except BadItemError as error:
            # Before any features are computed.
            _left_out(error, index, on_bad_item)
            labels.append([])
            bad[index] = error
    return labels, bad


def _prepared(
    dataset: Dataset,
    extractor: Any,
    audio_column: str,
    labels: list[list[int]] | None,
    bad_texts: Mapping[int, BadItemError],
    seconds: tuple[float, float],
    num_proc: int | None,
    on_bad_item: str,
) -> Dataset:
    """Rows of features, durations and, where there are any, labels, without those that cannot be used."""
    if labels is not None:
        # Not a column of texts: tokenizers change as they work, and the cache would not know the data again. Added
        # before other columns go: `datasets` cannot add to a saved data set that a column in memory was taken out of.
        if "labels" in dataset.column_names:
            dataset = dataset.rename_column("labels", "labels of the data set")
        dataset = dataset.add_column("labels", labels, feature=Ids)
    dataset = dataset.select_columns([audio_column, *([] if labels is None else ["labels"])])
    if isinstance(dataset.features[audio_column], Audio):
        dataset = dataset.cast_column(audio_column, Audio(decode=False))
    name = extractor.model_input_names[0]
    bins = _bins(extractor) if name == "input_features" else None
    # Array2D is read several times as fast as a list of lists, and rows keep their shape.
    inputs = List(Value("float32")) if bins is None else Array2D((None, bins), "float32")
    features = {name: inputs, "duration": Value("float32"), "dropped": Value("string"), "why": Value("string")}
    if labels is not None:
        features["labels"] = Ids
    with quiet_unless_terminal():
        # Through numpy: samples become an array without becoming a Python list first.
        prepared = dataset.with_format("numpy").map(
            prepare_row,
            fn_kwargs={
                "extractor": extractor,
                "audio_column": audio_column,
                "bad_texts": bad_texts,
                "seconds": seconds,
                "missing": np.zeros(0 if bins is None else (0, bins), dtype=np.float32),
                "on_bad_item": on_bad_item,
            },
            with_indices=True,
            remove_columns=[audio_column],
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


def _bins(extractor: Any) -> int:
    """Width of a row of features, measured: extractors that stack frames give more than their `feature_size`."""
    noise = np.random.default_rng(0).standard_normal(extractor.sampling_rate).astype(np.float32)
    return int(features_of(noise, extractor).shape[-1])


def _check_characters(texts: Iterable[Any], tokenizer: Any) -> None:
    # White space becomes one space, see `ctc_ids`.
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
