"""The same recipe at several batches: how far runs part from the one at kappa 1, with the rule and without.

`run_sweep` trains, `compare` measures, `judge` says which bounds hold, `report` writes table, CSV and figure.
"""

from hf_ema_scaling.sweep.bounds import judge
from hf_ema_scaling.sweep.distances import compare
from hf_ema_scaling.sweep.jobs import lay_out_sweep
from hf_ema_scaling.sweep.run import run_sweep

__all__ = ["compare", "judge", "lay_out_sweep", "run_sweep"]
