"""The two doors: trainers that own everything, and a callback for the stock Trainer."""

from hf_ema_scaling.training.arguments import EMATrainingArguments, PseudoLabelArguments
from hf_ema_scaling.training.byol import BYOLTrainer
from hf_ema_scaling.training.byol_model import BYOLConfig, BYOLModel
from hf_ema_scaling.training.callback import EMACallback
from hf_ema_scaling.training.pseudo_label_collator import PseudoLabelCollator
from hf_ema_scaling.training.trainer import EMATrainer, PseudoLabelTrainer

__all__ = [
    "BYOLConfig",
    "BYOLModel",
    "BYOLTrainer",
    "EMACallback",
    "EMATrainer",
    "EMATrainingArguments",
    "PseudoLabelArguments",
    "PseudoLabelCollator",
    "PseudoLabelTrainer",
]
