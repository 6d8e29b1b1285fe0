"""The labels of a pool of items, kept from the moment they are made until their item leaves the pool (slimIPL)."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torch import Tensor

from hf_ema_scaling.labels.base import PseudoLabel

CACHE_NAME = "label_cache.safetensors"
FORMAT_VERSION = 2
TENSORS = ("rows", "clock", "confidence", "reason", "lengths", "ids", "value_lengths", "values")


class LabelCacheError(RuntimeError):
    """A saved cache cannot be restored, or does not hold the item asked for; the message says what to do."""


class LabelCache:
    """Pseudo-labels by slot of the pool.

    A slot costs 24 bytes, its ids 4 bytes and its soft values 8 bytes each, plus what Python needs for two `bytes`
    objects. Scores are not kept: filters have judged by them when the label was made.

    Args:
        size: slots.

    Attributes:
        rows: int32 `(size,)`, row of the unlabelled set that each slot holds; -1 for an empty slot.
        clock: float64 `(size,)`, reference step at which each label was made.
    """

    def __init__(self, size: int) -> None:
        self.rows: NDArray[np.int32] = np.full(size, -1, dtype=np.int32)
        self.clock: NDArray[np.float64] = np.zeros(size)
        self._confidence: NDArray[np.float64] = np.zeros(size)
        self._reason: NDArray[np.int32] = np.zeros(size, dtype=np.int32)
        # None is the reason of a label that is kept.
        self._reasons: list[str | None] = [None]
        self._ids: list[bytes] = [b""] * size
        self._values: list[bytes] = [b""] * size

    def __len__(self) -> int:
        """Slots that hold a label."""
        return int((self.rows >= 0).sum())

    def put(self, slot: int, row: int, label: PseudoLabel, clock: float) -> None:
        """Give `slot` to the item in `row` of the unlabelled set, whose label was made at reference step `clock`."""
        if label.reason not in self._reasons:
            self._reasons.append(label.reason)
        self.rows[slot], self.clock[slot], self._confidence[slot] = row, clock, label.confidence
        self._reason[slot] = self._reasons.index(label.reason)
        self._ids[slot] = np.asarray(label.ids, dtype="<i4").tobytes()
        self._values[slot] = np.asarray(label.values, dtype="<f8").tobytes()

    def get(self, slot: int, row: int) -> PseudoLabel:
        """The label of the item in `row` of the unlabelled set.

        Raises:
            LabelCacheError: when the slot holds another item, or none.
        """
        if self.rows[slot] != row:
            raise LabelCacheError(
                f"slot {slot} of the label cache holds item {self.rows[slot]} of the unlabelled set, not {row}: cache "
                "and data order have parted; resume from a checkpoint that was saved with this data and recipe"
            )
        ids = tuple(np.frombuffer(self._ids[slot], dtype="<i4").tolist())
        values = tuple(np.frombuffer(self._values[slot], dtype="<f8").tolist())
        return PseudoLabel(ids, float(self._confidence[slot]), self._reasons[self._reason[slot]], values)

    def save(self, folder: str | Path) -> None:
        """Write `label_cache.safetensors` into `folder`, which exists: beside its place first, then renamed.

        Tensors: `rows` (int32), `clock` (float64), `confidence` (float64), `reason` (int32, an index of `reasons` in
        the metadata's JSON), `lengths` and `value_lengths` (int32) by slot, and `ids` (int32) and `values` (float64),
        those of all slots one after another.
        """
        tensors: dict[str, NDArray[Any]] = {
            "rows": self.rows,
            "clock": self.clock,
            "confidence": self._confidence,
            "reason": self._reason,
            "lengths": np.array([len(ids) // 4 for ids in self._ids], dtype=np.int32),
            "ids": np.frombuffer(b"".join(self._ids), dtype="<i4"),
            "value_lengths": np.array([len(values) // 8 for values in self._values], dtype=np.int32),
            "values": np.frombuffer(b"".join(self._values), dtype="<f8"),
        }
        record = {
            "format_version": FORMAT_VERSION,
            "reasons": self._reasons,
            "crc32": {name: _checksum(value) for name, value in tensors.items()},
        }
        path = Path(folder) / CACHE_NAME
        partial = path.with_name(f".{CACHE_NAME}.partial")
        try:
            # One entry: the order of several would be another in every file.
            save_file(tensors, partial, metadata={"label_cache": json.dumps(record)})
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)

    @classmethod
    def load(cls, folder: str | Path, held: NDArray[np.int32]) -> LabelCache:
        """The cache that `save` wrote into `folder`, bit for bit.

        Args:
            folder: a checkpoint.
            held: int32 `(size,)`, row that each slot must hold, -1 for an empty one.

        Raises:
            LabelCacheError: when there is none, it is damaged, or it holds other items.
        """
        path = Path(folder) / CACHE_NAME
        way_out = "Resume from another checkpoint, or start anew from the weights in this one"
        try:
            with safe_open(path, framework="numpy") as file:
                record = json.loads(file.metadata()["label_cache"])
                found = {name: file.get_tensor(name) for name in TENSORS}
            if record["format_version"] != FORMAT_VERSION:
                raise LabelCacheError(
                    f"{path} has format version {record['format_version']}, this version reads {FORMAT_VERSION}: use "
                    "the version of hf_ema_scaling that wrote it"
                )
            damaged = [name for name, value in found.items() if record["crc32"][name] != _checksum(value)]
        except FileNotFoundError as error:
            raise LabelCacheError(
                f"{path} is missing, but at this point of the run {int((held >= 0).sum())} labels are in the cache. "
                f"{way_out}"
            ) from error
        except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
            raise LabelCacheError(f"{path} is damaged ({type(error).__name__}: {error}). {way_out}") from error
        if damaged:
            raise LabelCacheError(f"{path} is damaged: checksums of {', '.join(damaged)} do not agree. {way_out}")
        if not np.array_equal(found["rows"], held):
            differ = "size" if len(found["rows"]) != len(held) else f"{int((found['rows'] != held).sum())} slots"
            raise LabelCacheError(
                f"{path} holds other items than the run has in its pool at this point (they differ in {differ}): it "
                f"belongs to another run. {way_out}"
            )
        cache = cls(len(held))
        cache.rows, cache.clock = found["rows"].copy(), found["clock"].copy()
        cache._confidence, cache._reason = found["confidence"].copy(), found["reason"].copy()
        cache._reasons = record["reasons"]
        cache._ids = _cut(found["ids"].astype("<i4"), found["lengths"])
        cache._values = _cut(found["values"].astype("<f8"), found["value_lengths"])
        return cache


def _cut(flat: NDArray[Any], lengths: NDArray[np.int32]) -> list[bytes]:
    """The bytes of each slot in what `save` put one after another."""
    content, size = flat.tobytes(), flat.itemsize
    ends = size * np.cumsum(lengths, dtype=np.int64)
    return [content[end - size * length : end] for end, length in zip(ends, lengths, strict=True)]


def _checksum(values: NDArray[Any]) -> str:
    return f"{zlib.crc32(np.ascontiguousarray(values).tobytes()):08x}"


def pack_labels(labels: Mapping[int, PseudoLabel]) -> Tensor:
    """Labels by stream position as one int64 tensor `(labels, width)`, for the exchange between processes.

    A row holds position, bits of the float64 confidence, number of ids, of values and of bytes of the reason, then
    ids, bits of the values, and reason. Scores stay where they are.
    """
    rows = []
    for position, label in labels.items():
        reason = (label.reason or "").encode()
        counts = len(label.ids), len(label.values), len(reason)
        values = np.array([label.confidence, *label.values], dtype=np.float64).view(np.int64).tolist()
        rows.append([position, values[0], *counts, *label.ids, *values[1:], *reason])
    packed = torch.zeros(len(rows), max([5, *map(len, rows)]), dtype=torch.int64)
    for target, row in zip(packed, rows, strict=True):
        target[: len(row)] = torch.tensor(row, dtype=torch.int64)
    return packed


def unpack_labels(packed: Tensor) -> dict[int, PseudoLabel]:
    """The labels in rows of `pack_labels`, which may have been widened by zeros."""
    labels = {}
    for position, bits, ids, values, reason, *rest in packed.tolist():
        numbers = np.array([bits, *rest[ids : ids + values]], dtype=np.int64).view(np.float64).tolist()
        why = bytes(rest[ids + values : ids + values + reason]).decode() or None
        labels[position] = PseudoLabel(tuple(rest[:ids]), numbers[0], why, tuple(numbers[1:]))
    return labels
