"""From texts to the rows of a classifier: a word tokenizer, token ids, and noise for tests of robustness."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset, Features, List, Value
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from hf_ema_scaling.data.bad_items import RAISE, BadItemError, BadItems, text_of
from hf_ema_scaling.data.speech import quiet_unless_terminal

logger = logging.getLogger(__name__)

PAD, UNKNOWN, BEGIN, END = "[PAD]", "[UNK]", "[CLS]", "[SEP]"


def build_word_tokenizer(
    texts: Iterable[str], *, vocabulary_size: int = 8192, lower_case: bool = True
) -> PreTrainedTokenizerFast:
    """A tokenizer of words and punctuation marks, of those that occur most often in `texts`.

    A text becomes `[CLS] words [SEP]` in Unicode NFC; every other word is `[UNK]`. Equal counts are in alphabetical
    order, so the vocabulary does not depend on the order of the texts.

    Args:
        texts: of the training set.
        vocabulary_size: most tokens that it may have, its four special ones included.
        lower_case: whether words that differ in case only are one.

    Raises:
        ValueError: when there is no word in the texts, or no room for one.
    """
    special = [PAD, UNKNOWN, BEGIN, END]
    if vocabulary_size <= len(special):
        raise ValueError(f"vocabulary_size must be above {len(special)}, the special tokens, got {vocabulary_size}")
    tokenizer = Tokenizer(models.WordLevel(unk_token=UNKNOWN))
    steps = [normalizers.NFC(), *([normalizers.Lowercase()] if lower_case else [])]
    tokenizer.normalizer = normalizers.Sequence(steps)
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.WordLevelTrainer(vocab_size=vocabulary_size, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() == len(special):
        raise ValueError("no vocabulary: there is no word in the texts")
    ids = {token: tokenizer.token_to_id(token) for token in (BEGIN, END)}
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A {END}", pair=f"{BEGIN} $A {END} $B {END}", special_tokens=list(ids.items())
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        unk_token=UNKNOWN,
        cls_token=BEGIN,
        sep_token=END,
        model_input_names=["input_ids", "attention_mask"],
    )


def label_name(value: Any, feature: Any = None) -> str:
    """The class that a label means: the name of a `ClassLabel`, a string itself, an integer in digits.

    Args:
        value: as it stands in the data set.
        feature: the type of its column, if that is known.

    Raises:
        BadItemError: for null or an empty string ("no_label"), -1 of a `ClassLabel` (how the Hub marks hidden labels),
            or a value that names no class ("bad_label").
    """
    if value is None or (isinstance(value, str) and not value.strip()):
        raise BadItemError("the label is null or empty: leave such rows out", "no_label")
    if isinstance(feature, ClassLabel):
        if not 0 <= value < len(feature.names):
            names = ", ".join(feature.names)
            raise BadItemError(f"the label is {value}, which names none of {names}: leave it out", "bad_label")
        return str(feature.names[value])
    if not isinstance(value, str | int):
        raise BadItemError(f"the label is {value!r}: a class is a string or an integer", "bad_label")
    return text_of(str(value), "label")


def class_names(dataset: Dataset, label_column: str) -> list[str]:
    """The classes of a data set in the order of their ids: that of its `ClassLabel`, else by number or alphabet."""
    feature = dataset.features[label_column]
    if isinstance(feature, ClassLabel):
        return list(feature.names)
    names = {label_name(value) for value in dataset.unique(label_column)}
    numbers = all(name.removeprefix("-").isdecimal() for name in names)
    return sorted(names, key=int) if numbers else sorted(names)


def prepare_classification(
    dataset: Dataset,
    tokenizer: Any,
    label_ids: Mapping[str, int],
    *,
    text_column: str,
    label_column: str | None,
    max_length: int,
    length_column: str = "length",
    keep: Sequence[str] = (),
    on_bad_item: str = RAISE,
) -> Dataset:
    """Token ids, label ids and lengths; each row is tokenised once and nothing is padded.

    Args:
        dataset: texts and labels, as `load_text` checked them.
        tokenizer: of the model.
        label_ids: id of each class by its name.
        text_column: column of the texts.
        label_column: column of the labels; None for unlabelled texts.
        max_length: tokens, special ones included, at which texts are cut.
        length_column: name of the column for the number of tokens, by which a run puts similar lengths together.
        keep: further columns that stay as they are.
        on_bad_item: `raise` an error for a label that is not in `label_ids`, or `skip` its row, counted and named in
            the log.

    Returns:
        The inputs that the tokenizer makes, `labels` (int64) where there are labels, and the lengths.

    Raises:
        BadItemError: for a label that is not in `label_ids`, naming its row (from 1); when skipped, ValueError where
            nothing is left.
    """
    bad, good = BadItems(on_bad_item), []
    if label_column is not None:
        feature = dataset.features[label_column]
        for row, value in enumerate(dataset[label_column]):
            name = label_name(value, feature)
            if name in label_ids:
                good.append(row)
            else:
                known = ", ".join(label_ids)
                bad.add(BadItemError(f"row {row + 1}: the label {name!r} is none of {known}", "unknown_label"))
        bad.log(logger, "labels", len(dataset))
        dataset = dataset if len(good) == len(dataset) else dataset.select(good)

    def encode(rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
        labels = {}
        if label_column is not None:
            labels["labels"] = [label_ids[label_name(value, feature)] for value in rows[label_column]]
        encoded = dict(tokenizer(rows[text_column], truncation=True, max_length=max_length))
        return {**encoded, **labels, length_column: [len(ids) for ids in encoded["input_ids"]]}

    made = tokenizer("a").keys()
    numbers = [*([] if label_column is None else ["labels"]), length_column]
    features = {name: List(Value("int32")) for name in made} | dict.fromkeys(numbers, Value("int64"))
    features |= {name: dataset.features[name] for name in keep}
    with quiet_unless_terminal():
        return dataset.map(
            encode,
            batched=True,
            remove_columns=[name for name in dataset.column_names if name not in keep],
            features=Features(features),
            desc="tokenising",
        )


def drawn_by_class(labels: Sequence[Any], count: int, seed: int) -> list[int]:
    """Rows of a labelled set with so many of each class, drawn at random, in the order of the set.

    Args:
        labels: of all rows.
        count: rows of each class.
        seed: of the draw.

    Raises:
        ValueError: when a class has fewer rows.
    """
    rows: dict[Any, list[int]] = {}
    for row, label in enumerate(labels):
        rows.setdefault(label, []).append(row)
    few = {label: len(members) for label, members in rows.items() if len(members) < count}
    if few:
        raise ValueError(f"{count} rows of each class are asked for, but there are only {few}")
    # By class in a fixed order, each with a generator of its own: the draw of one does not depend on the others.
    drawn = [
        np.random.default_rng([seed, place]).choice(rows[label], count, replace=False)
        for place, label in enumerate(sorted(rows))
    ]
    return sorted(np.concatenate(drawn).tolist())


class WordNoise:
    """Replaces words of test data by random ones: noise of a known amount, the same in every run.

    Each word (what white space separates) is replaced with probability `share` by a word of the training texts, drawn
    in proportion to how often it occurs there; now and then that is the same word. White space becomes one space.

    Args:
        texts: of the training set.
        share: probability with which a word is replaced.
        seed: of the noise; row by row, so it depends neither on the batch nor on the rows before.
    """

    def __init__(self, texts: Iterable[str], *, share: float, seed: int = 0) -> None:
        counts = Counter(word for text in texts for word in text.split())
        self.words = sorted(counts)
        self.upper = np.cumsum([counts[word] for word in self.words])
        self.share = share
        self.seed = seed

    def __call__(self, text: str, row: int) -> str:
        """The text of row `row` with its noise."""
        generator = np.random.default_rng([self.seed, row])
        words = text.split()
        replaced = generator.random(len(words)) < self.share
        drawn = np.searchsorted(self.upper, generator.integers(self.upper[-1], size=len(words)), side="right")
        return " ".join(
            self.words[place] if new else word for word, new, place in zip(words, replaced, drawn, strict=True)
        )
