"""One labeler per model family: teacher output in, training target out."""

from hf_ema_scaling.labels.base import Labeler, LabelKind, LabelsByPosition, MakesTargets, PseudoLabel, columns_of
from hf_ema_scaling.labels.causal import CausalLMLabeler
from hf_ema_scaling.labels.ctc import (
    CTCLabeler,
    blank_id,
    ctc_frame_lengths,
    greedy_ctc,
    min_ctc_frames,
    non_target_ids,
)
from hf_ema_scaling.labels.filter_base import Filter, Row
from hf_ema_scaling.labels.filters import FILTERS, FilterChain, build_filters
from hf_ema_scaling.labels.fitting import fit_filters
from hf_ema_scaling.labels.generation import Decoding
from hf_ema_scaling.labels.generative import generative_labeler_for
from hf_ema_scaling.labels.ledger import Ledger
from hf_ema_scaling.labels.registry import labeler_for
from hf_ema_scaling.labels.seq2seq import Seq2SeqLabeler
from hf_ema_scaling.labels.sequence import ClassLabeler, MultiLabelLabeler, RegressionLabeler
from hf_ema_scaling.labels.tokens import TokenLabeler
from hf_ema_scaling.labels.two_views import two_views

__all__ = [
    "FILTERS",
    "CTCLabeler",
    "CausalLMLabeler",
    "ClassLabeler",
    "Decoding",
    "Filter",
    "FilterChain",
    "LabelKind",
    "Labeler",
    "LabelsByPosition",
    "Ledger",
    "MakesTargets",
    "MultiLabelLabeler",
    "PseudoLabel",
    "RegressionLabeler",
    "Row",
    "Seq2SeqLabeler",
    "TokenLabeler",
    "blank_id",
    "build_filters",
    "columns_of",
    "ctc_frame_lengths",
    "fit_filters",
    "generative_labeler_for",
    "greedy_ctc",
    "labeler_for",
    "min_ctc_frames",
    "non_target_ids",
    "two_views",
]
