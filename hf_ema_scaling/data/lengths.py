"""Lengths of the rows of Arrow data sets, without reading what the rows hold."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset
from numpy.typing import NDArray

__all__ = ["holds_zeros", "row_lengths"]


def row_lengths(dataset: Dataset, column: str) -> NDArray[np.int64]:
    """Lengths of the lists in a column, int64 `(rows,)`; 0 for a row that is null.

    Only the offsets of the stored lists are read, whatever format or transform the data set has; rows of `select`,
    `shuffle` and the like are those of their order.

    Raises:
        ValueError: for a column that holds no lists.
    """
    try:
        parts = [pc.fill_null(pc.list_value_length(chunk), 0) for chunk in _chunks(dataset, column)]
    except pa.ArrowNotImplementedError as error:
        raise ValueError(f"the column '{column}' holds {dataset.features[column]}, not lists") from error
    stored = np.concatenate([np.empty(0, dtype=np.int64), *(part.to_numpy(zero_copy_only=False) for part in parts)])
    # A mapping from rows to stored rows, where there is one: to apply it here is a thousand times as fast as to let
    # `datasets` gather the rows.
    mapping = dataset._indices
    return stored if mapping is None else stored[mapping.column(0).to_numpy()]


def holds_zeros(dataset: Dataset, column: str) -> bool:
    """Whether any stored list of a column of masks (0 or 1) holds a 0; reads the whole column, chunk by chunk."""
    return any(pc.min(pc.list_flatten(chunk)).as_py() == 0 for chunk in _chunks(dataset, column))


def _chunks(dataset: Dataset, column: str) -> Iterator[pa.Array]:
    for chunk in dataset.data.column(column).chunks:
        yield getattr(chunk, "storage", chunk)
