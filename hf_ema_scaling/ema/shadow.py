"""The tensors of an average by name: which there are, in which dtype, and which tensor of a model each belongs to."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from hf_ema_scaling.ema import frozen
from hf_ema_scaling.ema.names import Entry, canonical_name, check_names, entries_of
from hf_ema_scaling.ema.overlaps import overlapping, repeats
from hf_ema_scaling.ema.sharding import check_placement

BufferPolicy = Literal["average", "copy"]
_CHANGED = (
    " An average is of the tensors that the model had when it was built: change the model (add or remove modules, "
    "resize embeddings, tie weights) before that, or build a new average."
)


class Shadow(dict[str, Tensor]):
    """Tensors by the canonical name under which a model first registers them; a tied weight is there once.

    Args:
        dtype: Of what moves; float64 tensors stay float64, and what is neither floating nor moves keeps its own.
        buffers: Whether persistent floating buffers move.
        share_frozen: Whether frozen parameters are the model's own tensors.
        adapters: Whether the model has PEFT adapters, whose base weights are never copied.

    Attributes:
        parameters: Names of floating-point parameters.
        persistent: Names of what a state_dict has.
    """

    def __init__(self, *, dtype: torch.dtype, buffers: BufferPolicy, share_frozen: bool, adapters: bool) -> None:
        super().__init__()
        self._dtype = dtype
        self._buffers = buffers
        self._share_frozen = share_frozen or adapters
        self._adapters = adapters
        self._key_of: dict[str, str] = {}
        self.parameters: set[str] = set()
        self.persistent: set[str] = set()

    def add_all(self, entries: Sequence[Entry]) -> None:
        """Take in all tensors of a model.

        Raises:
            TypeError, ValueError: As `add`, or one that moves lies in the memory of one that does not.
        """
        shared = set()
        for one, other in overlapping(entry for entry in entries if entry.persistent):
            still, moving = sorted((one, other), key=self._moves_now)
            if self._moves_now(still) != self._moves_now(moving):
                raise ValueError(
                    f"{still.key!r}, which is not averaged, lies in the memory of {moving.key!r}, which is: one place "
                    "cannot hold the student's value and the average's. Register a copy (`.clone()`) of one of them, "
                    "or train or freeze both."
                )
            shared |= {one.key, other.key}
        for entry in entries:
            self.add(entry, copied=entry.key in shared)

    def add(self, entry: Entry, *, copied: bool = False) -> None:
        """Take in a tensor of the model: a copy, or the model's own if it is frozen.

        Args:
            entry: The tensor.
            copied: A copy also if it is frozen, as for one that others share memory with: safetensors would refuse
                both of them.

        Raises:
            TypeError: It is saved with the model, and quantized by torch or sparse.
            ValueError: It is saved with the model, and has no values yet, or cannot be written to.
        """
        source = entry.tensor
        if entry.persistent:
            check_kind(entry.key, source)
            self._check_values(entry.key, source)
            if repeats(source) and not (entry.is_param and not source.requires_grad):
                raise ValueError(
                    f"{entry.key!r} is an expanded tensor: several of its elements are one place in memory, so "
                    "neither an optimizer nor an average can be written into it. Register `.contiguous()` of it."
                )
        shared = not copied and self._share_frozen and frozen.may_refer(source, adapters=self._adapters)
        self[entry.key] = source if shared else frozen.owned_copy(source, self.dtype_of(entry))
        for slot in entry.slots:
            self._key_of[slot.name] = entry.key
        if entry.is_param and source.is_floating_point() and not frozen.is_code(source.dtype):
            self.parameters.add(entry.key)
        if entry.persistent:
            self.persistent.add(entry.key)

    def follow(self, entries: Iterable[Entry]) -> bool:
        """Take in the model's non-persistent buffers where they are others than before.

        They come and go, and may be one object at times: a dynamic rotary embedding puts its original frequencies in
        the place of the scaled ones.

        Returns:
            Whether there was anything to do.
        """
        passing = [entry for entry in entries if not entry.persistent]
        keys = [{self._key_of.get(slot.name) for slot in entry.slots} for entry in passing]
        distinct = set().union(*keys)
        if all(len(own) == 1 for own in keys) and len(distinct) == len(keys) and None not in distinct:
            return False
        for key in [key for key in self if key not in self.persistent]:
            del self[key]
        self._key_of = {name: key for name, key in self._key_of.items() if key in self}
        for entry in passing:
            self.add(entry)
        return True

    def dtype_of(self, entry: Entry) -> torch.dtype:
        """The dtype in which a tensor of the model is kept."""
        dtype = entry.tensor.dtype
        if not dtype.is_floating_point or dtype == torch.float64 or frozen.is_code(dtype):
            return dtype
        return self._dtype if self.may_move(entry) else torch.float32

    def may_move(self, entry: Entry) -> bool:
        """Whether a floating-point tensor is averaged as long as nothing freezes it."""
        if frozen.is_code(entry.tensor.dtype):
            return False
        return entry.is_param or (entry.persistent and self._buffers == "average")

    def _check_values(self, key: str, tensor: Tensor) -> None:
        """As `check_values`; but adapters can be averaged and saved over a base that is not there."""
        if not (self._adapters and frozen.may_refer(tensor, adapters=True)):
            check_values(key, tensor)

    def _moves_now(self, entry: Entry) -> bool:
        return entry.tensor.requires_grad if entry.is_param else self.may_move(entry)

    def resolve(self, name: str) -> str | None:
        """The key for any name of a tensor (wrapped, tied), or None if it is unknown."""
        return self._key_of.get(canonical_name(name))

    @property
    def references(self) -> frozenset[str]:
        """Names of frozen parameters that are the model's own."""
        return frozenset(key for key, tensor in self.items() if frozen.refers(tensor))

    def match(self, model: nn.Module, *, whole: bool = False) -> list[Entry]:
        """Pair every tensor of a model with the one of the same name.

        Args:
            model: The student; or another module of its names and shapes.
            whole: The module is not tied yet and is not sharded as the student is.

        Returns:
            The model's tensors with the keys they have here, without non-persistent buffers that are unknown.

        Raises:
            ValueError: Names, shapes, tying or placement do not match, or a tensor of the student has no values.
        """
        entries = entries_of(model)
        names = {slot.name for entry in entries for slot in entry.slots if entry.persistent}
        wanted = {name for name, key in self._key_of.items() if key in self.persistent}
        check_names(wanted, names, type(model).__name__, "" if whole else _CHANGED)
        seen: set[str] = set()
        matched = []
        for entry in entries:
            keys = dict.fromkeys(self._key_of[slot.name] for slot in entry.slots if slot.name in self._key_of)
            if not entry.persistent:
                # One the student registered later has no key, and some are one object now and two later, see `follow`.
                matched += [Entry(key, [s for s in entry.slots if self._key_of.get(s.name) == key]) for key in keys]
                continue
            key = next(iter(keys))
            if len(keys) > 1 or (not whole and key in seen):
                raise ValueError(f"Tied weights changed since the average was built: {entry.key!r}.{_CHANGED}")
            seen.add(key)
            check_shape(key, self[key], entry.tensor, "" if whole else _CHANGED)
            if not whole:
                self._check_values(key, entry.tensor)
                check_placement(key, self[key], entry.tensor)
            matched.append(Entry(key, entry.slots))
        return matched


