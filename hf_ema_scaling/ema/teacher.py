"""`EMATeacher`: a separate frozen module in eval mode whose weights are the average, and checks that it lives."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from hf_ema_scaling.ema.adapters import adapter_configs, adapter_module, check_filled
from hf_ema_scaling.ema.average import WeightAverage
from hf_ema_scaling.ema.forwards import carry_over_forwards
from hf_ema_scaling.ema.names import local_shard, unwrap


class DeadTeacherError(RuntimeError):
    """The teacher does not follow the average, or the average does not follow the student."""


class EMATeacher:
    """A frozen copy of the student's architecture that computes with the average's own storage.

    The module is built from the class and a deep copy of the configuration (and those of its PEFT adapters), never by
    copying the student, and all its parameters and buffers are the shadow tensors, which for frozen parameters are the
    student's own: labelling costs no second copy of the weights and every update of the average is seen at once. A
    `forward` that was replaced on the student is carried over, see `ema.forwards`. Creating it leaves the student's
    bits and the random state as they were. It is a plain object, so assigning it to a model or trainer registers
    nothing.

    Args:
        model: The student, wrapped or not.
        average: The average to teach with.
        factory: Returns a new module of the student's architecture; required for models that are not transformers
            models, and for those whose constructor needs more than a configuration.

    Raises:
        TypeError: No factory for a model that needs one, or a replaced `forward` that holds the student's weights.
        ValueError: The built module has other names or shapes than the average, or is the student itself.
    """

    def __init__(
        self, model: nn.Module, average: WeightAverage, *, factory: Callable[[], nn.Module] | None = None
    ) -> None:
        student = unwrap(model)
        average.rebind(model)
        # Constructors draw random numbers on the CPU even where initialisation is disabled.
        with torch.random.fork_rng(devices=_rng_devices(average.device)):
            module = factory() if factory is not None else _build(student, average)
        mine = {id(tensor) for tensor in (*student.parameters(), *student.buffers())}
        if module is student or any(id(tensor) in mine for tensor in (*module.parameters(), *module.buffers())):
            raise ValueError("The factory must return a new module that shares no tensors with the student.")
        # Whatever the module holds outside its registered tensors follows to the shadow's device.
        self._module = module.to(average.device).requires_grad_(False).eval()
        self._average = average
        self._share()

    @property
    def module(self) -> nn.Module:
        """The teacher's module, over the average's current storage."""
        if self._version != self._average.storage_version:
            self._share()
        return self._module

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
        module = self.module
        training = next((name for name, part in module.named_modules() if part.training), None)
        if training is not None:
            raise DeadTeacherError(
                f"The teacher's {training or type(module).__name__!r} is in training mode; its labels would contain "
                "dropout noise. Call `teacher.module.eval()` and find out who called `.train()` on it."
            )
        with torch.no_grad():
            return module(*args, **inputs)

    def _share(self) -> None:
        _share(self._module, self._average)
        self._version = self._average.storage_version


def inference_config(model: PreTrainedModel) -> PreTrainedConfig:
    """Returns a deep copy of a model's configuration for its float32 average.

    `use_cache` goes back to True where that is the default of the configuration's class, because Trainer switches
    it off on the student; `dtype` is float32 throughout.

    Args:
        model: The unwrapped student; left as it is.
    """
    config = copy.deepcopy(model.config)
    for part in _config_parts(config):
        part.dtype = torch.float32
        if getattr(part, "use_cache", None) is False and getattr(type(part), "use_cache", None) is True:
            part.use_cache = True
    return config


def check_liveness(model: nn.Module, average: WeightAverage, teacher: EMATeacher, inputs: Mapping[str, Any]) -> None:
    """Tests the mechanism: perturb the student, update the average, and the teacher's output must change.

    The student, the average, its update count and the random state are put back bit for bit, also on failure. Costs
    a copy of both sets of weights while it runs.

    Args:
        model: The student, wrapped or not.
        average: Its average.
        teacher: The teacher over that average.
        inputs: Keyword inputs of one small batch, without labels, on the teacher's device.

    Raises:
        DeadTeacherError: The output did not change, or the student has nothing trainable.
    """
    moving = [local_shard(p) for p in model.parameters() if p.requires_grad and p.is_floating_point()]
    if not moving:
        raise DeadTeacherError("The student has no trainable floating-point parameter, so its average never moves.")
    with torch.no_grad():
        student = [parameter.detach().clone() for parameter in moving]
        shadow = {name: t.clone() for name, t in average.tensors().items() if name not in average.references}
    counts = average.num_updates, average.gathered
    generator = torch.Generator(moving[0].device).manual_seed(0)
    with torch.random.fork_rng(devices=_rng_devices(average.device)):
        before = list(_floats(teacher(**inputs)))
        try:
            with torch.no_grad():
                for parameter in moving:
                    scale = parameter.abs().float().mean().clamp_min(0.01)
                    noise = torch.randn(parameter.shape, generator=generator, device=parameter.device) * scale
                    parameter.add_(noise.to(parameter.dtype))
            average.blend(model, 0.5)
            after = list(_floats(teacher(**inputs)))
        finally:
            with torch.no_grad():
                for parameter, value in zip(moving, student, strict=True):
                    parameter.copy_(value)
            average.load(shadow)
            average.num_updates, average.gathered = counts
    if not before:
        raise DeadTeacherError("The teacher returned no floating-point tensor, so its labels cannot be checked.")
    if len(before) == len(after) and all(_same(a, b) for a, b in zip(before, after, strict=True)):
        raise DeadTeacherError(
            "The teacher is dead: its output did not change after the student was perturbed and the average updated. "
            "Check that the teacher was built from this average and that updates reach it."
        )


def check_moved(model: nn.Module, average: WeightAverage, initial_fingerprint: tuple[int, ...]) -> None:
    """Verifies by bits that the average has moved since `initial_fingerprint` and is not the student.

    For use after three updates with a momentum above 0 and a learning rate above 0.

    Args:
        model: The student.
        average: Its average.
        initial_fingerprint: `average.fingerprint()` from before those updates.

    Raises:
        DeadTeacherError: The average did not move, or equals the student.
    """
    if average.fingerprint() == initial_fingerprint:
        raise DeadTeacherError(
            f"The average has not moved by one bit after {average.num_updates} updates: either updates do not reach "
            "it, the student's weights do not change, or the momentum is so close to 1 that float32 cannot show it."
        )
    if average.equals(model):
        raise DeadTeacherError(
            f"The average equals the student after {average.num_updates} updates: the momentum is 0, or the two "
            "share their tensors."
        )


def _share(module: nn.Module, average: WeightAverage) -> None:
    try:
        average.share_with(module)
    except ValueError as error:
        raise ValueError(
            f"{type(module).__name__} built for the teacher does not fit the average: {error} Pass `factory=` that "
            "builds the student's architecture exactly."
        ) from error


def _build(student: nn.Module, average: WeightAverage) -> nn.Module:
    if adapter_configs(student):
        module = adapter_module(student, inference_config)
        _share(module, average)
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
            module = type(student)(config)
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


def _rng_devices(device: torch.device) -> list[torch.device]:
    return [device] if device.type == "cuda" else []


def _floats(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield output.clone()
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from _floats(value)
    elif isinstance(output, Sequence) and not isinstance(output, str):
        for value in output:
            yield from _floats(value)


def _same(a: Tensor, b: Tensor) -> bool:
    # NaN equals NaN here: a teacher that only returns NaN must not pass as one that changed.
    return a.shape == b.shape and bool(((a == b) | (a.isnan() & b.isnan())).all())
