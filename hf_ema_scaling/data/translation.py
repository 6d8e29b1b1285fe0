"""From pairs of texts to the rows of an encoder-decoder, and a vocabulary for one that is trained from scratch."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from datasets import Dataset, Features, List, Value
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from hf_ema_scaling.data.bad_items import RAISE, BadItemError, BadItems
from hf_ema_scaling.data.speech import quiet_unless_terminal

logger = logging.getLogger(__name__)

BEGIN, PAD, END, UNKNOWN = "<s>", "<pad>", "</s>", "<unk>"


def build_subword_tokenizer(texts: Iterable[str], *, vocabulary_size: int = 2048) -> PreTrainedTokenizerFast:
    """A tokenizer of subwords of both languages: byte pair encoding, so that every text can be written.

    A text becomes its tokens and `</s>`. Ids are 0 `<s>`, 1 `<pad>`, 2 `</s>`, 3 `<unk>`, as BART has them.

    Args:
        texts: of both sides of the training set.
        vocabulary_size: most tokens; the 256 bytes and 4 special ones are always among them.

    Raises:
        ValueError: when there is no room for the bytes.
    """
    special = [BEGIN, PAD, END, UNKNOWN]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if vocabulary_size < len(special) + len(alphabet):
        raise ValueError(
            f"vocabulary_size must be at least {len(special) + len(alphabet)}, the bytes and {len(special)} special "
            f"tokens, got {vocabulary_size}"
        )
    tokenizer = Tokenizer(models.BPE(unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size, special_tokens=special, initial_alphabet=sorted(alphabet), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {END}", special_tokens=[(END, tokenizer.token_to_id(END))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BEGIN,
        pad_token=PAD,
        eos_token=END,
        unk_token=UNKNOWN,
        model_input_names=["input_ids", "attention_mask"],
    )


def prepare_pairs(
    dataset: Dataset,
    tokenizer: Any,
    target: Callable[[str], Sequence[int]],
    *,
    source_column: str,
    target_column: str | None,
    prefix: str = "",
    max_length: int,
    length_column: str = "length",
    on_bad_item: str = RAISE,
) -> Dataset:
    """Token ids of sources and of what the decoder is to learn; each text is tokenised once and nothing is padded.

    A row with more than `max_length` tokens on one side, special ones included, is left out, not cut: what is missing
    at the end of a source is still in its translation. They are counted and logged.

    Args:
        dataset: texts, as `load_pairs` checked them.
        tokenizer: of the sources.
        target: the ids that the decoder is to learn for a text, such as `TextTargets`. Refuses a broken text by
            `BadItemError`.
        source_column: column of the sources.
        target_column: column of the translations; None for sources without.
        prefix: what is written before each source (T5's instruction).
        max_length: most tokens of either side.
        length_column: name of the column for the number of source tokens.
        on_bad_item: `raise` an error for a text that `target` refuses, or `skip` its row, counted and named in the
            log.

    Returns:
        `input_ids`, `attention_mask`, `labels` where there are translations, and the lengths.

    Raises:
        ValueError: when no row is left; with `on_bad_item="raise"` also for a text that `target` refuses
            (`BadItemError`, naming its row, from 1).
    """
    bad = BadItems(on_bad_item)
    labels: list[list[int]] = []
    good: list[int] = []
    if target_column is not None:
        for row, text in enumerate(dataset[target_column]):
            try:
                labels.append(list(target(text)))
                good.append(row)
            except BadItemError as error:
                bad.add(error.of(f"row {row + 1}"))
        bad.log(logger, target_column, len(dataset))
        dataset = dataset if len(good) == len(dataset) else dataset.select(good)

    def encode(rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
        ids = [tokenizer(prefix + text).input_ids for text in rows[source_column]]
        return {
            "input_ids": ids,
            "attention_mask": [[1] * len(row) for row in ids],
            length_column: [len(row) for row in ids],
        }

    ids = List(Value("int64"))
    features = {"input_ids": ids, "attention_mask": ids, length_column: Value("int64")}
    with quiet_unless_terminal():
        encoded = dataset.map(
            encode,
            batched=True,
            remove_columns=dataset.column_names,
            features=Features(features),
            desc="tokenising",
        )
    if target_column is not None:
        encoded = encoded.add_column("labels", labels, feature=ids)
    sides = {"source": "input_ids"} if target_column is None else {"source": "input_ids", "target": "labels"}
    long = {
        side: {row for row, ids in enumerate(encoded[column]) if len(ids) > max_length}
        for side, column in sides.items()
    }
    out: set[int] = set().union(*long.values())
    if not out:
        return encoded
    summary = ", ".join(f"{len(rows)} by their {side}" for side, rows in long.items())
    if len(out) == len(encoded):
        raise ValueError(f"all {len(encoded)} rows are longer than {max_length} tokens ({summary}): raise max_length")
    logger.warning("left out %d of %d rows, longer than %d tokens: %s", len(out), len(encoded), max_length, summary)
    return encoded.select([row for row in range(len(encoded)) if row not in out])
