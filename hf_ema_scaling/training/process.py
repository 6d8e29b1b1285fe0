"""A process that trains one of several runs side by side."""

from __future__ import annotations

import logging
import resource
import sys
import warnings
from pathlib import Path

import torch
import transformers


def prepare_process() -> None:
    """One thread, and silence from transformers but for its warnings: who starts many runs reports them itself."""
    # The operations are small: a second thread gains less than a second run beside it, and figures would depend on
    # the number of cores.
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("transformers").setLevel(logging.WARNING)
    # transformers and datasets meet deprecations of their own; nobody who starts a run can do anything about them.
    warnings.filterwarnings("ignore", category=FutureWarning)


def peak_memory() -> int:
    """Largest resident size of this program so far, in bytes.

    On Linux not `ru_maxrss`, which a program takes over from the one that started it.
    """
    status = Path("/proc/self/status")
    if status.exists():
        fields = dict(line.split(":", 1) for line in status.read_text(encoding="utf-8").splitlines())
        return int(fields["VmHWM"].split()[0]) * 1024
    # macOS counts bytes, others kilobytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
