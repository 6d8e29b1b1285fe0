"""Speech that is read row by row while a recipe trains: nothing is downloaded or computed before the run."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Audio, IterableDataset, concatenate_datasets, load_dataset
from transformers import TrainingArguments

from hf_ema_scaling.data.bad_items import RAISE, BadItemError
from hf_ema_scaling.data.speech_rows import prepare_row, target_ids
from hf_ema_scaling.labels.ctc import frames_of, min_ctc_frames
from hf_ema_scaling.recipe.sources import load_speech
from hf_ema_scaling.recipe.speech import Prepare, SpeechDataArguments, SpeechSets, prepare_evaluation
from hf_ema_scaling.training import EMATrainingArguments, PseudoLabelArguments
from hf_ema_scaling.training.streaming import Refusal, refuse, stream_refusals

logger = logging.getLogger(__name__)


def refuse_settings(
    data: SpeechDataArguments,
    args: EMATrainingArguments,
    pseudo: PseudoLabelArguments,
    *,
    needs_alphabet: bool = False,
) -> None:
    """Refuses, all at once and before anything is read, what a recipe asks for that streams cannot do.

    Args:
        data: of the recipe; nothing is refused without `streaming`.
        args: of the recipe.
        pseudo: of the recipe, which count where there is unlabelled speech.
        needs_alphabet: whether a vocabulary would be made of all texts.

    Raises:
        ValueError, NotImplementedError: with all reasons, and what to write on the command line instead.
    """
    if not data.streaming:
        return
    names = ["train_dataset"] if data.unlabelled is None else ["train_dataset", "unlabeled_dataset"]
    found = stream_refusals(args, None if data.unlabelled is None else pseudo, names)
    if data.num_proc:
        found.append(
            Refusal(
                f"num_proc={data.num_proc} prepares features before the run, streaming computes them in it: leave "
                "num_proc out",
                {"num_proc": "null"},
            )
        )
    if needs_alphabet:
        found.append(
            Refusal(
                "streaming does not read all texts before the run: give the characters by alphabet",
                {"alphabet": "CHARACTERS"},
            )
        )
    refuse(found, flags=True)


def stream_sets(
    data: SpeechDataArguments,
    args: TrainingArguments,
    extractor: Any,
    target: Callable[[str], Sequence[int]],
    prepare: Prepare,
    *,
    max_tokens: int | None = None,
) -> SpeechSets:
    """As `prepare_sets`, with streams to train on; evaluation sets are prepared all the same.

    Args:
        data: where speech comes from.
        args: with the seed of the shuffle buffer and the number of processes.
        extractor: a feature extractor.
        target: the ids that are to be learnt for a text.
        prepare: makes the rows of evaluation sets.
        max_tokens: most ids of a text; None for no limit.

    Raises:
        ValueError, FileNotFoundError: as `prepare_sets`.
    """
    seed = args.seed if args.data_seed is None else args.data_seed

    def stream(source: str, limit: int | None, text_column: str | None) -> IterableDataset:
        rows = stream_speech(source, audio_column=data.audio_column, text_column=text_column, shards=args.world_size)
        rows = rows if limit is None else rows.take(limit)
        if text_column is not None:
            rows = rows.map(lambda row: {text_column: data.normalised(row[text_column])})
        if data.shuffle_buffer:
            rows = rows.shuffle(seed=seed, buffer_size=data.shuffle_buffer)
        return prepare_stream(
            rows,
            extractor,
            target,
            name=source,
            audio_column=data.audio_column,
            text_column=text_column,
            max_tokens=max_tokens,
            on_bad_item=data.on_bad_item,
            **data.limits(),
        )

    train = stream(data.labelled, data.max_labelled, data.text_column)
    sets = prepare_evaluation(data, prepare)
    unlabelled = None if data.unlabelled is None else stream(data.unlabelled, data.max_unlabelled, None)
    return SpeechSets(train, unlabelled, sets)


def stream_speech(
    source: str, *, audio_column: str = "audio", text_column: str | None = "text", shards: int = 1
) -> IterableDataset:
    """Audio, undecoded, and texts of a source, as a stream in the order they have there.

    Args:
        source: as in `SpeechDataArguments`. What is local is listed first and its audio read later; what is on the
            Hub is fetched while it is read.
        audio_column: column of the audio.
        text_column: column of the texts; None where there are none or they must not be read.
        shards: of local sources: one for each process, so that each reads its own; on the Hub they are the files.

    Raises:
        FileNotFoundError, ValueError: as `load_speech`.
    """
    before = source.rpartition(":")[0]
    here = Path(source).exists() or (before and Path(before).exists())
    if here or "://" in source or source.startswith((".", "/", "~")) or source.endswith((".jsonl", ".json", ".csv")):
        rows = load_speech(source, audio_column=audio_column, text_column=text_column)
        return rows.to_iterable_dataset(num_shards=min(shards, len(rows)))
    name, *rest = source.split(":")
    if len(rest) not in (1, 2) or not all(rest):
        raise ValueError(f"{source!r} is no file or folder here; a source on the Hub is owner/name:split")
    config = rest[0] if len(rest) == 2 else None
    try:
        parts = [load_dataset(name, config, split=split, streaming=True) for split in rest[-1].split("+")]
    except (OSError, ValueError) as error:
        raise ValueError(f"{source}: neither here nor on the Hub ({error})") from error
    dataset = parts[0] if len(parts) == 1 else concatenate_datasets(parts)
    wanted = [audio_column] if text_column is None else [audio_column, text_column]
    missing = [column for column in wanted if column not in (dataset.column_names or wanted)]
    if missing:
        raise ValueError(f"{source}: no column {', '.join(missing)}; it has {', '.join(dataset.column_names or [])}")
    if dataset.features is None or isinstance(dataset.features[audio_column], Audio):
        dataset = dataset.cast_column(audio_column, Audio(decode=False))
    return dataset.select_columns(wanted)


def prepare_stream(
    dataset: IterableDataset,
    extractor: Any,
    target: Callable[[str], Sequence[int]],
    *,
    name: str,
    audio_column: str = "audio",
    text_column: str | None = "text",
    min_seconds: float = 0.0,
    max_seconds: float = float("inf"),
    max_tokens: int | None = None,
    on_bad_item: str = RAISE,
) -> IterableDataset:
    """The rows a recogniser trains on, each computed when it is read; otherwise as `prepare_ctc`, `prepare_seq2seq`.

    What these drop is left out here too; the first row of each reason is logged, how many there are is not known.

    Args:
        dataset: audio as in `read_audio`, and texts.
        extractor: a feature extractor.
        target: the ids that are to be learnt for a text.
        name: of the source, for messages.
        audio_column: name of the audio column.
        text_column: name of the transcript column; None for unlabelled data, whose rows then hold no `labels`.
        min_seconds: shortest audio kept.
        max_seconds: longest audio kept.
        max_tokens: most ids of a text; None for no limit.
        on_bad_item: `raise` an error for a row that is broken, naming its place in the stream, or `skip` it.
    """
    missing = np.zeros(0, dtype=np.float32)

    def prepared(row: Mapping[str, Any], index: int) -> dict[str, Any]:
        labels: dict[str, Any] = {}
        bad_texts = {}
        if text_column is not None:
            labels["labels"] = []
            try:
                labels["labels"] = target_ids(row[text_column], text_column, target, max_tokens)
            except BadItemError as error:
                bad_texts[index] = error
        limits = min_seconds, max_seconds
        return labels | prepare_row(row, index, extractor, audio_column, bad_texts, limits, missing, on_bad_item)

    kept = _Kept(name, lambda row: row["dropped"])
    columns = [audio_column] if text_column is None else [audio_column, text_column]
    made = dataset.map(prepared, with_indices=True, remove_columns=columns)
    return made.filter(kept).remove_columns(["dropped", "why"])


def fitting_rows_of(model: torch.nn.Module, dataset: IterableDataset, name: str) -> IterableDataset:
    """The rows whose labels fit the frames that a CTC model makes of their audio; without labels one is enough."""

    def too_long(row: Mapping[str, Any]) -> str:
        inputs = row["input_features"] if "input_features" in row else row["input_values"]
        frames = int(frames_of(model, torch.tensor([len(inputs)])))
        if "labels" not in row:
            return "" if frames else "no_features"
        return "labels_need_more_frames" if min_ctc_frames([int(token) for token in row["labels"]]) > frames else ""

    return dataset.filter(_Kept(name, too_long))


class _Kept:
    """Whether a row has no reason to be dropped; logs the first row of each reason."""

    def __init__(self, name: str, reason: Callable[[Mapping[str, Any]], str]) -> None:
        self.name = name
        self.reason = reason
        self.seen: set[str] = set()

    def __call__(self, row: Mapping[str, Any]) -> bool:
        reason = self.reason(row)
        if reason and reason not in self.seen:
            self.seen.add(reason)
            logger.warning("%s: rows are left out as they are read, the first for %s", self.name, reason)
        return not reason
