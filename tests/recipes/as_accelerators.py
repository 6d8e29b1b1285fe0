"""Runs `SCRIPT ARGUMENTS...` on CPUs that accelerate takes for accelerators, which its FSDP2 plugin wants."""

from __future__ import annotations

import runpy
import sys
from typing import Any

from accelerate import PartialState
from accelerate.utils import DistributedType

init = PartialState.__init__


def as_gpus(self: PartialState, *args: Any, **kwargs: Any) -> None:
    """As the class does, and then another type."""
    init(self, *args, **kwargs)
    if self.distributed_type == DistributedType.MULTI_CPU:
        self.distributed_type = DistributedType.MULTI_GPU


if __name__ == "__main__":
    PartialState.__init__ = as_gpus  # type: ignore[method-assign]
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
