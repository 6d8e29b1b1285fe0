"""The recipe for translation with few pairs and many sources: its arguments, its model, its trainer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, DataCollatorForSeq2Seq, set_seed

from hf_ema_scaling.data.bad_items import check_choice
from hf_ema_scaling.data.targets import TextTargets
from hf_ema_scaling.data.translation import build_subword_tokenizer, prepare_pairs
from hf_ema_scaling.metrics import TextMetrics, character_error_rate, exact_match
from hf_ema_scaling.recipe.asr_ctc import new_config
from hf_ema_scaling.recipe.generating import GeneratingTrainingArguments, labeler_of
from hf_ema_scaling.recipe.sources import load_pairs, named_sources, naming
from hf_ema_scaling.recipe.text_views import TextViewArguments
from hf_ema_scaling.training import PseudoLabelArguments
from hf_ema_scaling.training.mixin import EMATrainerMixin
from hf_ema_scaling.training.seq2seq import EMASeq2SeqTrainer, PseudoLabelSeq2SeqTrainer


@dataclass
class TranslationDataArguments:
    """Where texts and their translations come from. A source is written in one of these ways (see `load_pairs`).

    `data/train.jsonl`, `data/train.csv`: a manifest, one JSON object per line or a table with a header;
    `data/folder`, `data/folder:split`: a saved `datasets` folder;
    `owner/name:split`, `owner/name:config:split`: the Hub; splits are joined by `+`.
    """

    labelled: str = field(metadata={"help": "Source of texts with translations."})
    unlabelled: str | None = field(
        default=None,
        metadata={"help": "Source of texts without; translations in it are never read. Turns pseudo-labels on."},
    )
    evaluation: str | None = field(
        default=None, metadata={"help": "Source of evaluation pairs, or several: a mapping of names to sources."}
    )
    text_column: str = field(
        default="source",
        metadata={"help": "Column with the text; translation.en for the part en of a column of mappings."},
    )
    target_column: str = field(default="target", metadata={"help": "Column with its translation."})
    max_length: int = field(
        default=128, metadata={"help": "Tokens of either side, special ones included, above which a row is left out."}
    )
    max_labelled: int | None = field(default=None, metadata={"help": "Use the first so many rows only."})
    max_unlabelled: int | None = field(default=None, metadata={"help": "Use the first so many rows only."})
    max_evaluation: int | None = field(default=None, metadata={"help": "Use the first so many rows of each set only."})
    on_bad_item: str = field(
        default="raise",
        metadata={
            "help": "raise or skip: what to do with rows that are broken (an empty text, a special token in a "
            "translation, a line that is no row); skipped ones are counted by reason and named in the log."
        },
    )

    def __post_init__(self) -> None:
        check_choice(self.on_bad_item)
        for name in ("max_length", "max_labelled", "max_unlabelled", "max_evaluation"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")


@dataclass
class TranslatorArguments:
    """Which translator: pre-trained, or from scratch on subwords of the texts."""

    model_name_or_path: str | None = field(default=None, metadata={"help": "A model to start from, or ..."})
    model_config: str | None = field(
        default=None,
        metadata={"help": "... the configuration of one to train from scratch: a mapping with model_type."},
    )
    source_language: str | None = field(
        default=None, metadata={"help": "Of the texts, where the tokenizer knows several: its own code."}
    )
    target_language: str | None = field(
        default=None, metadata={"help": "Of the translations, where the model writes several: the tokenizer's code."}
    )
    source_prefix: str = field(
        default="", metadata={"help": "Written before each text: 'translate English to French: ' for T5."}
    )
    vocabulary_size: int = field(default=2048, metadata={"help": "Most subwords of a model from scratch."})
    max_label_tokens: int | None = field(
        default=None,
        metadata={"help": "Tokens after which a pseudo-label without an end is given up; default: max_length."},
    )
    init_seed: int | None = field(
        default=None,
        metadata={
            "help": "Seed of new weights; default: seed. Runs that share it start alike, whatever their data order "
            "and dropout."
        },
    )

    def __post_init__(self) -> None:
        if (self.model_name_or_path is None) == (self.model_config is None):
            raise ValueError(
                f"give model_name_or_path or model_config, one of them: got {self.model_name_or_path!r} and "
                f"{self.model_config!r}"
            )


TRANSLATION = (
    TranslationDataArguments,
    TranslatorArguments,
    TextViewArguments,
    GeneratingTrainingArguments,
    PseudoLabelArguments,
)
"""The arguments of `build_translation`, for `parse`."""


def build_translation(
    data: TranslationDataArguments,
    model: TranslatorArguments,
    views: TextViewArguments,
    args: GeneratingTrainingArguments,
    pseudo: PseudoLabelArguments,
) -> EMATrainerMixin:
    """The trainer of a translator: with pseudo-labels if there are texts without translations, else on pairs alone.

    Metrics are the character error rate (`cer`, character edits over reference characters) and the share of
    translations that are the reference (`exact_match`). They compare runs with each other; for numbers that compare
    with those of others, score saved models with sacrebleu. Data is prepared by the main process first.

    Raises:
        ValueError, FileNotFoundError, NotImplementedError: for what cannot be used, by name.
    """
    if data.unlabelled is not None and model.model_config is not None and pseudo.pl_start <= 0:
        raise ValueError("pl_start must be above 0: a model from scratch has nothing to teach at reference step 0")

    def load(source: str, limit: int | None, targets: bool = True) -> Dataset:
        column = data.target_column if targets else None
        dataset = load_pairs(source, text_column=data.text_column, target_column=column, on_bad_item=data.on_bad_item)
        return dataset if limit is None else dataset.select(range(min(limit, len(dataset))))

    def prepare(source: str, dataset: Dataset, targets: bool = True) -> Dataset:
        with naming(source):
            return prepare_pairs(
                dataset,
                tokenizer,
                target,
                source_column=data.text_column,
                target_column=data.target_column if targets else None,
                prefix=model.source_prefix,
                max_length=data.max_length,
                length_column=args.length_column_name,
                on_bad_item=data.on_bad_item,
            )

    with args.main_process_first(desc="preparing texts"):
        labelled = load(data.labelled, data.max_labelled)
        free = None if data.unlabelled is None else load(data.unlabelled, data.max_unlabelled, targets=False)
        texts = [*labelled[data.text_column], *labelled[data.target_column]]
        tokenizer = _tokenizer(model, texts if free is None else [*texts, *free[data.text_column]])
        set_seed(args.seed if model.init_seed is None else model.init_seed)
        network = _network(model, tokenizer)
        labeler = labeler_of(
            network,
            tokenizer,
            language=model.target_language,
            max_label_tokens=model.max_label_tokens or data.max_length,
        )
        target = TextTargets(labeler, tokenizer)
        train = prepare(data.labelled, labelled)
        # The longest first: similar lengths together, and what memory does not hold fails at once.
        sets = {
            name: prepare(source, load(source, data.max_evaluation)).sort(args.length_column_name, reverse=True)
            for name, source in named_sources(data.evaluation).items()
        }
        unlabelled = None if free is None else prepare(str(data.unlabelled), free, targets=False)
    metrics = TextMetrics(tokenizer, {"cer": character_error_rate, "exact_match": exact_match})
    shared: dict[str, Any] = {
        "model": network,
        "args": args,
        "train_dataset": train,
        "eval_dataset": sets.get("", sets or None),
        "processing_class": tokenizer,
        "data_collator": DataCollatorForSeq2Seq(tokenizer),
        "compute_metrics": metrics.compute if args.predict_with_generate else None,
        "augmentation": views.build(tokenizer),
    }
    if unlabelled is None:
        return EMASeq2SeqTrainer(**shared)
    return PseudoLabelSeq2SeqTrainer(**shared, unlabeled_dataset=unlabelled, pseudo_label_args=pseudo, labeler=labeler)


def _tokenizer(model: TranslatorArguments, texts: list[str]) -> Any:
    if model.model_name_or_path is None:
        return build_subword_tokenizer(texts, vocabulary_size=model.vocabulary_size)
    languages = {"src_lang": model.source_language, "tgt_lang": model.target_language}
    given = {name: value for name, value in languages.items() if value is not None}
    return AutoTokenizer.from_pretrained(model.model_name_or_path, **given)


def _network(model: TranslatorArguments, tokenizer: Any) -> Any:
    if model.model_config is None:
        # The checkpoint's own dtype would have the optimizer work in bfloat16 too.
        return AutoModelForSeq2SeqLM.from_pretrained(str(model.model_name_or_path), dtype=torch.float32)
    config = new_config(model.model_config)
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "pad", "eos")}
    for name, value in {**ids, "decoder_start_token_id": tokenizer.pad_token_id, "vocab_size": len(tokenizer)}.items():
        setattr(config, name, value)
    return AutoModelForSeq2SeqLM.from_config(config)
