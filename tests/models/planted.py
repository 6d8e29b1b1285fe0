"""`python planted.py DEFECT SCRIPT ARGUMENTS`: runs a script of the tests with a defect of `test_mutants.py` in it."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    import test_mutants

    defect, script = sys.argv[1:3]
    del sys.argv[:2]
    with pytest.MonkeyPatch.context() as patch:
        getattr(test_mutants, defect)(patch)
        sys.path.insert(0, str(Path(script).parent))  # as `python SCRIPT` has it
        runpy.run_path(script, run_name="__main__")
