"""One labeler per model family: teacher output in, training target out."""

from hf_ema_scaling.labels.base import Labeler, LabelsByPosition, MakesTargets, PseudoLabel
from hf_ema_scaling.labels.causal import CausalLMLabeler
from hf_ema_scaling.labels.ctc import (
    CTCLabeler,
    blank_id,
    ctc_frame_lengths,
    greedy_ctc,
    min_ctc_frames,
    non_target_ids,
)
from hf_ema_scaling.labels.generation import Decoding
from hf_ema_scaling.labels.generative import generative_labeler_for
from hf_ema_scaling.labels.seq2seq import Seq2SeqLabeler

__all__ = [
    "CTCLabeler",
    "CausalLMLabeler",
    "Decoding",
    "Labeler",
    "LabelsByPosition",
    "MakesTargets",
    "PseudoLabel",
    "Seq2SeqLabeler",
    "blank_id",
    "ctc_frame_lengths",
    "generative_labeler_for",
    "greedy_ctc",
    "min_ctc_frames",
    "non_target_ids",
]
