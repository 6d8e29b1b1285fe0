"""The recipe for text classification with few labels and many texts: its arguments, its trainer."""

from __future__ import annotations

from dataclasses import dataclass, field

from datasets import Dataset

from hf_ema_scaling.data.text import drawn_by_class
from hf_ema_scaling.labels import labeler_for
from hf_ema_scaling.recipe.text_views import TextViewArguments
from hf_ema_scaling.recipe.texts import ClassifierArguments, TextDataArguments, prepare_texts
from hf_ema_scaling.training import EMATrainer, EMATrainingArguments, PseudoLabelArguments, PseudoLabelTrainer
from hf_ema_scaling.training.mixin import EMATrainerMixin


@dataclass
class SemiSupervisedTextArguments(TextDataArguments):
    """Where texts come from, with labels and without."""

    unlabelled: str | None = field(
        default=None,
        metadata={"help": "Source of unlabelled texts; its labels are never read. Turns pseudo-labels on."},
    )
    max_unlabelled: int | None = field(default=None, metadata={"help": "Use the first so many rows only."})
    labels_per_class: int | None = field(
        default=None, metadata={"help": "Use so many rows of each class of the labelled source only, drawn at random."}
    )
    label_seed: int | None = field(default=None, metadata={"help": "Seed by which they are drawn; default: seed."})

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("max_unlabelled", "labels_per_class"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")


@dataclass
class SoftLabelArguments:
    """What a pseudo-label says: a class, or the probabilities of all."""

    soft_labels: bool = field(default=False, metadata={"help": "The student learns the teacher's probabilities."})
    temperature: float = field(
        default=1.0,
        metadata={"help": "Of the teacher's softmax, for soft labels and confidence; below 1 sharpens."},
    )


TEXT_CLASSIFICATION = (
    SemiSupervisedTextArguments,
    ClassifierArguments,
    TextViewArguments,
    SoftLabelArguments,
    EMATrainingArguments,
    PseudoLabelArguments,
)
"""The arguments of `build_text_classification`, for `parse`."""


def build_text_classification(
    data: SemiSupervisedTextArguments,
    model: ClassifierArguments,
    views: TextViewArguments,
    soft: SoftLabelArguments,
    args: EMATrainingArguments,
    pseudo: PseudoLabelArguments,
) -> EMATrainerMixin:
    """The trainer of a text classifier: with pseudo-labels if there are unlabelled texts, else on labelled ones alone.

    Raises:
        ValueError, FileNotFoundError, NotImplementedError: for what cannot be used, by name (see `prepare_texts`).
    """
    if data.unlabelled is not None and pseudo.pl_start <= 0:
        raise ValueError("pl_start must be above 0: new output layers have nothing to teach at reference step 0")

    def choose(rows: Dataset) -> Dataset:
        if data.labels_per_class is None:
            return rows
        seed = args.seed if data.label_seed is None else data.label_seed
        return rows.select(drawn_by_class(rows[data.label_column][:], data.labels_per_class, seed))

    texts = prepare_texts(
        data,
        model,
        args,
        unlabelled=data.unlabelled,
        max_unlabelled=data.max_unlabelled,
        source_column=pseudo.source_column,
        choose=choose,
    )
    shared = texts.of_trainer(args) | {"augmentation": views.build(texts.tokenizer)}
    if texts.unlabelled is None:
        return EMATrainer(**shared)
    return PseudoLabelTrainer(
        **shared,
        unlabeled_dataset=texts.unlabelled,
        pseudo_label_args=pseudo,
        labeler=labeler_for(texts.model, soft=soft.soft_labels, temperature=soft.temperature),
    )
