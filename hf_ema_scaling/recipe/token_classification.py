"""The recipe for tagging words (named entities) with few labels and many texts: its arguments, its trainer."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from datasets import Dataset
from transformers import AutoModelForTokenClassification, set_seed

from hf_ema_scaling.data.bad_items import check_choice
from hf_ema_scaling.data.tokens import TokenCollator, prepare_tokens, tag_names
from hf_ema_scaling.labels import labeler_for
from hf_ema_scaling.metrics import TokenMetrics
from hf_ema_scaling.recipe.asr_ctc import new_config
from hf_ema_scaling.recipe.sources import load_words, named_sources, naming
from hf_ema_scaling.recipe.text_views import TextViewArguments
from hf_ema_scaling.recipe.texts import ClassifierArguments, build_network, build_tokenizer, check_length
from hf_ema_scaling.training import EMATrainer, EMATrainingArguments, PseudoLabelArguments, PseudoLabelTrainer
from hf_ema_scaling.training.mixin import EMATrainerMixin


@dataclass
class WordDataArguments:
    """Where words and tags come from. A source is written in one of these ways (see `load_words`).

    `data/train.jsonl`: a manifest, one JSON object with a list of words and a list of tags per line;
    `data/folder`, `data/folder:split`: a saved `datasets` folder;
    `owner/name:split`, `owner/name:config:split`: the Hub; splits are joined by `+`.
    """

    labelled: str = field(metadata={"help": "Source of the labelled rows."})
    unlabelled: str | None = field(
        default=None, metadata={"help": "Source of unlabelled rows; its tags are never read. Turns pseudo-labels on."}
    )
    evaluation: str | None = field(
        default=None, metadata={"help": "Source of evaluation rows, or several: a mapping of names to sources."}
    )
    word_column: str = field(default="tokens", metadata={"help": "Column with the list of words, in every source."})
    tag_column: str = field(default="ner_tags", metadata={"help": "Column with the list of tags."})
    max_length: int = field(default=128, metadata={"help": "Tokens, special ones included, at which rows are cut."})
    labelled_rows: int | None = field(
        default=None, metadata={"help": "Use so many rows of the labelled source only, drawn at random."}
    )
    label_seed: int | None = field(default=None, metadata={"help": "Seed by which they are drawn; default: seed."})
    max_unlabelled: int | None = field(default=None, metadata={"help": "Use the first so many rows only."})
    max_evaluation: int | None = field(default=None, metadata={"help": "Use the first so many rows of each set only."})
    on_bad_item: str = field(
        default="raise",
        metadata={
            "help": "raise or skip: what to do with rows that are broken (no words, another number of tags, a line "
            "that is no row); skipped ones are counted by reason and named in the log."
        },
    )
    label_all_tokens: bool = field(
        default=False, metadata={"help": "All sub-tokens of a word have its label, not the first one only."}
    )
    min_word_confidence: float = field(
        default=0.0, metadata={"help": "Words that the teacher is less sure of are no targets; their row is kept."}
    )

    def __post_init__(self) -> None:
        check_choice(self.on_bad_item)
        for name in ("max_length", "labelled_rows", "max_unlabelled", "max_evaluation"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")


TOKEN_CLASSIFICATION = (
    WordDataArguments,
    ClassifierArguments,
    TextViewArguments,
    EMATrainingArguments,
    PseudoLabelArguments,
)
"""The arguments of `build_token_classification`, for `parse`."""


def build_token_classification(
    data: WordDataArguments,
    model: ClassifierArguments,
    views: TextViewArguments,
    args: EMATrainingArguments,
    pseudo: PseudoLabelArguments,
) -> EMATrainerMixin:
    """The trainer of a tagger: with pseudo-labels if there are unlabelled rows, else on labelled ones alone.

    Data is prepared by the main process first; the tags are those of the whole labelled source.

    Raises:
        ValueError, FileNotFoundError, NotImplementedError, TypeError: for what cannot be used, by name.
    """
    if data.unlabelled is not None and pseudo.pl_start <= 0:
        raise ValueError("pl_start must be above 0: new output layers have nothing to teach at reference step 0")

    def load(source: str, limit: int | None = None, tags: bool = True) -> Dataset:
        dataset = load_words(
            source,
            word_column=data.word_column,
            tag_column=data.tag_column if tags else None,
            on_bad_item=data.on_bad_item,
        )
        return dataset if limit is None else dataset.select(range(min(limit, len(dataset))))

    def prepare(source: str, dataset: Dataset, tags: bool = True) -> Dataset:
        with naming(source):
            return prepare_tokens(
                dataset,
                tokenizer,
                tag_ids,
                word_column=data.word_column,
                tag_column=data.tag_column if tags else None,
                max_length=data.max_length,
                label_all_tokens=data.label_all_tokens,
                length_column=args.length_column_name,
            )

    def drawn(rows: Dataset) -> Dataset:
        if data.labelled_rows is None:
            return rows
        if data.labelled_rows > len(rows):
            raise ValueError(f"{data.labelled}: labelled_rows is {data.labelled_rows}, but there are only {len(rows)}")
        seed = args.seed if data.label_seed is None else data.label_seed
        chosen = np.random.default_rng(seed).choice(len(rows), data.labelled_rows, replace=False)
        return rows.select(sorted(chosen.tolist()))

    config = None if model.model_config is None else new_config(model.model_config)
    with args.main_process_first(desc="preparing words"):
        everything = load(data.labelled)
        names = tag_names(everything, data.tag_column)
        if len(names) < 2:
            raise ValueError(f"{data.labelled}: the only tag is {', '.join(names)}: nothing to tell apart")
        labelled = drawn(everything)
        free = None if data.unlabelled is None else load(data.unlabelled, data.max_unlabelled, tags=False)
        texts = [" ".join(words) for rows in (labelled, free) if rows is not None for words in rows[data.word_column]]
        tokenizer = build_tokenizer(model, texts)
        set_seed(args.seed if model.init_seed is None else model.init_seed)
        network = build_network(AutoModelForTokenClassification, model, config, tokenizer, names)
        tag_ids = {network.config.id2label[index]: index for index in sorted(network.config.id2label)}
        check_length(data.max_length, network.config, tokenizer)
        train = prepare(data.labelled, labelled)
        # The longest first: similar lengths together, and what memory does not hold fails at once.
        sets = {
            name: prepare(source, load(source, data.max_evaluation)).sort(args.length_column_name, reverse=True)
            for name, source in named_sources(data.evaluation).items()
        }
        unlabelled = None if free is None else prepare(str(data.unlabelled), free, tags=False)
    shared = {
        "model": network,
        "args": args,
        "train_dataset": train,
        "eval_dataset": sets.get("", sets or None),
        "processing_class": tokenizer,
        "data_collator": TokenCollator(tokenizer),
        "compute_metrics": TokenMetrics(list(tag_ids)).compute,
        "augmentation": views.build(tokenizer),
    }
    if unlabelled is None:
        return EMATrainer(**shared)
    labeler = labeler_for(
        network, label_all_tokens=data.label_all_tokens, min_word_confidence=data.min_word_confidence
    )
    return PseudoLabelTrainer(**shared, unlabeled_dataset=unlabelled, pseudo_label_args=pseudo, labeler=labeler)
