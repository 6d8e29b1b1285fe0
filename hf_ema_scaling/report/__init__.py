"""What runs did: one HTML page and PNG figures of one run or many, from the files in their folders. No torch."""

from hf_ema_scaling.report.figures import draw_figures, plot_runs, require_matplotlib
from hf_ema_scaling.report.page import render, write_report
from hf_ema_scaling.report.runs import Run, curve, read_runs

__all__ = ["Run", "curve", "draw_figures", "plot_runs", "read_runs", "render", "require_matplotlib", "write_report"]
