"""`WeightAverage`: the fp32 shadow of a module, updated in place, swapped in and out, saved and restored by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from hf_ema_scaling.ema import frozen, kernels
from hf_ema_scaling.ema.adapters import debiased, has_adapters, refuse_merged
from hf_ema_scaling.ema.binding import Binding, Kind
from hf_ema_scaling.ema.names import Entry, canonical_name, check_names, entries_of, local_shard, unit_vectors
from hf_ema_scaling.ema.shadow import BufferPolicy, Shadow, check_shape
from hf_ema_scaling.ema.sharding import copy_whole_, gathered, over_shards, refuse_flat, reshard
from hf_ema_scaling.ema.swap import refuse_swapped, swapped_in
from hf_ema_scaling.scaling.momentum import ema_weight

_EXTRA_STATE = "_extra_state"


class WeightAverage:
    """Exponential moving average of a model's weights, kept as a dictionary of tensors and never as a module copy.

    The average starts as a copy of the model. Floating-point tensors are kept in float32 (float64 stays float64)
    whatever dtype the model has, because an average in half precision stops moving. float32 itself loses an update
    where `(1 - rho**kappa) * |student - average|` is below half a unit in the last place of the average (6e-8 of its
    value at most): for momenta that close to 1 there is `dtype=torch.float64`. Tensors are matched by
    `canonical_name`, so order and wrappers do not matter, and a tied weight is averaged once.

    Per update: trainable parameters move by `s + (1 - rho**kappa) * (p - s)`; frozen parameters
    (`requires_grad=False` at that moment), integer and boolean buffers, float8 tensors (codes, which only a scale
    beside them gives a value), and non-persistent buffers are copied bit for bit (the latter are functions of the
    configuration and are not saved, so averaging them could not survive a resume); persistent floating buffers follow
    `buffers`, except the unit vectors of spectral norm, which are copied.
    `get_extra_state()` is not averaged.

    A parameter that is frozen from the start costs no memory: the average refers to the student's own (`ema.frozen`).
    If it is unfrozen later it gets a copy, made by `prepare`. One that is frozen later keeps the copy that it has.

    For a model with PEFT adapters the update is bias-corrected, see `ema.adapters`: the zeros that adapters start from
    have no share in it, and the first update makes the average equal to the student.

    DTensor parameters (FSDP2) are shadowed by DTensors of the same placement: each process holds and updates its own
    shards, in float32, without communication. `distance`, `fingerprint`, `equals`, `state_dict` and `share_with` are
    then collective and give the same on every process. Parts of the model that an evaluation left gathered are
    resharded first. A DTensor average belongs to models sharded alike.

    Args:
        model: The student, wrapped or not.
        buffers: `"average"` moves persistent floating buffers like parameters, `"copy"` copies them.
        dtype: `torch.float32`, or `torch.float64` for what moves: twice the memory of the average, and a teacher then
            needs a copy in float32.
        share_frozen: False keeps copies of frozen parameters too, for a snapshot of a model that will be overwritten.
            Adapters' base weights are never copied.

    Attributes:
        num_updates: Updates done since construction or since the state that was loaded.
        gathered: Share of the updates' weights in a bias-corrected average, the rest is its start; None for others.
        storage_version: Grows when shadow tensors had to be reallocated, so that whoever shares them can notice.
        sharded: Whether any of its tensors is a DTensor.

    Raises:
        ValueError: The model has no parameters; a tensor is on `meta` (a frozen base under adapters may be), or
            expanded; or one that moves and one that does not share memory.
        TypeError: A tensor is quantized by torch, or sparse.
        RuntimeError: The model holds swapped-in weights.
        NotImplementedError: FSDP1 wraps the model.

    Source: "How to Scale Your EMA", arXiv 2307.13813, eq. 1 and definition 1.2 (rho -> rho**kappa).
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        buffers: BufferPolicy = "average",
        dtype: torch.dtype = torch.float32,
        share_frozen: bool = True,
    ) -> None:
        if buffers not in ("average", "copy"):
            raise ValueError(f"buffers must be 'average' or 'copy', got {buffers!r}.")
        if dtype not in (torch.float32, torch.float64):
            raise ValueError(f"An average is kept in torch.float32 or torch.float64, got {dtype}.")
        self.buffers: BufferPolicy = buffers
        self.dtype = dtype
        self.num_updates = 0
        self.storage_version = 0
        adapters = has_adapters(model)
        self._shadow = Shadow(dtype=dtype, buffers=buffers, share_frozen=share_frozen, adapters=adapters)
        self._binding: Binding | None = None
        self._scratch = kernels.Scratch()
        self.gathered: float | None = 0.0 if adapters else None
        refuse_swapped(model, "build an average from")
        refuse_flat(model)
        _refuse_fixed(model)
        reshard(model)
        self._shadow.add_all(entries_of(model))
        self.sharded = any(isinstance(shadow, DTensor) for shadow in self._shadow.values())
        if not self._shadow.parameters:
            raise ValueError(f"{type(model).__name__} has no parameters to average.")
        self._bind(model)

    def update(self, model: nn.Module, momentum: float, kappa: float = 1.0) -> None:
        """Moves the average by `momentum ** kappa` towards the model.

        Args:
            model: The student after its optimizer step.
            momentum: rho of one reference step, in [0, 1].
            kappa: Reference steps that this optimizer step covers (need not be whole).

        Raises:
            ValueError: Names or shapes do not match, or the momentum is out of range.
            RuntimeError: The model holds swapped-in weights.
        """
        self.blend(model, ema_weight(momentum, kappa))

    @torch.no_grad()
    def blend(self, model: nn.Module, weight: float, *, buffer_weight: float | None = None) -> None:
        """Does one update with a given weight: `shadow += weight * (student - shadow)`.

        Args:
            model: The student after its optimizer step.
            weight: `1 - rho**kappa`, in [0, 1].
            buffer_weight: Another weight for averaged buffers, where `lead` has already moved the parameters.

        Raises:
            ValueError: Names or shapes do not match, or the weight is out of range.
            RuntimeError: The model holds swapped-in weights.
        """
        refuse_swapped(model, "update the average from")
        binding = self._bind(model)
        moved = weight
        if self.gathered is not None:
            moved, self.gathered = debiased(weight, self.gathered)
        try:
            for pairs in binding.parameters:
                pairs.lerp_(moved)
            for pairs in binding.buffers:
                pairs.lerp_(weight if buffer_weight is None else buffer_weight)
            for pairs in binding.copies:
                pairs.copy_()
        except RuntimeError:
            self._match(model)  # names a tensor that got another shape in place, as by `resize_token_embeddings`
            raise
        self.num_updates += 1

    @torch.no_grad()
    def lead(self, model: nn.Module, weight: float) -> None:
        """Does the first of the two moves of a path-corrected update, on trainable parameters alone; `blend` ends it.

        Args:
            model: The student before its optimizer step.
            weight: `PathWeights.before`; below 0 it moves the average away from the student.

        Raises:
            ValueError: Names or shapes do not match, or the weight is above 1 or not finite.
            RuntimeError: The model holds swapped-in weights.
            NotImplementedError: The model has PEFT adapters.
        """
        refuse_swapped(model, "update the average from")
        if self.gathered is not None:
            raise NotImplementedError("The path-corrected update is not derived for the average of PEFT adapters.")
        for pairs in self._bind(model).parameters:
            pairs.lerp_(weight, away=True)

    def prepare(self, model: nn.Module) -> None:
        """Takes copies of parameters that were unfrozen since the last update; nothing otherwise, at next to no cost.

        To be called before the optimizer step that moves them first: a later `update` can only start their average
        from where that step has led.

        Args:
            model: The student before its optimizer step.
        """
        if any(shadow.requires_grad for shadow in self._shadow.values()):
            self._bind(model)

    @torch.no_grad()
    def rebind(self, model: nn.Module) -> None:
        """Pairs the average with this model's tensors without moving it.

        The shadow follows the model to its device, and non-persistent buffers are taken from the model.

        Raises:
            ValueError: Names or shapes do not match.
        """
        self._bind(model)
        for entry in self._match(model):
            if not entry.persistent:
                local_shard(self._shadow[entry.key]).copy_(local_shard(entry.tensor))

    def same_parameters(self, model: nn.Module) -> bool:
        """Says whether the model's parameters are the very objects the average was last bound to."""
        if self._binding is None:
            return False
        self._reshard(model)
        mine = {id(tensor) for tensor in self._binding.sources if isinstance(tensor, nn.Parameter)}
        return mine == {id(parameter) for parameter in model.parameters()}

    @contextmanager
    def swapped(self, model: nn.Module) -> Iterator[None]:
        """Lets the model hold the average inside a `with` block; its own bits return on exit and on any exception.

        Values are copied in place and cast to the model's dtype, so parameter objects, compiled graphs and sharding
        stay as they are. Costs one copy of the model in its own dtype while the block runs. Non-persistent buffers
        are left alone.

        Raises:
            RuntimeError: The model already holds swapped-in weights, or adapters are merged into its base.
            ValueError: Names or shapes do not match.
        """
        refuse_swapped(model, "swap weights in")
        if self.gathered is not None:
            refuse_merged(model, "swap weights in")
        entries = self._written(model)
        with swapped_in(model, entries, lambda: self._write(entries), lambda: self._reshard(model)):
            yield

    def copy_to(self, model: nn.Module) -> None:
        """Writes the average into the model for good, cast to the model's dtype.

        Raises:
            RuntimeError: The model holds swapped-in weights.
            ValueError: Names or shapes do not match.
        """
        refuse_swapped(model, "write the average into")
        self._write(self._written(model))

    @torch.no_grad()
    def share_with(
        self, module: nn.Module, dtype: torch.dtype | None = None, *, keep: Callable[[str], bool] = lambda name: False
    ) -> kernels.Pairs:
        """Makes the shadow's tensors the parameters and buffers of `module`, without a copy where dtypes allow.

        A sharded average is gathered tensor by tensor into new storage, which every process must take part in and
        which later updates do not reach: call it again for them.

        Args:
            module: A module of the same names and shapes that belongs to nobody else. Its parameters become
                frozen ones over the shadow's storage; tied weights become one object.
            dtype: What floating parameters and persistent buffers are to be; None for the shadow's own dtype. Where
                it is another, the module gets a copy.
            keep: Says by name which tensors are float32 whatever `dtype` is.

        Returns:
            The copies with the shadows they are to be refreshed from; none without `dtype`.

        Raises:
            ValueError: Names or shapes do not match.
        """
        shared_as: dict[str, Tensor] = {}
        copies: list[Tensor] = []
        sources: list[Tensor] = []
        # Models built without initialisation are not tied yet: here they become so.
        for entry in self._shadow.match(module, whole=True):
            shared = shared_as.get(entry.key)
            if shared is None:
                shadow = gathered(self._shadow[entry.key]).detach()
                wanted = shadow.dtype
                if (
                    dtype is not None
                    and shadow.is_floating_point()
                    and entry.persistent
                    and not frozen.is_code(wanted)
                ):
                    wanted = torch.float32 if any(keep(slot.name) for slot in entry.slots) else dtype
                shared = shadow.to(wanted)
                if shared is not shadow:
                    copies.append(local_shard(shared))
                    sources.append(local_shard(shadow))
                shared = nn.Parameter(shared, requires_grad=False) if entry.is_param else shared
                shared_as[entry.key] = shared
            for slot in entry.slots:
                # setattr and not the dictionary: recurrent layers keep a second list of their weights.
                setattr(slot.owner, slot.leaf, shared)
        return kernels.Pairs(copies, sources)

    @property
    def device(self) -> torch.device:
        """Device of the first shadow tensor."""
        return next(iter(self._shadow.values())).device

    def tensors(self) -> dict[str, Tensor]:
        """Returns the persistent shadow tensors themselves by canonical name, tied weights once.

        Those of frozen parameters may be the student's own, see `references`.
        """
        return {key: self._shadow[key] for key in self._shadow if key in self._shadow.persistent}

    @property
    def references(self) -> frozenset[str]:
        """Names in `tensors()` of frozen parameters that are the student's own: not to be written to."""
        return self._shadow.references

    def resolve(self, name: str) -> str | None:
        """Returns the name in `tensors()` for any name of the same tensor (wrapped, tied), or None if unknown."""
        return self._shadow.resolve(name)

    def state_dict(self, model: nn.Module, *, keep: bool = True) -> dict[str, Tensor]:
        """Returns the average in the form of `model.state_dict()`: canonical keys, tied names included, no copies.

        DTensor shadows are gathered one by one onto the CPU, which every process must take part in.

        Args:
            model: The student, wrapped or not.
            keep: False on a process that only takes part; then gathered tensors are dropped at once and left out.

        Raises:
            ValueError: The model's state has a tensor that the average does not have.
        """
        self._reshard(model)
        state: dict[str, Tensor] = {}
        whole: dict[str, Tensor] = {}
        for name, value in model.state_dict().items():
            if not isinstance(value, Tensor) or name.rpartition(".")[2] == _EXTRA_STATE:
                continue
            key = self.resolve(name)
            if key is None:
                raise ValueError(f"The average has no tensor for {name!r} of the model's state_dict.")
            shadow = self._shadow[key].detach()
            if isinstance(shadow, DTensor) and key not in whole:
                full = gathered(shadow)
                whole[key] = full.cpu() if keep else full.new_empty(0)
            if keep or not isinstance(shadow, DTensor):
                state[canonical_name(name)] = whole.get(key, shadow)
        return state

    @torch.no_grad()
    def load(self, mapping: Mapping[str, Tensor]) -> None:
        """Restores the persistent tensors bit for bit, in place.

        Args:
            mapping: Tensors by name, with the names, shapes and dtypes of `tensors()`. Tied names may be given;
                those in `references` may be missing. Where one of them is there and differs, the average takes a copy
                and leaves the student alone.

        Raises:
            ValueError: A tensor is missing, unexpected, or of another shape or dtype; then nothing was changed.
        """
        wanted = self.tensors()
        found = {self.resolve(name) or name: tensor for name, tensor in mapping.items()}
        check_names(set(wanted) - (self.references - set(found)), set(found), "saved average")
        for key, tensor in found.items():
            check_shape(key, wanted[key], tensor)
            if tensor.dtype != wanted[key].dtype:
                raise ValueError(f"{key!r} is {tensor.dtype} in the saved average, expected {wanted[key].dtype}.")
        for key, tensor in found.items():
            if not frozen.refers(wanted[key]):
                copy_whole_(wanted[key], tensor)
            elif not torch.equal(gathered(wanted[key]), tensor.to(wanted[key].device)):
                own = frozen.owned_copy(wanted[key], wanted[key].dtype)
                copy_whole_(own, tensor)
                self._shadow[key] = own
                self.storage_version += 1
                self._binding = None

    @torch.no_grad()
    def distance(self, model: nn.Module) -> float:
        """Returns `||student - average|| / ||student||` over what is averaged, with one host synchronisation.

        That is all floating-point parameters but the frozen ones that the average refers to.
        Norms per tensor are taken in the shadow's dtype (float32 or float64) and combined in float64.

        Raises:
            RuntimeError: The model holds swapped-in weights.
            ValueError: Names or shapes do not match.
        """
        refuse_swapped(model, "measure the distance to")
        entries = self._averaged(model)
        if not entries:
            return 0.0
        return kernels.relative_distance([self._shadow[e.key] for e in entries], [e.tensor.detach() for e in entries])

    @torch.no_grad()
    def fingerprint(self) -> tuple[int, ...]:
        """Returns one integer per averaged parameter, the sum of its bit patterns; any moved bit shows."""
        owned = self._shadow.parameters - self.references
        tensors = [self._shadow[key] for key in self._shadow if key in owned]
        if not tensors:
            return ()
        sums = kernels.bit_sums([local_shard(tensor) for tensor in tensors])
        return tuple(over_shards(torch.tensor(sums, device=self.device), tensors).tolist())

    @torch.no_grad()
    def equals(self, model: nn.Module) -> bool:
        """Says whether every floating-point parameter of the model, cast to the shadow's dtype, is the average."""
        entries = self._averaged(model)
        tensors = [self._shadow[entry.key] for entry in entries]
        pairs = [(local_shard(shadow), local_shard(e.tensor)) for shadow, e in zip(tensors, entries, strict=True)]
        differ = [int(not torch.equal(shadow, source.to(shadow.device, shadow.dtype))) for shadow, source in pairs]
        return not bool(over_shards(torch.tensor(differ, device=self.device), tensors).any())

    def _reshard(self, model: nn.Module) -> None:
        if self.sharded:
            reshard(model)

    def _averaged(self, model: nn.Module) -> list[Entry]:
        """Floating-point parameters, without the student's own."""
        entries = (entry for entry in self._match(model) if entry.key in self._shadow.parameters)
        return [entry for entry in entries if self._shadow[entry.key] is not entry.tensor]

    def _written(self, model: nn.Module) -> list[Entry]:
        """What of a model is overwritten by the average: all that is saved, without what is the model's own."""
        entries = (entry for entry in self._match(model) if entry.persistent)
        return [entry for entry in entries if self._shadow[entry.key] is not entry.tensor]

    def _match(self, model: nn.Module) -> list[Entry]:
        self._reshard(model)
        return self._shadow.match(model)

    def _bind(self, model: nn.Module) -> Binding:
        self._reshard(model)
        if self._binding is not None and self._binding.holds_for(model):
            return self._binding
        self.storage_version += self._shadow.follow(entries_of(model))
        entries = self._match(model)
        kept_as_they_are = unit_vectors(model)
        groups: dict[tuple[Kind, torch.device, torch.dtype, torch.dtype], list[Entry]] = {}
        for entry in entries:
            source, shadow = entry.tensor, self._shadow[entry.key]
            if shadow is source and not source.requires_grad:
                continue
            if frozen.refers(shadow):  # unfrozen, or another model's: from here on the average has a copy
                self._shadow[entry.key] = shadow = frozen.owned_copy(shadow, self._shadow.dtype_of(entry))
                self.storage_version += 1
            if shadow.device != source.device or shadow.shape != source.shape:
                # Only non-persistent buffers may change shape (`_match`), e.g. position tables grown on demand.
                kept = shadow if shadow.shape == source.shape else source.detach()
                self._shadow[entry.key] = shadow = kept.to(source.device, shadow.dtype, copy=True)
                self.storage_version += 1
            if source.requires_grad and (not source.is_floating_point() or frozen.is_code(source.dtype)):
                raise TypeError(f"Cannot average {entry.key!r}: a trainable parameter of dtype {source.dtype}.")
            moves = source.requires_grad if entry.is_param else self._shadow.may_move(entry)
            moves = moves and id(source) not in kept_as_they_are
            kind: Kind = "parameters" if entry.is_param else "buffers"
            kind = kind if moves and source.is_floating_point() else "copies"
            if shadow.dtype != source.dtype and not local_shard(source).numel():
                continue  # nothing to cast, as of a shard of few rows on many processes
            groups.setdefault((kind, source.device, shadow.dtype, source.dtype), []).append(entry)
        binding = Binding(model, entries, groups, self._shadow, self._scratch)
        self._binding = binding
        return binding

    @torch.no_grad()
    def _write(self, entries: list[Entry]) -> None:
        models, shadows = [local_shard(e.tensor) for e in entries], [local_shard(self._shadow[e.key]) for e in entries]
        kernels.Pairs(models, shadows).copy_()


def _refuse_fixed(model: nn.Module) -> None:
    """Raises `RuntimeError` or `TypeError` where what is built now could not be updated later."""
    if torch.is_inference_mode_enabled():
        raise RuntimeError(
            "Cannot build an average in torch.inference_mode(): what is made there can never be written to outside "
            "it. Use torch.no_grad()."
        )
    for name, part in model.named_modules():
        if isinstance(part, torch.jit.ScriptModule) and (len(part._parameters) or len(part._buffers)):
            raise TypeError(
                f"{name or 'The model'} was scripted or traced by torch.jit, whose modules hide their tensors: build "
                "the average from the module before that, or use torch.compile."
            )
