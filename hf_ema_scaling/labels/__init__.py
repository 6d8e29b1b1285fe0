"""One labeler per model family: teacher output in, training target out."""

from hf_ema_scaling.labels.base import Labeler, MakesTargets, PseudoLabel
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
from hf_ema_scaling.labels.ledger import Ledger
from hf_ema_scaling.labels.two_views import two_views

__all__ = [
    "FILTERS",
    "CTCLabeler",
    "Filter",
    "FilterChain",
    "Labeler",
    "Ledger",
    "MakesTargets",
    "PseudoLabel",
    "Row",
    "blank_id",
    "build_filters",
    "ctc_frame_lengths",
    "fit_filters",
    "greedy_ctc",
    "min_ctc_frames",
    "non_target_ids",
    "two_views",
]
