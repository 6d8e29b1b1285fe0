"""Rows of text for a model that labels: texts to classify, to translate or to continue, words to tag."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from hf_ema_scaling.data.bad_items import BadItemError, text_of, words_of
from hf_ema_scaling.data.tokens import TokenCollator
from hf_ema_scaling.labelling.heads import PROMPT, Head
from hf_ema_scaling.labelling.inputs import Prepared
from hf_ema_scaling.labels.decoder import bare
from hf_ema_scaling.labels.generation import padded
from hf_ema_scaling.labels.generative import end_ids
from hf_ema_scaling.labels.tokens import WORD_IDS


class _Texts:
    """What rows of text have in common."""

    unit = "tokens"
    same_length = False

    def __init__(self, head: Head, column: str, max_length: int | None) -> None:
        self.column = column
        self.tokenizer = head.processing_class
        config: Any = bare(head.model).config
        # T5's positions are relative, and what its tokenizer says is the length of its training.
        known = [self.tokenizer.model_max_length, getattr(config, "max_position_embeddings", None)]
        self.max_length = min(length for length in (max_length, *known) if length is not None)

    def _padding(self) -> None:
        if self.tokenizer.pad_token_id is None:
            raise ValueError("the tokenizer has no padding token, and texts of a batch differ in length: set one")

    def _fitting(self, inputs: dict[str, Any]) -> Prepared:
        """The inputs, if the model can read all of them."""
        length = len(inputs["input_ids"])
        if length > self.max_length:
            raise BadItemError(
                f"{self.column} has {length} tokens, at most {self.max_length} are read", "too_long", float(length)
            )
        return Prepared(inputs, length, float(length))

    def _text(self, row: Mapping[str, Any]) -> str:
        text = text_of(row[self.column], self.column)
        if not text.strip():
            raise BadItemError(f"{self.column} is empty", "empty_text")
        return text


class TextInputs(_Texts):
    """Texts to classify; long ones are cut.

    Args:
        head: of a text classifier.
        column: of the texts.
        max_length: tokens at which they are cut; the most that tokenizer and model know when None.

    Raises:
        ValueError: when the tokenizer has no padding token.
    """

    def __init__(self, head: Head, column: str, max_length: int | None = None) -> None:
        super().__init__(head, column, max_length)
        self._padding()

    def prepare(self, row: Mapping[str, Any]) -> Prepared:
        """Token ids of the row's text."""
        encoded = dict(self.tokenizer(self._text(row), truncation=True, max_length=self.max_length))
        return Prepared(encoded, len(encoded["input_ids"]), float(len(encoded["input_ids"])))

    def collate(self, rows: Sequence[Prepared]) -> dict[str, Tensor]:
        """Padded ids."""
        return dict(self.tokenizer.pad([row.inputs for row in rows], return_tensors="pt"))


class WrittenInputs(_Texts):
    """Texts to translate, to summarise or to continue; long ones are left out ("too_long"): a label of a part is none.

    An end of sequence that the tokenizer writes behind a prompt is taken off, for nothing is to be said behind it.

    Args:
        head: of a model that writes.
        column: of the texts.
        max_length: most tokens, prefix and special ones included; the most that tokenizer and model know when None.
    """

    def __init__(self, head: Head, column: str, max_length: int | None = None) -> None:
        super().__init__(head, column, max_length)
        self.prefix = head.prefix
        ends = end_ids(head.model)
        self.ends = ends if head.kind == PROMPT else ()
        padding = self.tokenizer.pad_token_id
        # Behind the text and masked: any id will do.
        self.filler = ends[0] if padding is None else padding

    def prepare(self, row: Mapping[str, Any]) -> Prepared:
        """Token ids of the row's text behind the prefix."""
        ids = list(self.tokenizer(self.prefix + self._text(row)).input_ids)
        while ids and ids[-1] in self.ends:
            ids.pop()
        if not ids:
            raise BadItemError(f"{self.column} has no tokens", "empty_text")
        return self._fitting({"input_ids": ids})

    def collate(self, rows: Sequence[Prepared]) -> dict[str, Tensor]:
        """Ids padded on the right, and their mask."""
        ids = [row.inputs["input_ids"] for row in rows]
        return {
            "input_ids": padded(ids, self.filler),
            "attention_mask": padded([[1] * len(row) for row in ids], 0),
        }


class WordInputs(_Texts):
    """Lists of words to tag; rows of which not every word can be read are left out ("too_long").

    Their size is counted in words: what recipes call their column is `tokens`.

    Args:
        head: of a token classifier.
        column: of the words.
        max_length: most tokens, special ones included; the most that tokenizer and model know when None.

    Raises:
        ValueError: when the tokenizer has no padding token.
        TypeError: when it cannot tell words.
    """

    unit = "word_count"

    def __init__(self, head: Head, column: str, max_length: int | None = None) -> None:
        super().__init__(head, column, max_length)
        self._padding()
        if not getattr(self.tokenizer, "is_fast", False):
            raise TypeError(
                f"{type(self.tokenizer).__name__} does not tell which word a token belongs to: use a fast tokenizer"
            )
        self._collate = TokenCollator(self.tokenizer)

    def prepare(self, row: Mapping[str, Any]) -> Prepared:
        """Token ids of the row's words, and the number of the word of each."""
        words = words_of(row[self.column], self.column)
        encoded = self.tokenizer(words, is_split_into_words=True)
        numbers = [-1 if number is None else number for number in encoded.word_ids()]
        gone = set(range(len(words))) - set(numbers)
        if gone:
            first = words[min(gone)]
            raise BadItemError(f"the tokenizer makes nothing of the word {first!r:.60}: leave it out", "no_tokens")
        try:
            read = self._fitting({**encoded, WORD_IDS: numbers})
        except BadItemError as error:
            error.size = float(len(words))
            raise
        return Prepared(read.inputs, read.length, float(len(words)), read.size)

    def collate(self, rows: Sequence[Prepared]) -> dict[str, Tensor]:
        """Padded ids, and `word_ids` padded with -1."""
        return self._collate([row.inputs for row in rows])
