"""Error rate of pseudo-labels against the truth of the unlabelled set, which nothing else ever sees.

The column is taken out of the data set before training gets it. What is left of it here is looked up by row number
when labels have been judged and counted, and leaves as a number in a log.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from datasets import Dataset
from rapidfuzz.distance import Levenshtein

from hf_ema_scaling.labels.base import PseudoLabel
from hf_ema_scaling.labels.filter_base import Decode


def split_off(dataset: Any, column: str) -> tuple[Dataset, Dataset]:
    """A data set without one of its columns, and that column alone.

    Raises:
        TypeError: for data that is no `datasets.Dataset`, from which nothing can be taken out for certain.
        ValueError: when there is no such column.
    """
    if not isinstance(dataset, Dataset):
        raise TypeError(
            f"hidden_reference_column={column!r} needs a datasets.Dataset, whose columns can be taken out; got "
            f"{type(dataset).__name__}"
        )
    if column not in dataset.column_names:
        raise ValueError(f"hidden_reference_column={column!r} is none of the columns {dataset.column_names}")
    return dataset.remove_columns([column]), dataset.select_columns([column]).with_format(None)


class HiddenReferences:
    """Counts edits between pseudo-labels and true texts, classes or label ids.

    Args:
        references: the column alone (`split_off`).
        decode: label ids to text, where references are texts.

    Raises:
        ValueError: for texts without `decode`.
    """

    def __init__(self, references: Dataset, decode: Decode | None) -> None:
        self.references = references
        self.column = references.column_names[0]
        self.decode = decode
        if decode is None and isinstance(references[0][self.column], str):
            raise ValueError(
                f"hidden_reference_column={self.column!r} holds texts, and nothing decodes labels: give the trainer a "
                "processing_class, or put label ids into the column"
            )

    def count(self, labels: Sequence[PseudoLabel], rows: Sequence[int], add: Callable[[str, int], None]) -> None:
        """Count the labels of rows of the unlabelled set.

        Args:
            labels: with which the rows are trained on or dropped.
            rows: row numbers in the unlabelled set.
            add: takes a name and a number.
        """
        for label, reference in zip(labels, self.references[list(rows)][self.column], strict=True):
            for name, found, wanted in self._pairs(label, reference):
                edits = Levenshtein.distance(found, wanted)
                for which in ("all", "kept") if label.kept else ("all",):
                    add(f"hidden_{name}_{which}_edits", edits)
                    add(f"hidden_{name}_{which}_length", len(wanted))

    def _pairs(self, label: PseudoLabel, reference: Any) -> list[tuple[str, Sequence[Any], Sequence[Any]]]:
        if isinstance(reference, str):
            assert self.decode is not None
            found, wanted = self.decode(label.ids).strip(), reference.strip()
            return [("cer", found, wanted), ("wer", found.split(), wanted.split())]
        wanted_ids = [int(one) for one in (reference if isinstance(reference, Sequence) else [reference])]
        return [("error", list(label.ids), [one for one in wanted_ids if one >= 0])]


def hidden_metrics(counts: Mapping[str, int]) -> dict[str, float]:
    """`hidden/cer` and `hidden/wer`, or `hidden/error`: edits over reference length of the labels that were kept; and
    `hidden/<name>_all`, of all labels, dropped ones included.
    """
    metrics = {}
    for name in ("cer", "wer", "error"):
        for which, suffix in (("kept", ""), ("all", "_all")):
            length = counts.get(f"hidden_{name}_{which}_length", 0)
            if length:
                metrics[f"hidden/{name}{suffix}"] = counts.get(f"hidden_{name}_{which}_edits", 0) / length
    return metrics
