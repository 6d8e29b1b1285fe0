"""One scaling rule per family of optimizers.

Two ratios appear. `kappa` is the ratio of one step (its units over the reference batch): how far it moves grows with
it. `stage_kappa` is the nominal ratio of the batch stage, of a step that is cut short its own, and governs what has a
memory across steps: betas, alpha, eps, momentum, second moments and Adagrad's sum, and so the scale of learning rates.

At `kappa == stage_kappa == 1` every rule returns its input bit for bit.
"""

from .adagrad import AdagradRule
from .adam import AdamRule, AdamWRule
from .base import NoiseDominatedRule, OptimizerValues, ScalingRule
from .rmsprop import RMSpropRule
from .sgd import SGDRule

__all__ = [
    "AdagradRule",
    "AdamRule",
    "AdamWRule",
    "NoiseDominatedRule",
    "OptimizerValues",
    "RMSpropRule",
    "SGDRule",
    "ScalingRule",
]
