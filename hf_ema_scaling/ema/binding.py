"""A model's tensors paired with those of an average: what an update runs over, and what tells that it still may."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from operator import attrgetter, is_
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from hf_ema_scaling.ema.kernels import Pairs, Scratch
from hf_ema_scaling.ema.names import Entry, local_shard

Kind = Literal["parameters", "buffers", "copies"]

_places = attrgetter("_parameters", "_buffers", "_modules")
_is_trained = attrgetter("requires_grad")
_LOOKS = (Tensor.data_ptr, attrgetter("dtype"), Tensor.numel, Tensor.is_contiguous, _is_trained)
"""What tells that a tensor is what it was. Shapes and strides would say more, but are objects that every look makes
anew, which the garbage collector counts."""
_place = attrgetter("device", "dtype", "shape")


class Binding:
    """Flat lists of pairs, made once, and whether they are still those of the model.

    Args:
        model: The model that the pairs are of.
        entries: All its tensors that the average knows.
        groups: Those that an update writes, by kind, device, and dtypes of shadow and source.
        shadow: The average's tensors by key.
        scratch: For casts.

    Attributes:
        sources: The model's tensors in the order of `entries`.
        parameters: Pairs that move as parameters do.
        buffers: Pairs that move as buffers do.
        copies: Pairs that are copied bit for bit.
    """

    def __init__(
        self,
        model: nn.Module,
        entries: Sequence[Entry],
        groups: Mapping[tuple[Kind, Any, Any, Any], list[Entry]],
        shadow: Mapping[str, Tensor],
        scratch: Scratch,
    ) -> None:
        self._model = model
        # The tables of a module live as long as it does and are changed in place. Those of torch.jit's are no
        # dictionaries, and an average is built only if they hold no tensors.
        parts = (part for part in model.modules() if not isinstance(part, torch.jit.ScriptModule))
        tables = list(chain.from_iterable(map(_places, parts)))
        self._empty = [table for table in tables if not table]
        self._filled = [table for table in tables if table]
        self._held = self._holds()
        self.sources: list[Tensor] = [entry.tensor for entry in entries]
        paired = [entry.tensor for group in groups.values() for entry in group]
        self._paired = [tensor for tensor in paired if _has_address(tensor)]
        self._placed = [tensor for tensor in paired if not _has_address(tensor)]
        known = set(map(id, self._paired))
        self._others = [tensor for tensor in self.sources if id(tensor) not in known]
        self._seen = self._look()
        self._addresses = shard_addresses(self.sources)
        self.parameters: list[Pairs] = []
        self.buffers: list[Pairs] = []
        self.copies: list[Pairs] = []
        for (kind, *_), group in groups.items():
            shadows = [local_shard(shadow[entry.key]) for entry in group]
            sources = [local_shard(entry.tensor) for entry in group]
            getattr(self, kind).append(Pairs(shadows, sources, scratch))

    def holds_for(self, model: nn.Module) -> bool:
        """Whether the pairs are those of this model as it is now.

        Runs before every update, for every tensor of the model: loops of the interpreter would cost as much as the
        update of a small tensor.
        """
        if model is not self._model:
            return False
        now = self._holds()
        return (
            len(now) == len(self._held)
            and all(map(is_, now, self._held))
            and not any(self._empty)
            and self._look() == self._seen
            and (not self._addresses or shard_addresses(self.sources) == self._addresses)
        )

    def _holds(self) -> list[object]:
        """The parameters, buffers and children of all modules that had any, in a fixed order."""
        return list(chain.from_iterable(map(dict.values, self._filled)))

    def _look(self) -> tuple[list[object], ...]:
        # All of a tensor at once, while it is in the cache; references are the model's own tensors whatever they hold.
        looks = zip(*(map(look, self._paired) for look in _LOOKS), strict=True)
        return (
            list(chain.from_iterable(looks)),
            list(map(_place, self._placed)),
            list(map(_is_trained, self._others)),
        )


def _has_address(tensor: Tensor) -> bool:
    return type(tensor) in (Tensor, nn.Parameter) and tensor.layout == torch.strided


def shard_addresses(sources: list[Tensor]) -> list[int]:
    """Where the local shards lie: FSDP2 moves one that it pads at the first forward pass, in the same parameter."""
    return [local_shard(tensor).data_ptr() for tensor in sources if isinstance(tensor, DTensor)]
