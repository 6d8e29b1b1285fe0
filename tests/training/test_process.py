"""What a process says of itself."""

from __future__ import annotations

import subprocess
import sys

import numpy as np

from hf_ema_scaling.training.process import peak_memory


def test_peak_memory_is_that_of_the_process_and_not_of_the_one_that_started_it() -> None:
    ballast = np.ones(30_000_000)  # 240 MB, touched
    code = (
        "import sys, types\n"
        "for name in ('torch', 'transformers'): sys.modules[name] = types.ModuleType(name)\n"
        "import importlib.util\n"
        f"spec = importlib.util.spec_from_file_location('process', {sys.modules[peak_memory.__module__].__file__!r})\n"
        "module = importlib.util.module_from_spec(spec); spec.loader.exec_module(module)\n"
        "print(module.peak_memory())"
    )
    child = int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    assert child < 60e6 < ballast.nbytes < peak_memory()
