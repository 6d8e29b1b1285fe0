"""Labels of words from a token classifier: read off the first sub-token, made consistent, spread over the others."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hf_ema_scaling.labels.base import CONFIDENCE, LabelKind, PseudoLabel
from hf_ema_scaling.labels.forward import refuse_rows, teacher_logits
from hf_ema_scaling.spans import continuation_ids, is_bio, repaired

WORD_IDS = "word_ids"
"""Column, and input of the labeler: the number of the word that each token belongs to, -1 for special tokens and
padding, as `tokenizer(words, is_split_into_words=True).word_ids()` tells it. The model never sees it."""
IGNORED = -100


class TokenLabeler:
    """One label per word, for models that classify tokens.

    A word has the label of its first sub-token. If the model's labels are those of the BIO scheme, an `I-x` that
    follows neither `B-x` nor `I-x` becomes `B-x`. `ids` of a label are the classes of the row's words in order; -100
    stands for a word that is not sure enough (`min_word_confidence`).

    A word's confidence is the highest probability at its first sub-token, before the repair; that of the row is the
    mean over its words, and 0 for a row without words. Scores: "min_confidence", that of the least sure word, and
    "masked", the share of words that are not sure enough.

    Reasons: "empty" for a row without words, "confidence" where no word is sure enough.

    Targets: int64 `(rows, tokens)`: each word's label at its first sub-token; at the others -100, or with
    `label_all_tokens` the same label (`I-x` for `B-x`). Special tokens, padding and dropped rows have -100.

    Unlabelled data needs a column `word_ids` and a collator that pads it with -1 (`TokenCollator`).

    Args:
        id2label: of the model's config: names of all classes.
        label_all_tokens: whether later sub-tokens have labels; as the labelled data does it.
        min_word_confidence: words less sure than this have no target; the row is kept.

    Raises:
        ValueError: when ids are not 0 to n - 1, there are fewer than two, or `min_word_confidence` is not in [0, 1].
    """

    kind = LabelKind.WORDS
    score_names = frozenset({CONFIDENCE, "min_confidence", "masked"})
    needs_columns = (WORD_IDS,)

    def __init__(
        self, id2label: Mapping[int, str], *, label_all_tokens: bool = False, min_word_confidence: float = 0.0
    ) -> None:
        if sorted(id2label) != list(range(len(id2label))) or len(id2label) < 2:
            raise ValueError(f"id2label must name at least 2 classes, by ids from 0 on, got {dict(id2label)}")
        if not 0 <= min_word_confidence <= 1:
            raise ValueError(f"min_word_confidence must lie in [0, 1], got {min_word_confidence}")
        self.names = [id2label[index] for index in range(len(id2label))]
        self.bio = is_bio(self.names)
        self.label_all_tokens = label_all_tokens
        self.min_word_confidence = min_word_confidence
        self._ids = {name: index for index, name in enumerate(self.names)}
        self._later = continuation_ids(id2label) if self.bio else {index: index for index in id2label}

    def label(self, teacher: Callable[..., Any], batch: Mapping[str, Tensor]) -> list[PseudoLabel]:
        """Run the teacher on `batch` without `labels` and `word_ids`, and label the words of each row.

        Raises:
            RuntimeError: when the teacher is in train mode.
            ValueError: without `word_ids`, or see `from_logits`.
        """
        return self.from_logits(teacher_logits(teacher, batch, self.needs_columns), _word_ids(batch))

    def from_logits(self, logits: Tensor, word_ids: Tensor) -> list[PseudoLabel]:
        """Label the words of each row.

        Args:
            logits: `(rows, tokens, classes)`, any float dtype; the softmax is taken in float32.
            word_ids: int64 `(rows, tokens)`.

        Raises:
            ValueError: for other shapes, or logits of a word that are NaN.
        """
        if logits.ndim != 3 or logits.shape[2] != len(self.names) or word_ids.shape != logits.shape[:2]:
            raise ValueError(
                f"expected logits (rows, tokens, {len(self.names)}) and word_ids (rows, tokens), got "
                f"{tuple(logits.shape)} and {tuple(word_ids.shape)}"
            )
        best = logits.float().softmax(-1).max(-1)
        first = _first_tokens(word_ids)
        probabilities, classes, first = best.values.cpu(), best.indices.cpu(), first.cpu()
        refuse_rows((probabilities.isnan() & first).any(-1))
        return [
            self._row(ids[words].tolist(), sure[words].tolist())
            for ids, sure, words in zip(classes, probabilities.double(), first, strict=True)
        ]

    def _row(self, ids: list[int], confidences: list[float]) -> PseudoLabel:
        if not ids:
            return PseudoLabel((), 0.0, "empty")
        if self.bio:
            ids = [self._ids[name] for name in repaired([self.names[index] for index in ids])]
        sure = [confidence >= self.min_word_confidence for confidence in confidences]
        return PseudoLabel(
            tuple(index if kept else IGNORED for index, kept in zip(ids, sure, strict=True)),
            sum(confidences) / len(confidences),
            None if any(sure) else "confidence",
            scores={"min_confidence": min(confidences), "masked": 1 - sum(sure) / len(sure)},
        )

    def as_unlabelled(self, inputs: Mapping[str, Tensor], labels: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """The inputs with `word_ids`, which labelled rows come without: each token with a label begins a word.

        With `label_all_tokens` that makes a word of every labelled token, and so a count of tokens.

        Args:
            inputs: as for `label`, but for `word_ids`.
            labels: int64 `(rows, tokens)`, -100 where a token has none.
        """
        labelled = labels >= 0
        return {**inputs, WORD_IDS: (labelled.cumsum(-1) - 1).masked_fill(~labelled, -1)}, labels

    def with_targets(self, inputs: Mapping[str, Tensor], labels: Sequence[PseudoLabel]) -> dict[str, Tensor]:
        """The student's inputs with `labels` in them.

        Raises:
            ValueError: without `word_ids`, or when a kept label has another number of words than its row.
        """
        word_ids = _word_ids(inputs).cpu()
        first = _first_tokens(word_ids)
        targets = torch.full(word_ids.shape, IGNORED, dtype=torch.long)
        for row, label in enumerate(labels):
            if not label.kept:
                continue
            starts = first[row].nonzero().flatten().tolist()
            if len(starts) != len(label.ids):
                raise ValueError(f"row {row} has {len(starts)} words, but a label of {len(label.ids)} words")
            for start, index in zip(starts, label.ids, strict=True):
                targets[row, start] = index
                if self.label_all_tokens and index != IGNORED:
                    self._spread(targets[row], word_ids[row], start, self._later[index])
        return {**inputs, "labels": targets}

    @staticmethod
    def _spread(targets: Tensor, word_ids: Tensor, start: int, index: int) -> None:
        for place in range(start + 1, len(word_ids)):
            if word_ids[place] != word_ids[start]:
                break
            targets[place] = index


def _word_ids(batch: Mapping[str, Tensor]) -> Tensor:
    if WORD_IDS not in batch:
        raise ValueError(
            f"labels by word need '{WORD_IDS}' in the batch, which has {sorted(batch)}: give the unlabelled data this "
            "column (`prepare_tokens` makes it), and pad it with -1 in the collator (`TokenCollator`)"
        )
    return batch[WORD_IDS]


def _first_tokens(word_ids: Tensor) -> Tensor:
    """True where a word begins, bool `(rows, tokens)`."""
    begins = word_ids >= 0
    begins[:, 1:] &= word_ids[:, 1:] != word_ids[:, :-1]
    return begins
