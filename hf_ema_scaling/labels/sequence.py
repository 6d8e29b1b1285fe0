"""Labels of whole sequences: one class, any number of classes, or numbers; hard or soft."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hf_ema_scaling.labels.base import CONFIDENCE, LabelKind, PseudoLabel
from hf_ema_scaling.labels.forward import refuse_rows, teacher_logits
from hf_ema_scaling.labels.score_filters import ENTROPY

MARGIN = "margin"
"""The highest probability less the second highest."""


class _SequenceLabeler(ABC):
    """One row of logits is one label.

    Args:
        outputs: classes, or numbers of a regression: columns of the logits.
    """

    def __init__(self, outputs: int) -> None:
        self.outputs = outputs

    def label(self, teacher: Callable[..., Any], batch: Mapping[str, Tensor]) -> list[PseudoLabel]:
        """Run the teacher on `batch` without its `labels`, and label each row.

        Raises:
            RuntimeError: when the teacher is in train mode.
            ValueError: see `from_logits`.
        """
        return self.from_logits(teacher_logits(teacher, batch))

    def from_logits(self, logits: Tensor) -> list[PseudoLabel]:
        """Label each row of `logits` `(rows, outputs)`, of any float dtype; computed in float32.

        Raises:
            ValueError: for another shape, or logits that are NaN or +inf (-inf is a class that cannot be).
        """
        if logits.ndim != 2 or logits.shape[1] != self.outputs:
            raise ValueError(
                f"the teacher's logits must be (rows, {self.outputs}), got {tuple(logits.shape)}: give the labeler "
                "the number of outputs that the model has"
            )
        return self._labels(logits.float().cpu())

    @abstractmethod
    def _labels(self, logits: Tensor) -> list[PseudoLabel]:
        """One label per row of float32 logits on the CPU."""

    @abstractmethod
    def _targets(self, labels: Sequence[PseudoLabel]) -> Tensor:
        """The `labels` of the student."""

    def with_targets(self, inputs: Mapping[str, Tensor], labels: Sequence[PseudoLabel]) -> dict[str, Tensor]:
        """The student's inputs with `labels` in them; see the class for their dtype and shape."""
        return {**inputs, "labels": self._targets(labels)}

    def _rows(self, labels: Sequence[PseudoLabel], dummy: float) -> Tensor:
        """Values of kept labels as float32 `(rows, outputs)`, `dummy` everywhere in other rows."""
        rows = [label.values if label.kept else [dummy] * self.outputs for label in labels]
        return torch.tensor(rows, dtype=torch.float32).reshape(len(labels), self.outputs)


class ClassLabeler(_SequenceLabeler):
    """One class per row.

    `ids` is the most probable class, the first of equals; soft labels also have all probabilities as `values`. The
    confidence is the highest probability. Scores: "entropy", over its largest value log(classes), and "margin", the
    highest probability less the second highest; both in [0, 1].

    Targets: int64 `(rows,)`, or for soft labels float32 `(rows, classes)`, which the loss takes as probabilities; see
    `classification_losses`. Dropped rows have class 0, or equal probabilities.

    Args:
        classes: at least 2.
        soft: whether the student learns the probabilities.
        temperature: the softmax is taken of logits / temperature: below 1 it sharpens. The class does not depend on
            it; probabilities, confidence and scores do.

    Attributes:
        probabilities: whether hard labels have probabilities, too; then nothing may learn them (`LabelAlignment`).

    Raises:
        ValueError: for fewer than two classes, or a temperature that is not above 0.
    """

    kind = LabelKind.CLASS
    score_names = frozenset({CONFIDENCE, ENTROPY, MARGIN})

    def __init__(self, classes: int, *, soft: bool = False, temperature: float = 1.0) -> None:
        super().__init__(classes)
        if classes < 2:
            raise ValueError(f"a label needs at least 2 classes to be one of, got {classes}")
        if not (temperature > 0 and math.isfinite(temperature)):
            raise ValueError(f"temperature must be above 0, got {temperature}")
        self.soft = soft
        self.temperature = temperature
        self.probabilities = False

    def _labels(self, logits: Tensor) -> list[PseudoLabel]:
        # In float64 probabilities of a row add up to 1 beyond what float32 targets can show.
        probabilities = (logits.double() / self.temperature).softmax(-1)
        refuse_rows(probabilities.isnan().any(-1))
        best = logits.argmax(-1).tolist()
        entropies = (torch.special.entr(probabilities).sum(-1) / math.log(self.outputs)).tolist()
        margins = (-probabilities.topk(2).values.diff(dim=-1)).flatten().tolist()
        return [
            PseudoLabel(
                (winner,),
                row[winner],
                values=tuple(row) if self.soft or self.probabilities else (),
                scores={ENTROPY: entropy, MARGIN: margin},
            )
            for winner, row, entropy, margin in zip(best, probabilities.tolist(), entropies, margins, strict=True)
        ]

    def _targets(self, labels: Sequence[PseudoLabel]) -> Tensor:
        if self.soft:
            return self._rows(labels, 1 / self.outputs)
        return torch.tensor([label.ids[0] if label.kept else 0 for label in labels], dtype=torch.long)


