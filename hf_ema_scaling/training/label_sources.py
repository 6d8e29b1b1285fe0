"""Where unlabelled rows come from, by a column of their data set."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hf_ema_scaling.data.streaming import is_stream

ONE_SOURCE = "unlabelled"
"""Name of the source in the ledger where the data set names none."""


class Sources:
    """Where rows of the unlabelled set come from.

    Args:
        dataset: the unlabelled set.
        column: names the source of each row; None for one source.

    Raises:
        ValueError: when there is no such column.
    """

    def __init__(self, dataset: Any, column: str | None) -> None:
        self.names = [ONE_SOURCE]
        self._codes: NDArray[np.int32] | None = None
        if column is None:
            return
        if is_stream(dataset):
            raise ValueError(
                f"source_column={column!r} needs all rows at the start, and unlabeled_dataset is a stream: give a "
                "map-style data set, or leave it out"
            )
        columns = getattr(dataset, "column_names", None) or []
        if column not in columns:
            raise ValueError(f"source_column={column!r} is none of the columns {columns} of the unlabelled set")
        names, codes = np.unique(np.asarray(dataset[column][:]).astype(str), return_inverse=True)
        self.names, self._codes = names.tolist(), codes.astype(np.int32)

    def of(self, rows: Sequence[int]) -> list[str]:
        """The source of each row."""
        return [self.names[code] for code in self.codes(rows)]

    def codes(self, rows: Sequence[int]) -> list[int]:
        """The place of each row's source in `names`."""
        if self._codes is None:
            return [0] * len(rows)
        return self._codes[np.asarray(rows, dtype=np.int64)].tolist()
