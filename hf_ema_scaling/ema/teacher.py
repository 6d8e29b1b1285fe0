"""`EMATeacher`: a separate frozen module in eval mode whose weights are the average."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from hf_ema_scaling.ema.adapters import adapter_configs, adapter_module, check_filled, refuse_merged, take_constants
from hf_ema_scaling.ema.average import WeightAverage
from hf_ema_scaling.ema.differences import described, differences
from hf_ema_scaling.ema.forwards import carry_over_forwards
from hf_ema_scaling.ema.kernels import Pairs
from hf_ema_scaling.ema.names import unwrap
from hf_ema_scaling.ema.shadow import check_values
from hf_ema_scaling.ema.sharding import class_of
from hf_ema_scaling.ema.trial import rng_devices

HALF_PRECISION = (torch.bfloat16, torch.float16)


class DeadTeacherError(RuntimeError):
    """The teacher does not follow the average, the average does not follow the student, or they compute otherwise."""


class EMATeacher:
    """A frozen copy of the student's architecture that computes with the average's own storage.

    The module is built from the class and a deep copy of the configuration (and those of its PEFT adapters), never by
    copying the student, and all its parameters and buffers are the shadow tensors, which for frozen parameters are the
    student's own: labelling costs no second copy of the weights and every update of the average is seen at once. A
    `forward` that was replaced on the student is carried over, see `ema.forwards`; hooks, and modules of another class
    that were put onto the student, are not: `check_before_labelling` says on one batch whether that
    matters, as the trainers do when they start, and a first call without them warns of what may. With a `dtype` that
    is not the average's the module holds copies in that dtype, which are made anew at a call (or at `module`) if the
    average was written to since the last; half precision computes under autocast of that dtype, with floating inputs
    cast to it, and so do adapters in float32 over a base in half precision where no autocast is on.
    Creating it leaves the student's bits and the random state as they were. It is a plain object, so assigning it to
    a model or trainer registers nothing.

    Over a sharded average (FSDP2) the module holds the whole average on every process, in float32, gathered bit for
    bit from the shards when it is created and by each `refresh()`, which every process must call after an update and
    before it labels. So any process may label anything, in as many forward passes as it likes, without waiting for
    the others; it costs 4 bytes per parameter on each, and one gathering per labelling step.

    Attributes:
        from_factory: Whether a factory built the module.
        warned: Whether there is nothing more to warn of at the first call.

    Args:
        model: The student, wrapped or not.
        average: The average to teach with.
        factory: Returns a new module of the student's architecture; required for models that are not transformers
            models, and for those whose constructor needs more than a configuration.
        dtype: Of the teacher's weights: `torch.float32`, `torch.bfloat16` or `torch.float16`. Tensors that the
            model's class wants in float32 at half precision stay so, and buffers that are not saved keep their
            dtype. None is float32 without any copy, except over a float64 average. Call `check_parity` before use.

    Raises:
        TypeError: No factory for a model that needs one, or a replaced `forward` that holds the student's weights.
        ValueError: The built module has other names or shapes than the average, or is the student itself; `dtype` is
            another; or the base under adapters is on `meta`.
        RuntimeError: PEFT has merged an adapter into the base.
    """

    def __init__(
        self,
        model: nn.Module,
        average: WeightAverage,
        *,
        factory: Callable[[], nn.Module] | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if dtype not in (None, torch.float32, *HALF_PRECISION):
            raise ValueError(f"A teacher computes in torch.float32, torch.bfloat16 or torch.float16, got {dtype}.")
        student = unwrap(model)
        for key, tensor in average.tensors().items():
            check_values(key, tensor)
        if average.gathered is not None:
            refuse_merged(student, "build a teacher for")
        average.rebind(model)
        # Constructors draw random numbers on the CPU even where initialisation is disabled.
        with torch.random.fork_rng(devices=rng_devices(average.device)):
            module = factory() if factory is not None else _build(student, average)
        mine = {id(tensor) for tensor in (*student.parameters(), *student.buffers())}
        if module is student or any(id(tensor) in mine for tensor in (*module.parameters(), *module.buffers())):
            raise ValueError("The factory must return a new module that shares no tensors with the student.")
        # Whatever the module holds outside its registered tensors follows to the shadow's device.
        self._module = module.to(average.device).requires_grad_(False).eval()
        self._average = average
        self._dtype = dtype
        if self._dtype in (None, torch.float32):
            self._dtype = None if average.dtype == torch.float32 else torch.float32
        if factory is None and self.dtype in HALF_PRECISION:  # a factory's configuration may be the student's
            for part in _config_parts(self.config):
                part.dtype = self.dtype
        self._share()
        self.from_factory = factory is not None
        self.warned = False
        self._lacks = described(one for one in differences(student, self._module) if one.doubtful)

    @property
    def module(self) -> nn.Module:
        """The teacher's module, over the average's current storage or with its current values.

        Raises:
            DeadTeacherError: The average is sharded and has moved since it was gathered.
        """
        if self._average.sharded:
            if self._gathered_at != self._average.num_updates:
                raise DeadTeacherError(
                    f"The teacher's weights were gathered at update {self._gathered_at} of the average, which is at "
                    f"update {self._average.num_updates}: call `teacher.refresh()` on every process before labelling."
                )
        elif self._version != self._average.storage_version:
            self._share()
        with torch.no_grad():
            self._copies.copy_changed_()
        return self._module

    def refresh(self) -> None:
        """Gathers the average anew where it is sharded, on every process at the same moment; else nothing."""
        if self._average.sharded:
            self._share()

    @property
    def dtype(self) -> torch.dtype:
        """What it computes in where no autocast says otherwise."""
        return self._dtype or torch.float32

    @property
    def average(self) -> WeightAverage:
        """The average that it computes with."""
        return self._average

    @property
    def config(self) -> Any:
        """The teacher's own copy of the configuration, None for a module that has none."""
        return getattr(self._module, "config", None)

    @property
    def device(self) -> torch.device:
        """Device of the average."""
        return self._average.device

    def __call__(self, *args: Any, **inputs: Any) -> Any:
        """Runs the teacher's forward without gradients.

        `torch.no_grad` and not inference mode: soft targets enter the student's loss, and later in-place updates of
        the weights would fail on inference tensors.

        Raises:
            DeadTeacherError: The module or one of its parts was put in training mode.
        """
        return self.apply(_forward, *args, **inputs)

    def apply(self, function: Callable[..., Any], *args: Any, **inputs: Any) -> Any:
        """Returns `function(module, *args, **inputs)`, computed as a call of the teacher is: for `generate` and parts.

        Args:
            function: Takes the teacher's module first; it must leave the module as it is.
            *args: Its other arguments; floating-point tensors are cast to the teacher's `dtype`.
            **inputs: Likewise.

        Raises:
            DeadTeacherError: The module or one of its parts was put in training mode.
        """
        module = self.module
        if self._lacks and not self.warned:
            self.warned = True
            warnings.warn(
                f"The student has what its teacher lacks: {self._lacks}. If that changes outputs, the teacher labels "
                "by another function: hf_ema_scaling.ema.check_before_labelling(model, average, teacher, inputs), "
                "called once, tells; a `factory=` that returns a model with the same in it is the way out.",
                stacklevel=3,
            )
        training = next((name for name, part in module.named_modules() if part.training), None)
        if training is not None:
            raise DeadTeacherError(
                f"The teacher's {training or type(module).__name__!r} is in training mode; its labels would contain "
                "dropout noise. Call `teacher.module.eval()` and find out who called `.train()` on it."
            )
        half = self.dtype if self.dtype in HALF_PRECISION else self._dtype_of_base(module)
        if half is None:
            with torch.no_grad():
                return function(module, *args, **inputs)
        args, inputs = tuple(_cast(value, half) for value in args), {k: _cast(v, half) for k, v in inputs.items()}
        # An autocast region around the call may be of another dtype, and would cast the weights at every use.
        with torch.no_grad(), torch.autocast(self.device.type, dtype=half):
            return function(module, *args, **inputs)

    def _dtype_of_base(self, module: nn.Module) -> torch.dtype | None:
        """The half precision of a base under adapters in float32, where no autocast region brings them together."""
        if self._average.gathered is None or torch.is_autocast_enabled(self.device.type):
            return None
        return next((p.dtype for p in module.parameters() if p.dtype in HALF_PRECISION), None)

    def _share(self) -> None:
        with torch.no_grad():
            keep = _kept_in_float32(self._module, self.dtype)
            self._copies = _share(self._module, self._average, self._dtype, keep)
            _restart_dynamic_rope(self._module)
        self._version = self._average.storage_version
        self._gathered_at = self._average.num_updates


