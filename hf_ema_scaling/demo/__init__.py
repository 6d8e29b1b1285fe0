"""The demo: a small speech model, trained from scratch, learns from the pseudo-labels of its own EMA teacher."""

from hf_ema_scaling.demo.arms import ARMS, DemoConfig
from hf_ema_scaling.demo.run import gap_recovered, run_demo, table

__all__ = ["ARMS", "DemoConfig", "gap_recovered", "run_demo", "table"]
