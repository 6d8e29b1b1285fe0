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

__all__ = [
    "CTCLabeler",
    "Labeler",
    "MakesTargets",
    "PseudoLabel",
    "blank_id",
    "ctc_frame_lengths",
    "greedy_ctc",
    "min_ctc_frames",
    "non_target_ids",
]
