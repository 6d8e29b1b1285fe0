"""Error of pseudo-labels against the truth of the unlabelled set, which nothing else ever sees.

The column is taken out of the data set before training gets it. What is left of it here is looked up by row number
when labels have been judged and counted, and leaves as a number in a log.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from datasets import Dataset
from rapidfuzz.distance import Levenshtein

from hf_ema_scaling.labels.agreement import errors
from hf_ema_scaling.labels.base import LabelKind, PseudoLabel
from hf_ema_scaling.labels.filter_base import Decode
from hf_ema_scaling.training.label_counts import FRACTION


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
    """Counts what is wrong in pseudo-labels against true texts, classes, numbers or label ids.

    Args:
        references: the column alone (`split_off`). Texts; or what the labelled set has as labels: a class; a number
            for each of several classes; the numbers of a regression; a class for each word, negative at tokens that
            begin no word; label ids. A row without a reference (None) is not counted.
        decode: label ids to text, where references are texts.
        kind: what labels say.
        outputs: classes or numbers of a label, where it has one number for each.

    Raises:
        ValueError: for texts without `decode`, and a first reference of another length than `outputs`.
    """

    def __init__(
        self,
        references: Dataset,
        decode: Decode | None,
        *,
        kind: LabelKind | None = None,
        outputs: int | None = None,
    ) -> None:
        self.references = references
        self.column = references.column_names[0]
        self.decode = decode
        self.kind = kind
        first = references[0][self.column]
        if decode is None and isinstance(first, str):
            raise ValueError(
                f"hidden_reference_column={self.column!r} holds texts, and nothing decodes labels: give the trainer a "
                "processing_class, or put label ids into the column"
            )
        if kind in (LabelKind.CLASSES, LabelKind.NUMBERS) and outputs is not None and first is not None:
            found = len(first) if isinstance(first, Sequence) else 1
            if found != outputs:
                raise ValueError(
                    f"hidden_reference_column={self.column!r} has {found} numbers in its first row, and the model "
                    f"{outputs} outputs: give it a number for each, as the labelled set has them"
                )

    def count(self, labels: Sequence[PseudoLabel], rows: Sequence[int], add: Callable[[str, int], None]) -> None:
        """Count the labels of rows of the unlabelled set.

        Args:
            labels: with which the rows are trained on or dropped.
            rows: row numbers in the unlabelled set.
            add: takes a name and a number.

        Raises:
            ValueError: for a reference that cannot be compared with its label, naming the row.
        """
        for label, row, reference in zip(labels, rows, self.references[list(rows)][self.column], strict=True):
            if reference is None:
                continue
            try:
                compared = self._compared(label, reference)
            except ValueError as error:
                raise ValueError(f"hidden_reference_column={self.column!r}, row {row}: {error}") from error
            for name, wrong, size in compared:
                for which in ("all", "kept") if label.kept else ("all",):
                    add(f"hidden_{name}_{which}_wrong", round(wrong * FRACTION))
                    add(f"hidden_{name}_{which}_length", size)

    def _compared(self, label: PseudoLabel, reference: Any) -> list[tuple[str, float, int]]:
        """Name of the metric, what is wrong, and out of how much."""
        if isinstance(reference, str):
            assert self.decode is not None
            found, wanted = self.decode(label.ids).strip(), reference.strip()
            pairs = (("cer", found, wanted), ("wer", found.split(), wanted.split()))
            return [(name, Levenshtein.distance(one, other), len(other)) for name, one, other in pairs]
        return [("mae" if self.kind is LabelKind.NUMBERS else "error", *errors(label, reference, self.kind))]


def hidden_metrics(counts: Mapping[str, int]) -> dict[str, float]:
    """What is wrong in the labels that were kept; and `hidden/<name>_all`, in all labels, dropped ones included.

    Returns:
        `hidden/cer` and `hidden/wer` (texts: edits over reference length), `hidden/mae` (numbers: mean absolute
        error), or `hidden/error`: edits over reference length (label ids), the share of wrong classes (one class), of
        wrong decisions about a class (several), or of wrong ones among the words with a label (`agreement.errors`).
    """
    metrics = {}
    for name in ("cer", "wer", "error", "mae"):
        for which, suffix in (("kept", ""), ("all", "_all")):
            length = counts.get(f"hidden_{name}_{which}_length", 0)
            if length:
                wrong = counts.get(f"hidden_{name}_{which}_wrong", 0) / FRACTION
                metrics[f"hidden/{name}{suffix}"] = wrong / length
    return metrics
