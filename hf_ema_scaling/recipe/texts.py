"""What recipes of text classifiers share: their arguments, their data and their model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding, set_seed

from hf_ema_scaling.data.bad_items import check_choice
from hf_ema_scaling.data.text import WordNoise, build_word_tokenizer, class_names, prepare_classification
from hf_ema_scaling.metrics import ClassificationMetrics
from hf_ema_scaling.recipe.asr_ctc import new_config
from hf_ema_scaling.recipe.sources import load_text, named_sources, naming
from hf_ema_scaling.training import EMATrainingArguments

CLEAN, CORRUPTED = "clean", "corrupted"


@dataclass
class TextDataArguments:
    """Where texts and labels come from. A source is written in one of these ways (see `load_text`).

    `data/train.jsonl`, `data/train.csv`: a manifest, one JSON object per line or a table with a header;
    `data/folder`, `data/folder:split`: a saved `datasets` folder;
    `owner/name:split`, `owner/name:config:split`: the Hub; splits are joined by `+`.
    """

    labelled: str = field(metadata={"help": "Source of the training set."})
    evaluation: str | None = field(
        default=None, metadata={"help": "Source of evaluation texts, or several: a mapping of names to sources."}
    )
    text_column: str = field(default="text", metadata={"help": "Column with the text, in every source."})
    label_column: str = field(default="label", metadata={"help": "Column with the label: a string or an integer."})
    max_length: int = field(default=128, metadata={"help": "Tokens, special ones included, at which texts are cut."})
    max_labelled: int | None = field(default=None, metadata={"help": "Use the first so many rows only."})
    max_evaluation: int | None = field(default=None, metadata={"help": "Use the first so many rows of each set only."})
    on_bad_item: str = field(
        default="raise",
        metadata={
            "help": "raise or skip: what to do with rows that are broken (no text, no label, one the model does not "
            "know, a line that is no row); skipped ones are counted by reason and named in the log."
        },
    )
    corruption: float = field(
        default=0.0,
        metadata={
            "help": "Also evaluate on noise: the set 'clean' (or the only one) once more as 'corrupted', where each "
            "word is replaced with this probability by one drawn from the training texts."
        },
    )
    corruption_seed: int = field(default=0, metadata={"help": "Seed of that noise, the same for runs to compare."})

    def __post_init__(self) -> None:
        check_choice(self.on_bad_item)
        for name in ("max_length", "max_labelled", "max_evaluation"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if not 0 <= self.corruption <= 1:
            raise ValueError(f"corruption must lie in [0, 1], got {self.corruption}")
        names = self.evaluation_sources().keys()
        if self.corruption and CLEAN not in names:
            raise ValueError(
                f"corruption={self.corruption} makes noise of the evaluation set {CLEAN!r}, and there is none: "
                f"{'name it so among ' + ', '.join(names) if names else 'give evaluation'}"
            )
        if self.corruption and CORRUPTED in names:
            raise ValueError(f"corruption makes the evaluation set {CORRUPTED!r} itself: give yours another name")

    def evaluation_sources(self) -> dict[str, str]:
        """Sources by name; a single one has the name '', or 'clean' where it is corrupted too."""
        sources = named_sources(self.evaluation)
        return {CLEAN: sources[""]} if self.corruption and "" in sources else sources


@dataclass
class ClassifierArguments:
    """Which classifier: pre-trained, or from scratch on a vocabulary of words."""

    model_name_or_path: str | None = field(default=None, metadata={"help": "A model to start from, or ..."})
    model_config: str | None = field(
        default=None,
        metadata={"help": "... the configuration of one to train from scratch: a mapping with model_type."},
    )
    tokenizer_name_or_path: str | None = field(
        default=None,
        metadata={"help": "Tokenizer; default: that of model_name_or_path, from scratch the words of the texts."},
    )
    new_labels: bool = field(
        default=False,
        metadata={"help": "With model_name_or_path: new output layers, for the labels of the training set."},
    )
    vocabulary_size: int = field(default=8192, metadata={"help": "Most tokens of a vocabulary of words."})
    lower_case: bool = field(default=True, metadata={"help": "Make words of that vocabulary lower case."})
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


@dataclass
class PreparedTexts:
    """A classifier with its data, ready for a trainer."""

    model: Any
    tokenizer: Any
    labelled: Dataset
    """Token ids, `labels` and lengths."""
    unlabelled: Dataset | None
    """Token ids and lengths."""
    evaluation: dict[str, Dataset]
    """Sets by name, the longest rows first; a single one has the name ''."""

    def of_trainer(self, args: EMATrainingArguments) -> dict[str, Any]:
        """What every trainer of it is given."""
        return {
            "model": self.model,
            "args": args,
            "train_dataset": self.labelled,
            "eval_dataset": self.evaluation.get("", self.evaluation or None),
            "processing_class": self.tokenizer,
            "data_collator": DataCollatorWithPadding(self.tokenizer),
            "compute_metrics": ClassificationMetrics(self.model.config.num_labels).compute,
        }


def prepare_texts(
    data: TextDataArguments,
    model: ClassifierArguments,
    args: EMATrainingArguments,
    *,
    unlabelled: str | None = None,
    max_unlabelled: int | None = None,
    source_column: str | None = None,
    choose: Callable[[Dataset], Dataset] = lambda rows: rows,
) -> PreparedTexts:
    """Loads and tokenises texts, and builds the classifier.

    Data is prepared by the main process first. Every text is tokenised once and padded with its micro-batch only; its
    number of tokens stands in `length_column_name`, for `bucket_window`. Labels of unlabelled texts are not read.

    Args:
        data: where texts come from.
        model: which classifier.
        args: of the run.
        unlabelled: source of unlabelled texts, None without.
        max_unlabelled: use the first so many of them only.
        source_column: column that says where each of them comes from, which stays with them.
        choose: picks the labelled rows of those loaded.

    Raises:
        ValueError, FileNotFoundError, NotImplementedError: for what cannot be used, by name.
    """

    def load(source: str, limit: int | None, labels: bool = True) -> Dataset:
        column = data.label_column if labels else None
        dataset = load_text(
            source,
            text_column=data.text_column,
            label_column=column,
            also=() if labels else kept,
            on_bad_item=data.on_bad_item,
        )
        return dataset if limit is None else dataset.select(range(min(limit, len(dataset))))

    def prepare(source: str, dataset: Dataset, labels: bool = True) -> Dataset:
        with naming(source):
            return prepare_classification(
                dataset,
                tokenizer,
                label_ids,
                text_column=data.text_column,
                label_column=data.label_column if labels else None,
                max_length=data.max_length,
                length_column=args.length_column_name,
                keep=() if labels else kept,
                on_bad_item=data.on_bad_item,
            )

    kept = () if source_column is None else (source_column,)
    config = None if model.model_config is None else new_config(model.model_config)
    with args.main_process_first(desc="preparing texts"):
        everything = load(data.labelled, data.max_labelled)
        names = class_names(everything, data.label_column)
        try:
            labelled = choose(everything)
        except ValueError as error:
            raise ValueError(f"{data.labelled}: {error}") from error
        if len(labelled.unique(data.label_column)) < 2:
            raise ValueError(f"{data.labelled}: all {len(labelled)} rows have the same label: nothing to tell apart")
        free = None if unlabelled is None else load(unlabelled, max_unlabelled, labels=False)
        texts = labelled[data.text_column][:]
        tokenizer = build_tokenizer(model, texts if free is None else texts + free[data.text_column][:])
        set_seed(args.seed if model.init_seed is None else model.init_seed)
        network = build_network(AutoModelForSequenceClassification, model, config, tokenizer, names)
        label_ids = {network.config.id2label[index]: index for index in sorted(network.config.id2label)}
        check_length(data.max_length, network.config, tokenizer)
        train = prepare(data.labelled, labelled)
        loaded = {
            name: (source, load(source, data.max_evaluation)) for name, source in data.evaluation_sources().items()
        }
        if data.corruption:
            source, clean = loaded[CLEAN]
            noise = WordNoise(texts, share=data.corruption, seed=data.corruption_seed)
            loaded[CORRUPTED] = source, _replace_texts(clean, data.text_column, noise)
        # The longest first: similar lengths together, and what memory does not hold fails at once.
        sets = {
            name: prepare(source, rows).sort(args.length_column_name, reverse=True)
            for name, (source, rows) in loaded.items()
        }
        without_labels = None if free is None else prepare(str(unlabelled), free, labels=False)
    return PreparedTexts(network, tokenizer, train, without_labels, sets)


def _replace_texts(dataset: Dataset, text_column: str, noise: WordNoise) -> Dataset:
    texts = [noise(text, row) for row, text in enumerate(dataset[text_column])]
    return dataset.remove_columns(text_column).add_column(text_column, texts)


def build_tokenizer(model: ClassifierArguments, texts: Sequence[str]) -> Any:
    """The tokenizer that is named, or one of the words of `texts`.

    Raises:
        ValueError: for one without a padding token.
    """
    name = model.tokenizer_name_or_path or model.model_name_or_path
    if name is None:
        return build_word_tokenizer(texts, vocabulary_size=model.vocabulary_size, lower_case=model.lower_case)
    tokenizer = AutoTokenizer.from_pretrained(name)
    if tokenizer.pad_token_id is None:
        raise ValueError(
            f"the tokenizer of {name} has no padding token, and texts of a batch differ in length: save it with one, "
            "and name it by tokenizer_name_or_path"
        )
    return tokenizer


def build_network(kind: Any, model: ClassifierArguments, config: Any | None, tokenizer: Any, names: list[str]) -> Any:
    """The classifier in float32, of texts or of tokens.

    Args:
        kind: the auto class of its head.
        model: where it comes from.
        config: of a model from scratch; None for a checkpoint.
        tokenizer: of its texts.
        names: of the classes, in the order of their ids.

    Raises:
        ValueError: for a checkpoint that has other classes, or fewer tokens than the tokenizer.
    """
    labels: dict[str, Any] = {
        "id2label": dict(enumerate(names)),
        "label2id": {name: index for index, name in enumerate(names)},
    }
    if kind is AutoModelForSequenceClassification:
        labels["problem_type"] = "single_label_classification"
    if config is not None:
        for name, value in {**labels, "vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}.items():
            setattr(config, name, value)
        return kind.from_config(config)
    changed = {**labels, "ignore_mismatched_sizes": True} if model.new_labels else {}
    # The checkpoint's own dtype would have the optimizer work in bfloat16 too.
    network = kind.from_pretrained(str(model.model_name_or_path), dtype=torch.float32, **changed)
    network.config.problem_type = labels.get("problem_type")
    if model.new_labels:
        # An output layer of the same size would have come from the checkpoint.
        fresh = kind.from_config(network.config)
        for name, part in network.named_children():
            if name != network.base_model_prefix:
                part.load_state_dict(fresh.get_submodule(name).state_dict())
    known = network.config.id2label.values()
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(
            f"{model.model_name_or_path} knows the labels {', '.join(known)}, not {', '.join(unknown)}: set "
            "new_labels for new output layers"
        )
    if len(tokenizer) > network.config.vocab_size:
        raise ValueError(
            f"{model.tokenizer_name_or_path} has {len(tokenizer)} tokens, {model.model_name_or_path} knows "
            f"{network.config.vocab_size}: give the tokenizer that the model was trained with"
        )
    if network.config.pad_token_id is None:
        network.config.pad_token_id = tokenizer.pad_token_id
    return network


def check_length(max_length: int, config: Any, tokenizer: Any) -> None:
    """Refuses a `max_length` that leaves no room for text, or is beyond what model and tokenizer know.

    Raises:
        ValueError: see above.
    """
    limit = min(tokenizer.model_max_length, getattr(config, "max_position_embeddings", None) or max_length)
    special = tokenizer.num_special_tokens_to_add()
    if not special < max_length <= limit:
        raise ValueError(
            f"max_length={max_length} must be above the {special} special tokens and at most {limit}, the longest "
            "text that model and tokenizer know"
        )
