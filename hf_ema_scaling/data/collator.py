"""From the items of one step to its micro-batches, padded one by one."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from itertools import groupby
from typing import Any, NotRequired, TypedDict

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from hf_ema_scaling.data.sampler import LABELLED_ONLY, Draw
from hf_ema_scaling.data.stream import UNLABELLED
from hf_ema_scaling.data.streaming import StreamHead, is_stream

Example = Mapping[str, Any]
Collate = Callable[[list[dict[str, Any]]], Mapping[str, Any]]

# The columns that transformers' collators turn into `labels`.
LABEL_COLUMNS = ("labels", "label", "label_ids")


class MicroBatch(TypedDict):
    """One forward and backward pass, or one of the teacher: rows of one source, padded to their own longest row."""

    source: int
    """`LABELLED` or `UNLABELLED`."""
    inputs: dict[str, Tensor]
    """What the base collator made of the rows; `labels` only for labelled rows."""
    positions: list[int]
    """Place of each row in the reference stream."""
    indices: list[int]
    """Row number of each row in its data set."""
    weight: float
    """1.0; 0.0 for padding that keeps processes in step."""
    example_weights: NotRequired[Tensor]
    """float32 `(rows,)`, weight of each row's loss, 0 for a dropped label; absent where every row counts 1."""


class TwoSourceDataset(Dataset[tuple[Draw, Example]]):
    """Labelled and unlabelled data behind one `Draw`-indexed data set.

    Columns in `keep` reach the collator, of unlabelled rows also those in `for_labeler`; all others are left behind.
    `labels` of unlabelled rows never leave here.

    Of a stream only its first rows are here, in their order, for a look at the data before a run (`StreamHead`); the
    run reads it through `StepStream`.
    """

    def __init__(
        self,
        labelled: Any,
        unlabelled: Any | None,
        *,
        keep: Collection[str] | None = None,
        for_labeler: Collection[str] = (),
    ) -> None:
        self.sources: tuple[Any, Any] = (
            _by_number(labelled, "train_dataset"),
            _by_number(unlabelled, "unlabeled_dataset"),
        )
        self.keep = None if keep is None else frozenset(keep)
        self.for_labeler = frozenset(for_labeler)

    def __len__(self) -> int:
        return sum(len(source) for source in self.sources if source is not None)

    def __getitem__(self, draw: Draw) -> tuple[Draw, Example]:
        return draw, self.visible(draw.source, self.sources[draw.source][draw.index])

    def __getitems__(self, draws: Sequence[Draw]) -> list[tuple[Draw, Example]]:
        """All rows of a step, with one access for each run of rows of one source where the data set allows it."""
        rows: list[tuple[Draw, Example]] = []
        for kind, group in groupby(draws, key=lambda draw: draw.source):
            members = list(group)
            source = self.sources[kind]
            indices = [draw.index for draw in members]
            fetched = source.__getitems__(indices) if hasattr(source, "__getitems__") else [source[i] for i in indices]
            rows.extend((draw, self.visible(kind, row)) for draw, row in zip(members, fetched, strict=True))
        return rows

    def at_most(self, kind: int, count: int) -> int:
        """How many of the first `count` rows of a source there are."""
        source = self.sources[kind]
        return source.at_most(count) if isinstance(source, StreamHead) else min(count, len(source))

    def visible(self, kind: int, row: Example) -> Example:
        """What may be seen of a row of a source."""
        hidden: Collection[str] = self.for_labeler
        also: Collection[str] = ()
        if kind == UNLABELLED:
            hidden, also = LABEL_COLUMNS, self.for_labeler
        return {
            name: value
            for name, value in row.items()
            if name not in hidden and (self.keep is None or name in self.keep or name in also)
        }


def _by_number(dataset: Any, name: str) -> Any:
    return StreamHead(dataset, name) if is_stream(dataset) else dataset


class MicroBatchCollator:
    """Groups the rows of one step into micro-batches and pads each with the base collator.

    Returns `{"micro_batches": [MicroBatch, ...]}`, and beside it `"label_batches"` where the sampler groups unlabelled
    rows for the teacher (`Draw.label_batch`); rows that are labelled only are in these alone. There is no top-level
    `labels`, so Trainer counts no items and scales no loss.
    """

    def __init__(self, collate: Collate) -> None:
        self.collate = collate

    def __call__(self, rows: Sequence[tuple[Draw, Example]]) -> dict[str, list[MicroBatch]]:
        """The micro-batches of the rows that `TwoSourceDataset` gave for one step of one process."""
        drawn = [row for row in rows if row[0].micro_batch != LABELLED_ONLY]
        groups = [list(group) for _, group in groupby(drawn, key=lambda row: row[0].micro_batch)]
        batches = {"micro_batches": [self._collated(group) for group in groups]}
        for_teacher: dict[int, list[tuple[Draw, Example]]] = {}
        for row in rows:
            if row[0].label_batch is not None:
                for_teacher.setdefault(row[0].label_batch, []).append(row)
        if for_teacher:
            batches["label_batches"] = [self._collated(for_teacher[number]) for number in sorted(for_teacher)]
        return batches

    def _collated(self, rows: Sequence[tuple[Draw, Example]]) -> MicroBatch:
        draws = [draw for draw, _ in rows]
        inputs = dict(self.collate([dict(example) for _, example in rows]))
        if draws[0].source == UNLABELLED:
            # Language-model collators make labels of the inputs themselves.
            inputs.pop("labels", None)
        return MicroBatch(
            source=draws[0].source,
            inputs=inputs,
            positions=[draw.position for draw in draws],
            indices=[draw.index for draw in draws],
            weight=draws[0].weight,
        )


