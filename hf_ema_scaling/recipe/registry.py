"""The kinds of recipes by name: what a YAML file's key `recipe` may say."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_ema_scaling.recipe.asr_ctc import ASR_CTC, build_asr_ctc
from hf_ema_scaling.recipe.asr_seq2seq import ASR_SEQ2SEQ, build_asr_seq2seq
from hf_ema_scaling.recipe.byol import BYOL, build_byol
from hf_ema_scaling.recipe.config import KIND_KEY, close_names, read_mapping
from hf_ema_scaling.recipe.supervised import SUPERVISED, build_supervised
from hf_ema_scaling.recipe.text_classification import TEXT_CLASSIFICATION, build_text_classification
from hf_ema_scaling.recipe.token_classification import TOKEN_CLASSIFICATION, build_token_classification
from hf_ema_scaling.recipe.translation import TRANSLATION, build_translation
from hf_ema_scaling.training.mixin import EMATrainerMixin

DEFAULT_KIND = "asr_ctc"


@dataclass(frozen=True)
class RecipeKind:
    """A kind of recipe.

    Args:
        arguments: data classes for `parse`; one of them is or derives from `EMATrainingArguments`.
        build: makes the trainer from one instance of each.
    """

    arguments: tuple[type, ...]
    build: Callable[..., EMATrainerMixin]


RECIPES: dict[str, RecipeKind] = {
    "asr_ctc": RecipeKind(ASR_CTC, build_asr_ctc),
    "asr_seq2seq": RecipeKind(ASR_SEQ2SEQ, build_asr_seq2seq),
    "byol": RecipeKind(BYOL, build_byol),
    "supervised": RecipeKind(SUPERVISED, build_supervised),
    "text_classification": RecipeKind(TEXT_CLASSIFICATION, build_text_classification),
    "token_classification": RecipeKind(TOKEN_CLASSIFICATION, build_token_classification),
    "translation": RecipeKind(TRANSLATION, build_translation),
}


def kind_of(settings: Mapping[str, Any]) -> RecipeKind:
    """The kind that the settings of a recipe name by `recipe`; `DEFAULT_KIND` where they name none.

    Raises:
        ValueError: for a kind that is not known.
    """
    name = settings.get(KIND_KEY, DEFAULT_KIND)
    if not isinstance(name, str) or name not in RECIPES:
        raise ValueError(
            f"{KIND_KEY} must be one of {', '.join(RECIPES)}, got {name!r}{close_names(str(name), RECIPES)}"
        )
    return RECIPES[name]


def kind_of_file(config: Path | None) -> RecipeKind:
    """As `kind_of`, for a recipe's YAML file, or no file.

    Raises:
        ValueError: for a kind that is not known, or a file that cannot be read as a mapping.
    """
    try:
        return kind_of({} if config is None else read_mapping(config))
    except ValueError as error:
        raise error if str(config) in str(error) else ValueError(f"{config}: {error}") from error
