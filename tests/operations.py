"""Sees what PyTorch operations a block runs, what they allocate, and which of them make the host wait."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

WAITING = ("_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero", "masked_select", "unique")


class Operations(TorchDispatchMode):
    """Records the operations inside a `with` block.

    Attributes:
        names: every operation in order, views left out.
        allocated: bytes of every result in storage of its own, in order.
        synchronising: names of the operations whose result the host reads, copies to the CPU included.
    """

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.allocated: list[int] = []
        self.synchronising: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        known = {tensor.untyped_storage().data_ptr() for tensor in given}
        result = func(*args, **kwargs)
        name = func.overloadpacket.__name__
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        new = [tensor for tensor in made if tensor.numel() and tensor.untyped_storage().data_ptr() not in known]
        self.allocated += [tensor.untyped_storage().nbytes() for tensor in new]
        if not func.is_view:
            self.names.append(name)
        leaves_device = any(tensor.is_cpu for tensor in new) and any(not tensor.is_cpu for tensor in given)
        explicit = name == "_to_copy" and torch.device(kwargs.get("device") or "meta").type == "cpu"
        if name.startswith(WAITING) or leaves_device or explicit:
            self.synchronising.append(name)
        return result