class MultiLabelLabeler(_SequenceLabeler):
    """Any number of classes per row, each by the sigmoid of its own logit p.

    `ids` are the classes whose p is at least their threshold, maybe none; `values` are a zero or one for each class,
    or every p for soft labels. The confidence is the mean over classes of max(p, 1 - p), so at least 0.5. Scores are
    means over classes in [0, 1]: "entropy", of each yes or no in bits, and "margin", |2p - 1|.

    Targets: float32 `(rows, classes)`, of zeros and ones, or the p of soft labels. Dropped rows have zeros.

    Args:
        classes: at least 1.
        soft: whether the student learns the p.
        thresholds: in (0, 1), one for all classes or one for each.

    Raises:
        ValueError: for no class, another number of thresholds than of classes, or one outside (0, 1).
    """

    kind = LabelKind.CLASSES
    score_names = frozenset({CONFIDENCE, ENTROPY, MARGIN})

    def __init__(self, classes: int, *, soft: bool = False, thresholds: float | Sequence[float] = 0.5) -> None:
        super().__init__(classes)
        if classes < 1:
            raise ValueError(f"labels need at least 1 class, got {classes}")
        given = [thresholds] * classes if isinstance(thresholds, int | float) else list(thresholds)
        if len(given) != classes or not all(0 < threshold < 1 for threshold in given):
            raise ValueError(f"thresholds must be one number in (0, 1), or {classes} of them, got {thresholds}")
        self.soft = soft
        self.thresholds = tuple(float(threshold) for threshold in given)

    def _labels(self, logits: Tensor) -> list[PseudoLabel]:
        p = logits.double().sigmoid()
        refuse_rows(p.isnan().any(-1))
        chosen = p >= torch.tensor(self.thresholds, dtype=torch.float64)
        confidence = torch.maximum(p, 1 - p).mean(-1).tolist()
        bits = (torch.special.entr(p) + torch.special.entr(1 - p)).mean(-1) / math.log(2)
        margins = (2 * p - 1).abs().mean(-1).tolist()
        return [
            PseudoLabel(
                tuple(yes.nonzero().flatten().tolist()),
                sure,
                values=tuple(row if self.soft else yes.double().tolist()),
                scores={ENTROPY: entropy, MARGIN: margin},
            )
            for yes, sure, row, entropy, margin in zip(
                chosen, confidence, p.tolist(), bits.tolist(), margins, strict=True
            )
        ]

    def _targets(self, labels: Sequence[PseudoLabel]) -> Tensor:
        if self.soft:
            return self._rows(labels, 0.0)
        targets = torch.zeros(len(labels), self.outputs)
        for row, label in zip(targets, labels, strict=True):
            row[list(label.ids) if label.kept else []] = 1.0
        return targets


class RegressionLabeler(_SequenceLabeler):
    """The teacher's numbers, as `values`; no `ids`, no scores.

    A regression does not say how sure it is: the confidence is 1.0, and filters by confidence, `min_confidence` among
    them, are refused. Judge by the agreement of two views instead (`two_views`, filter `disagree`).

    Targets: float32 `(rows, outputs)`. Dropped rows have zeros.

    Args:
        outputs: numbers per row, at least 1.

    Raises:
        ValueError: for no output.
    """

    kind = LabelKind.NUMBERS
    score_names: frozenset[str] = frozenset()

    def __init__(self, outputs: int = 1) -> None:
        super().__init__(outputs)
        if outputs < 1:
            raise ValueError(f"a regression needs at least 1 output, got {outputs}")

    def _labels(self, logits: Tensor) -> list[PseudoLabel]:
        refuse_rows(~logits.isfinite().all(-1))
        return [PseudoLabel((), 1.0, values=tuple(row)) for row in logits.tolist()]

    def _targets(self, labels: Sequence[PseudoLabel]) -> Tensor:
        return self._rows(labels, 0.0)