def inference_config(model: PreTrainedModel) -> PreTrainedConfig:
    """Returns a deep copy of a model's configuration for its float32 average.

    `use_cache` goes back to True where that is the default of the configuration's class, because Trainer switches
    it off on the student; `dtype` is float32 throughout.

    Args:
        model: The unwrapped student; left as it is.
    """
    config = copy.deepcopy(model.config)
    # The average is whole, however the student is sharded; saving with this attribute would gather and wait.
    config.__dict__.pop("distributed_config", None)
    for part in _config_parts(config):
        part.dtype = torch.float32
        if getattr(part, "use_cache", None) is False and getattr(type(part), "use_cache", None) is True:
            part.use_cache = True
    return config


def _cast(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


def _forward(module: nn.Module, *args: Any, **inputs: Any) -> Any:
    return module(*args, **inputs)


def _share(
    module: nn.Module,
    average: WeightAverage,
    dtype: torch.dtype | None = None,
    keep: Callable[[str], bool] = lambda name: False,
) -> Pairs:
    try:
        return average.share_with(module, dtype, keep=keep)
    except ValueError as error:
        raise ValueError(
            f"{type(module).__name__} built for the teacher does not fit the average: {error} Pass `factory=` that "
            "builds the student's architecture exactly."
        ) from error


def _restart_dynamic_rope(module: nn.Module) -> None:
    """Gives rotary embeddings that follow the longest sequence seen frequencies of their own, for short sequences.

    transformers keeps the length in an attribute: with the student's buffers, scaled for the student's last batch, and
    the teacher's own attribute, a teacher would label short sequences with the frequencies of long ones.
    """
    suffix = "original_inv_freq"
    for part in module.modules():
        if "dynamic" not in str(getattr(part, "rope_type", "")):
            continue
        for leaf in [leaf for leaf, buffer in part._buffers.items() if leaf.endswith(suffix) and buffer is not None]:
            prefix, original = leaf.removesuffix(suffix), part.get_buffer(leaf)
            for name in (leaf, f"{prefix}inv_freq"):
                part.register_buffer(name, original.clone(), persistent=False)
            for name in {f"{prefix}max_seq_len_cached", "max_seq_len_cached"} & vars(part).keys():
                setattr(part, name, part.original_max_seq_len)


def _build(student: nn.Module, average: WeightAverage) -> nn.Module:
    if adapter_configs(student):
        module: Any = adapter_module(student, inference_config)
        _share(module, average)
        take_constants(module, student)
        check_filled(module)
        carry_over_forwards(student, module)
        return module
    if not isinstance(student, PreTrainedModel):
        raise TypeError(
            f"{type(student).__name__} is not a transformers model, so the teacher cannot be built from a "
            "configuration. Pass `factory=`, a function that returns a new module of the same architecture."
        )
    config = inference_config(student)
    try:
        with no_init_weights():
            module = class_of(student)(config)
    except TypeError as error:
        raise TypeError(
            f"{type(student).__name__} cannot be built from its configuration alone ({error}). Pass `factory=`, a "
            "function that returns a new model of the same architecture."
        ) from error
    if getattr(student, "generation_config", None) is not None:
        module.generation_config = copy.deepcopy(student.generation_config)
    carry_over_forwards(student, module)
    return module


def _config_parts(config: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    yield config
    for name in config.sub_configs:
        part = getattr(config, name, None)
        if isinstance(part, PreTrainedConfig):
            yield from _config_parts(part)


def _kept_in_float32(module: nn.Module, dtype: torch.dtype) -> Callable[[str], bool]:
    """Says which tensors a transformers class keeps in float32 when it is loaded in this dtype."""
    lists = ["_keep_in_fp32_modules_strict"] if dtype in HALF_PRECISION else []
    lists += ["_keep_in_fp32_modules"] if dtype == torch.float16 else []
    kept = {part for name in lists for part in getattr(module, name, None) or ()}
    return lambda name: any(f".{part}." in f".{name}." for part in kept)