def pad_labels(ids: Sequence[Sequence[int]]) -> Tensor:
    """Label rows as an int64 tensor `(rows, longest)`, padded with -100 (at least one column)."""
    padded = torch.full((len(ids), max([1, *(len(row) for row in ids)])), -100, dtype=torch.long)
    for row, values in zip(padded, ids, strict=True):
        row[: len(values)] = torch.tensor(np.asarray(values), dtype=torch.long)
    return padded


class CTCCollator:
    """Pads speech rows: `input_features` `(rows, frames, mels)` or `input_values` `(rows, samples)`, and `labels`.

    Padding is `padding_value`; `attention_mask` marks what is not padding, unless `attention_mask=False` (models with
    group norm in their feature encoder were trained without one). Labels are padded with -100.

    Args:
        padding_value: what frames or samples are padded with.
        attention_mask: whether rows get an attention mask.

    Raises:
        ValueError: when a row has neither input, or holds values that are not finite.
    """

    def __init__(self, *, padding_value: float = 0.0, attention_mask: bool = True) -> None:
        self.padding_value = padding_value
        self.attention_mask = attention_mask

    @classmethod
    def from_processor(cls, processor: Any) -> CTCCollator:
        """The collator that a processor (or feature extractor) asks for."""
        extractor = getattr(processor, "feature_extractor", processor)
        return cls(
            padding_value=float(getattr(extractor, "padding_value", 0.0)),
            attention_mask=bool(getattr(extractor, "return_attention_mask", True)),
        )

    def __call__(self, rows: Sequence[Example]) -> dict[str, Tensor]:
        """Pad the rows: float32 inputs, int64 `attention_mask` and `labels`."""
        name = next((key for key in ("input_features", "input_values") if key in rows[0]), None)
        if name is None:
            raise ValueError(f"a speech row needs 'input_features' or 'input_values', got {sorted(rows[0])}")
        inputs = [torch.tensor(np.asarray(row[name]), dtype=torch.float32) for row in rows]
        padded = torch.nn.utils.rnn.pad_sequence(inputs, batch_first=True, padding_value=self.padding_value)
        if not torch.isfinite(padded).all():
            bad = next(i for i, row in enumerate(inputs) if not torch.isfinite(row).all())
            raise ValueError(f"row {bad} of the batch holds values in '{name}' that are not finite")
        batch = {name: padded}
        if self.attention_mask:
            lengths = torch.tensor([len(row) for row in inputs])
            batch["attention_mask"] = (torch.arange(padded.shape[1])[None] < lengths[:, None]).long()
        if "labels" in rows[0]:
            batch["labels"] = pad_labels([row["labels"] for row in rows])
        return batch


class WindowCollator:
    """Fills rows of features up to the fixed window of the model (Whisper's 30 s), and pads their labels.

    Rows are `input_features` (frames, bins), cut by `prepare_seq2seq` behind one frame of padding, which is repeated:
    what the window is padded with depends on the loudest frame of the utterance.

    Args:
        frames: of the window.
    """

    def __init__(self, frames: int) -> None:
        self.frames = frames

    def __call__(self, rows: Sequence[Example]) -> dict[str, Tensor]:
        """`input_features` float32 (rows, bins, frames of the window) and `labels` int64, padded with -100.

        Raises:
            ValueError: for a row without features or with more frames than the window, or one that is not finite.
        """
        features = []
        for number, row in enumerate(rows):
            if "input_features" not in row:
                raise ValueError(f"a row needs 'input_features', got {sorted(row)}")
            values = np.asarray(row["input_features"], dtype=np.float32)
            if not 0 < len(values) <= self.frames or not np.isfinite(values).all():
                raise ValueError(
                    f"row {number} of the batch has {len(values)} frames, of at most {self.frames}, or values that "
                    "are not finite"
                )
            features.append(np.pad(values, ((0, self.frames - len(values)), (0, 0)), mode="edge").T)
        batch = {"input_features": torch.from_numpy(np.stack(features))}
        if "labels" in rows[0]:
            batch["labels"] = pad_labels([row["labels"] for row in rows])
        return batch
