"""What recipes share: arguments from YAML and the command line, data, models, and one run of them."""

from hf_ema_scaling.recipe.asr_ctc import ASR_CTC, ModelArguments, build_asr_ctc
from hf_ema_scaling.recipe.asr_seq2seq import ASR_SEQ2SEQ, build_asr_seq2seq
from hf_ema_scaling.recipe.byol import BYOL, build_byol
from hf_ema_scaling.recipe.config import parse
from hf_ema_scaling.recipe.runner import main, results_table, run
from hf_ema_scaling.recipe.sources import load_pairs, load_speech, load_text, load_words
from hf_ema_scaling.recipe.speech import AugmentationArguments, SpeechDataArguments
from hf_ema_scaling.recipe.supervised import SUPERVISED, build_supervised
from hf_ema_scaling.recipe.text_classification import TEXT_CLASSIFICATION, build_text_classification
from hf_ema_scaling.recipe.texts import ClassifierArguments, TextDataArguments
from hf_ema_scaling.recipe.token_classification import TOKEN_CLASSIFICATION, build_token_classification
from hf_ema_scaling.recipe.translation import TRANSLATION, build_translation

__all__ = [
    "ASR_CTC",
    "ASR_SEQ2SEQ",
    "BYOL",
    "SUPERVISED",
    "TEXT_CLASSIFICATION",
    "TOKEN_CLASSIFICATION",
    "TRANSLATION",
    "AugmentationArguments",
    "ClassifierArguments",
    "ModelArguments",
    "SpeechDataArguments",
    "TextDataArguments",
    "build_asr_ctc",
    "build_asr_seq2seq",
    "build_byol",
    "build_supervised",
    "build_text_classification",
    "build_token_classification",
    "build_translation",
    "load_pairs",
    "load_speech",
    "load_text",
    "load_words",
    "main",
    "parse",
    "results_table",
    "run",
]
