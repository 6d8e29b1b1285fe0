"""A model's tensors paired with those of an average: what an update runs over, and what tells that it still may."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from operator import attrgetter, is_
from typing import Any, Literal

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from hf_ema_scaling.ema.kernels import Pairs, Scratch
from hf_ema_scaling.ema.names import Entry, local_shard

Kind = Literal["parameters", "buffers", "copies"]

_places = attrgetter("_parameters", "_buffers", "_modules")
_is_trained = attrgetter("requires_grad")


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
        # The tables of a module live as long as it does and are changed in place: so do views of their values.
        tables = list(chain.from_iterable(map(_places, model.modules())))
        self._empty = [table for table in tables if not table]
        self._values = [table.values() for table in tables if table]
        self._held = self._holds()
        self.sources: list[Tensor] = [entry.tensor for entry in entries]
        self._parameters = [entry.tensor for entry in entries if entry.is_param]
        self._trained = list(map(_is_trained, self._parameters))
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
            and list(map(_is_trained, self._parameters)) == self._trained
            and all(pairs.hold() for pairs in (*self.parameters, *self.buffers, *self.copies))
            and (not self._addresses or shard_addresses(self.sources) == self._addresses)
        )

    def _holds(self) -> list[object]:
        """The parameters, buffers and children of all modules that had any, in a fixed order."""
        return list(chain.from_iterable(self._values))


def shard_addresses(sources: list[Tensor]) -> list[int]:
    """Where the local shards lie: FSDP2 moves one that it pads at the first forward pass, in the same parameter."""
    return [local_shard(tensor).data_ptr() for tensor in sources if isinstance(tensor, DTensor)]
