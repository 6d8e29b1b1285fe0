"""From a finished run to a repository on the Hub: what is pushed, its card, and what to do when pushing fails."""

from hf_ema_scaling.hub.details import CardDetails
from hf_ema_scaling.hub.model_card import render_model_card
from hf_ema_scaling.hub.publish import PushError
from hf_ema_scaling.hub.push import push, stage

__all__ = ["CardDetails", "PushError", "push", "render_model_card", "stage"]
