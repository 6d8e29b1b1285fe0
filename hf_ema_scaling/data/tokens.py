"""From words and their tags to the rows of a token classifier, and their batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from datasets import ClassLabel, Dataset, Features, List, Value
from torch import Tensor
from transformers import DataCollatorForTokenClassification

from hf_ema_scaling.data.speech import quiet_unless_terminal
from hf_ema_scaling.labels.tokens import IGNORED, WORD_IDS
from hf_ema_scaling.spans import continuation_ids, is_bio

Example = Mapping[str, Any]


def tag_names(dataset: Dataset, tag_column: str) -> list[str]:
    """The tags of a data set: the names of its `ClassLabel`, else what occurs in it, `O` first, then by alphabet."""
    feature = getattr(dataset.features[tag_column], "feature", None)
    if isinstance(feature, ClassLabel):
        return list(feature.names)
    found = {str(tag) for tags in dataset[tag_column] for tag in tags}
    return sorted(found, key=lambda tag: (tag != "O", tag[2:], tag))


def prepare_tokens(
    dataset: Dataset,
    tokenizer: Any,
    tag_ids: Mapping[str, int],
    *,
    word_column: str,
    tag_column: str | None,
    max_length: int,
    label_all_tokens: bool = False,
    length_column: str = "length",
) -> Dataset:
    """Token ids with the numbers of their words, and with labels where there are tags; nothing is padded.

    Args:
        dataset: rows of words, and of as many tags, as `load_words` checked them.
        tokenizer: of the model; a fast one.
        tag_ids: id of each tag by its name.
        word_column: column of the words.
        tag_column: column of the tags; None for unlabelled rows.
        max_length: tokens, special ones included, at which rows are cut.
        label_all_tokens: whether all sub-tokens of a word have its label (`I-x` after the first of `B-x`), not the
            first one only.
        length_column: name of the column for the number of tokens.

    Returns:
        The inputs that the tokenizer makes, `labels` (int64, -100 where a token has none), or `word_ids` (int64, -1
        for special tokens) where there are no tags, and the lengths.

    Raises:
        ValueError: for a tag that is not in `tag_ids`, naming its row (from 1).
        TypeError: for a tokenizer that cannot tell words.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise TypeError(
            f"{type(tokenizer).__name__} does not tell which word a token belongs to: use a fast tokenizer"
        )
    names = {index: name for name, index in tag_ids.items()}
    later = continuation_ids(names) if is_bio(list(tag_ids)) else {index: index for index in names}
    feature = None if tag_column is None else getattr(dataset.features[tag_column], "feature", None)

    def labels_of(tags: Sequence[Any], words: Sequence[int], row: int) -> list[int]:
        ids = [_tag_id(tag, feature, tag_ids, row) for tag in tags]
        labels = []
        for before, word in zip([-1, *words], words, strict=False):
            first = word >= 0 and word != before
            goes_on = label_all_tokens and word >= 0
            labels.append(ids[word] if first else later[ids[word]] if goes_on else IGNORED)
        return labels

    def encode(rows: dict[str, list[Any]], indices: list[int]) -> dict[str, list[Any]]:
        encoded = tokenizer(rows[word_column], is_split_into_words=True, truncation=True, max_length=max_length)
        words = [[-1 if word is None else word for word in encoded.word_ids(row)] for row in range(len(indices))]
        result = {**encoded, length_column: [len(ids) for ids in encoded["input_ids"]]}
        if tag_column is None:
            return {**result, WORD_IDS: words}
        tagged = zip(rows[tag_column], words, indices, strict=True)
        return {**result, "labels": [labels_of(tags, numbers, row + 1) for tags, numbers, row in tagged]}

    made = tokenizer(["a"], is_split_into_words=True).keys()
    features = {name: List(Value("int32")) for name in made} | {length_column: Value("int64")}
    features["labels" if tag_column is not None else WORD_IDS] = List(Value("int64"))
    with quiet_unless_terminal():
        return dataset.map(
            encode,
            batched=True,
            with_indices=True,
            remove_columns=dataset.column_names,
            features=Features(features),
            desc="tokenising",
        )


def _tag_id(tag: Any, feature: Any, tag_ids: Mapping[str, int], row: int) -> int:
    name = feature.names[tag] if isinstance(feature, ClassLabel) else str(tag)
    if name not in tag_ids:
        raise ValueError(f"row {row}: the tag {name!r} is none of {', '.join(tag_ids)}")
    return tag_ids[name]


class TokenCollator:
    """Pads rows of a token classifier: inputs by the tokenizer, `labels` with -100, `word_ids` with -1.

    Rows with labels need no `word_ids`: they are left out of such batches.

    Args:
        tokenizer: of the model.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.padding_side = tokenizer.padding_side
        self._collate = DataCollatorForTokenClassification(tokenizer)

    def __call__(self, rows: Sequence[Example]) -> dict[str, Tensor]:
        """One padded batch."""
        inputs = [{name: value for name, value in row.items() if name != WORD_IDS} for row in rows]
        batch = dict(self._collate(inputs))
        if "labels" in batch or WORD_IDS not in rows[0]:
            return batch
        padded = torch.full(batch["input_ids"].shape, -1, dtype=torch.long)
        for target, row in zip(padded, rows, strict=True):
            words = torch.as_tensor(row[WORD_IDS])
            place = slice(len(target) - len(words), None) if self.padding_side == "left" else slice(len(words))
            target[place] = words
        return {**batch, WORD_IDS: padded}
