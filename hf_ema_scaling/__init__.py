"""Tune once at a small reference batch; run at any batch; teach with the average of the weights.

The EMA Scaling Rule ("How to Scale Your EMA", arXiv 2307.13813) for Hugging Face `Trainer`. Names are loaded when they
are first used, so importing the package is cheap.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "BatchSchedule": "scaling",
    "ReferenceClock": "scaling",
    "ScalingPlan": "scaling",
    "half_life_from_momentum": "scaling",
    "momentum_from_half_life": "scaling",
    "register_scaling_rule": "scaling",
    "scale_momentum": "scaling",
    "EMATeacher": "ema",
    "WeightAverage": "ema",
    "SkipWatch": "ema.skipped",
    "register_average": "ema",
    "CTCLabeler": "labels",
    "Labeler": "labels",
    "PseudoLabel": "labels",
    "ClassLabeler": "labels",
    "MultiLabelLabeler": "labels",
    "RegressionLabeler": "labels",
    "TokenLabeler": "labels",
    "CausalLMLabeler": "labels",
    "Seq2SeqLabeler": "labels",
    "Decoding": "labels",
    "labeler_for": "labels",
    "generative_labeler_for": "labels",
    "build_filters": "labels",
    "fit_filters": "labels",
    "two_views": "labels",
    "Filter": "labels",
    "FilterChain": "labels",
    "Ledger": "labels",
    "Row": "labels",
    "TransducerLabeler": "labels.transducer",
    "ScheduledBatchSampler": "data",
    "Chain": "data.views",
    "Augmentation": "data.views",
    "AdditiveNoise": "data.speech_views",
    "SpeedPerturbation": "data.speech_views",
    "TokenMasking": "data.text_views",
    "WordDropout": "data.text_views",
    "BYOLConfig": "training",
    "BYOLModel": "training",
    "BYOLTrainer": "training",
    "EMACallback": "training",
    "EMATrainer": "training",
    "EMATrainingArguments": "training",
    "PseudoLabelArguments": "training",
    "PseudoLabelCollator": "training",
    "PseudoLabelTrainer": "training",
    "EMASeq2SeqTrainer": "training.seq2seq",
    "PseudoLabelSeq2SeqTrainer": "training.seq2seq",
    "EMASeq2SeqTrainingArguments": "training.seq2seq_arguments",
}

__all__ = ["__version__", *_HOME]

if TYPE_CHECKING:
    from hf_ema_scaling.data import ScheduledBatchSampler as ScheduledBatchSampler
    from hf_ema_scaling.data.speech_views import AdditiveNoise as AdditiveNoise
    from hf_ema_scaling.data.speech_views import SpeedPerturbation as SpeedPerturbation
    from hf_ema_scaling.data.text_views import TokenMasking as TokenMasking
    from hf_ema_scaling.data.text_views import WordDropout as WordDropout
    from hf_ema_scaling.data.views import Augmentation as Augmentation
    from hf_ema_scaling.data.views import Chain as Chain
    from hf_ema_scaling.ema import EMATeacher as EMATeacher
    from hf_ema_scaling.ema import WeightAverage as WeightAverage
    from hf_ema_scaling.ema import register_average as register_average
    from hf_ema_scaling.ema.skipped import SkipWatch as SkipWatch
    from hf_ema_scaling.labels import CausalLMLabeler as CausalLMLabeler
    from hf_ema_scaling.labels import ClassLabeler as ClassLabeler
    from hf_ema_scaling.labels import CTCLabeler as CTCLabeler
    from hf_ema_scaling.labels import Decoding as Decoding
    from hf_ema_scaling.labels import Filter as Filter
    from hf_ema_scaling.labels import FilterChain as FilterChain
    from hf_ema_scaling.labels import Labeler as Labeler
    from hf_ema_scaling.labels import Ledger as Ledger
    from hf_ema_scaling.labels import MultiLabelLabeler as MultiLabelLabeler
    from hf_ema_scaling.labels import PseudoLabel as PseudoLabel
    from hf_ema_scaling.labels import RegressionLabeler as RegressionLabeler
    from hf_ema_scaling.labels import Row as Row
    from hf_ema_scaling.labels import Seq2SeqLabeler as Seq2SeqLabeler
    from hf_ema_scaling.labels import TokenLabeler as TokenLabeler
    from hf_ema_scaling.labels import build_filters as build_filters
    from hf_ema_scaling.labels import fit_filters as fit_filters
    from hf_ema_scaling.labels import generative_labeler_for as generative_labeler_for
    from hf_ema_scaling.labels import labeler_for as labeler_for
    from hf_ema_scaling.labels import two_views as two_views
    from hf_ema_scaling.labels.transducer import TransducerLabeler as TransducerLabeler
    from hf_ema_scaling.scaling import BatchSchedule as BatchSchedule
    from hf_ema_scaling.scaling import ReferenceClock as ReferenceClock
    from hf_ema_scaling.scaling import ScalingPlan as ScalingPlan
    from hf_ema_scaling.scaling import half_life_from_momentum as half_life_from_momentum
    from hf_ema_scaling.scaling import momentum_from_half_life as momentum_from_half_life
    from hf_ema_scaling.scaling import register_scaling_rule as register_scaling_rule
    from hf_ema_scaling.scaling import scale_momentum as scale_momentum
    from hf_ema_scaling.training import BYOLConfig as BYOLConfig
    from hf_ema_scaling.training import BYOLModel as BYOLModel
    from hf_ema_scaling.training import BYOLTrainer as BYOLTrainer
    from hf_ema_scaling.training import EMACallback as EMACallback
    from hf_ema_scaling.training import EMATrainer as EMATrainer
    from hf_ema_scaling.training import EMATrainingArguments as EMATrainingArguments
    from hf_ema_scaling.training import PseudoLabelArguments as PseudoLabelArguments
    from hf_ema_scaling.training import PseudoLabelCollator as PseudoLabelCollator
    from hf_ema_scaling.training import PseudoLabelTrainer as PseudoLabelTrainer
    from hf_ema_scaling.training.seq2seq import EMASeq2SeqTrainer as EMASeq2SeqTrainer
    from hf_ema_scaling.training.seq2seq import PseudoLabelSeq2SeqTrainer as PseudoLabelSeq2SeqTrainer
    from hf_ema_scaling.training.seq2seq_arguments import EMASeq2SeqTrainingArguments as EMASeq2SeqTrainingArguments


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
