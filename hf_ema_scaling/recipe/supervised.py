"""The recipe for text classification with an averaged model: its arguments, its trainer."""

from __future__ import annotations

from hf_ema_scaling.recipe.texts import ClassifierArguments, TextDataArguments, prepare_texts
from hf_ema_scaling.training import EMATrainer, EMATrainingArguments

SUPERVISED = (TextDataArguments, ClassifierArguments, EMATrainingArguments)
"""The arguments of `build_supervised`, for `parse`."""


def build_supervised(data: TextDataArguments, model: ClassifierArguments, args: EMATrainingArguments) -> EMATrainer:
    """The trainer of a text classifier, which evaluates the student and the average of its weights.

    Raises:
        ValueError, FileNotFoundError, NotImplementedError: for what cannot be used, by name (see `prepare_texts`).
    """
    return EMATrainer(**prepare_texts(data, model, args).of_trainer(args))