def check_kind(key: str, tensor: Tensor) -> None:
    """Raises `TypeError` for a tensor that has neither an average nor a place in safetensors."""
    if tensor.is_quantized:
        raise TypeError(
            f"{key!r} is quantized by torch ({tensor.dtype}), which safetensors cannot store: keep its int_repr(), "
            "scale and zero point as buffers of their own, or register it with persistent=False if it can be made "
            "anew."
        )
    if tensor.layout != torch.strided:
        raise TypeError(
            f"{key!r} is sparse ({tensor.layout}), which safetensors cannot store: register it dense, or with "
            "persistent=False if it can be made anew."
        )


def check_values(key: str, tensor: Tensor) -> None:
    """Raises `ValueError` for a tensor on `meta`, which has a shape and no values, or of torch's inference mode."""
    if tensor.is_inference():
        raise ValueError(
            f"{key!r} was made in torch.inference_mode(), so it can neither be trained nor be written to outside it: "
            "build or load the model under torch.no_grad(), or register a clone."
        )
    if tensor.is_meta:
        raise ValueError(
            f"{key!r} is on the meta device, so it has no values that could be averaged or replaced: it was never "
            "materialised, or accelerate's hooks offload it between forward passes (device_map with 'cpu' or 'disk', "
            "cpu_offload, disk_offload). Give the model its weights first, and keep them on a device while it trains."
        )


def check_shape(key: str, wanted: Tensor, found: Tensor, advice: str = "") -> None:
    """Raises `ValueError` where a tensor has another shape than the average's."""
    if wanted.shape != found.shape:
        raise ValueError(f"{key!r} has shape {tuple(found.shape)}, the average has {tuple(wanted.shape)}.{advice}")
