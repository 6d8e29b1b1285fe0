"""PEFT adapters: what is averaged of a model that has them, the correction of its bias, and its teacher's module.

**Only what is trained is averaged.** The frozen base is the student's own, in its own dtype: the average of a LoRA
model costs as much as its adapters (and the modules they train along).

**Bias.** Adapters start from zero (LoRA: B = 0), so an ordinary average is for a long time mostly that zero. With a
student that stands still at (A, B) and r = 1 - rho an average that starts from zero factors has after n updates the
delta `(1 - (1-r)**n)**2 B A`: 0.3, 16, 41, 85 % after 1, 10, 20, 50 updates at r = 0.05. Here the start has no share:
the average is the mean of the students after each update with weights `(1 - rho**kappa_i) * prod_{j > i} rho**kappa_j`
over their sum `1 - rho**clock`, as Adam corrects its moments. The first update makes it equal to the student, any
partition of the same data into steps agrees as it does without the correction, and after a few half-lives the
correction is gone.

**The merged delta.** The average's delta is `mean(B) mean(A)`, not `mean(B A)`. The difference is the covariance of
the factors over the window of the average: `mean(B A) - mean(B) mean(A) = mean((B - mean B) (A - mean A))`, of second
order in how far they move within it, and 0 where either stands still. Averaging the product instead would need a dense
matrix per layer, and the result would be no adapter of that rank.

Adapters are recognised without importing PEFT, which is an optional dependency.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.initialization import no_init_weights

from hf_ema_scaling.ema.sharding import class_of


def has_adapters(model: nn.Module) -> bool:
    """Whether a model, or a part of it, has PEFT adapters: by `get_peft_model` or by transformers' `add_adapter`."""
    return any(adapter_configs(module) for module in model.modules())


def adapter_configs(module: nn.Module) -> dict[str, Any]:
    """The PEFT configurations of a `PeftModel`, or of a transformers model with adapters, by name; else empty."""
    if is_peft_model(module) or vars(module).get("_hf_peft_config_loaded", False):
        configs: dict[str, Any] = module.peft_config  # type: ignore[assignment]
        return configs
    return {}


def is_peft_model(module: nn.Module) -> bool:
    """Whether a module is PEFT's own wrapper, `PeftModel` or `PeftMixedModel`."""
    return any(kind.__name__ in ("PeftModel", "PeftMixedModel") for kind in type(module).__mro__)


def base_of(model: nn.Module) -> nn.Module:
    """The model inside PEFT's own wrapper; any other module as it is."""
    if not is_peft_model(model):
        return model
    wrapper: Any = model  # a PeftMixedModel has no get_base_model
    base: nn.Module = wrapper.get_base_model() if hasattr(wrapper, "get_base_model") else wrapper.base_model.model
    return base


def debiased(weight: float, gathered: float) -> tuple[float, float]:
    """The weight of an update of a bias-corrected average, and what it has gathered then.

    Args:
        weight: `1 - rho**kappa`, in [0, 1].
        gathered: Sum of the weights of the students so far, `1 - rho**clock`; 0.0 before the first update.

    Returns:
        `weight / gathered'` and `gathered' = gathered + (1 - gathered) * weight`.

    Raises:
        ValueError: The weight is outside [0, 1] or not a number.
    """
    if not 0.0 <= weight <= 1.0:
        raise ValueError(f"The weight of an update must be between 0 and 1, got {weight!r}.")
    if weight in (0.0, 1.0):
        return weight, max(gathered, weight)
    total = min(1.0, gathered + (1.0 - gathered) * weight)
    return min(1.0, weight / total), total


def adapter_module(student: nn.Module, config_for: Callable[[PreTrainedModel], Any]) -> nn.Module:
    """A new module of the student's architecture, adapters included, whose values mean nothing yet.

    Its tensors are on `meta`; where PEFT cannot make its kind of adapter there, all of them are memory that nobody has
    written to, which costs nothing as long as the average takes their place.

    Args:
        student: A model for which `adapter_configs` is not empty; left as it is.
        config_for: Returns a configuration for the base model, which the new module keeps.

    Raises:
        TypeError: The base is not a transformers model.
        NotImplementedError: An adapter that adds tokens instead of changing layers (prompt learning), or one that PEFT
            cannot make without the base's weights.
    """
    base = base_of(student)
    if not isinstance(base, PreTrainedModel):
        raise TypeError(
            f"the adapters' base {type(base).__name__} is not a transformers model, so the teacher cannot be built "
            "from a configuration. Pass `factory=`, a function that returns a new model with the same adapters."
        )
    refuse_prompt_learning(student)
    configs = {name: _without_initialisation(config) for name, config in adapter_configs(student).items()}
    # A torch.Size or a count is enough for most adapters; some look for values (indices drawn, say) as they are made.
    for device in ("meta", "cpu"):
        try:
            return _built(student, base, configs, config_for, device)
        except (AttributeError, LookupError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
            reason = error
    kinds = ", ".join(sorted({config.peft_type.value for config in configs.values()}))
    raise NotImplementedError(
        f"PEFT cannot make adapters of kind {kinds} for the teacher before it has weights ({type(reason).__name__}: "
        f"{reason}). Pass `factory=` (`teacher_factory=` to trainers and callback), a function that returns a new "
        "model with the same adapters."
    ) from reason


def _built(
    student: nn.Module,
    base: PreTrainedModel,
    configs: dict[str, Any],
    config_for: Callable[[PreTrainedModel], Any],
    device: str,
) -> nn.Module:
    empty = device == "meta"
    with torch.device(device):
        with no_init_weights():  # for the base alone: some adapters use what a function of torch.nn.init returns
            module: Any = class_of(base)(config_for(base))
        if getattr(base, "generation_config", None) is not None:
            module.generation_config = copy.deepcopy(base.generation_config)
        configs = copy.deepcopy(configs)
        if is_peft_model(student):
            first, *others = configs
            kind: Any = class_of(student)
            options = {"low_cpu_mem_usage": empty, "autocast_adapter_dtype": False}
            known = inspect.signature(kind).parameters  # a PeftMixedModel takes neither
            options = {name: value for name, value in options.items() if name in known}
            module = kind(module, configs[first], adapter_name=first, **options)
            for name in others:
                module.add_adapter(name, configs[name], low_cpu_mem_usage=empty)
            module.set_adapter(_active(student))
        else:
            from peft import inject_adapter_in_model

            for name, adapter in configs.items():
                inject_adapter_in_model(adapter, module, name, low_cpu_mem_usage=empty)
            module._hf_peft_config_loaded = True
            module.set_adapter(_active(student))
    return module


@torch.no_grad()
def take_constants(module: nn.Module, student: nn.Module) -> None:
    """Gives a module copies of the tensors that the student's adapters keep outside parameters and buffers.

    Such as the places in a weight that an adapter changes: drawn at random, never trained and never saved.

    Args:
        module: As `adapter_module` returns it.
        student: Left as it is.
    """
    parts = dict(student.named_modules())
    own = {id(tensor) for tensor in (*student.parameters(), *student.buffers())}
    for name, part in module.named_modules():
        theirs = vars(parts[name]) if name in parts else {}
        for leaf, value in vars(part).items():
            if leaf in _TABLES or leaf not in theirs or type(theirs[leaf]) is not type(value):
                continue
            if isinstance(value, Tensor) and _constant(theirs[leaf], own):
                vars(part)[leaf] = theirs[leaf].clone()
            elif isinstance(value, dict):
                value.update({key: one.clone() for key, one in theirs[leaf].items() if _constant(one, own)})


_TABLES = frozenset({"_parameters", "_buffers", "_modules"})


def _constant(value: Any, own: set[int]) -> bool:
    return isinstance(value, Tensor) and not value.requires_grad and id(value) not in own


def check_filled(module: nn.Module) -> None:
    """Refuses a module in which something stayed on `meta` after it was given its values.

    Raises:
        ValueError: Naming it.
    """
    for name, part in module.named_modules():
        held: list[tuple[str, Any]] = [*vars(part).items(), *part._parameters.items(), *part._buffers.items()]
        for leaf, value in held:
            values = value.values() if isinstance(value, dict) and leaf not in _TABLES else (value,)
            if any(isinstance(one, Tensor) and one.is_meta for one in values):
                raise ValueError(
                    f"{type(part).__name__} keeps {leaf!r} ({name or 'the model itself'}) outside its parameters and "
                    "buffers, so the teacher cannot share it. Pass `factory=`, a function that returns a new model "
                    "with the same adapters."
                )


def refuse_merged(model: nn.Module, action: str) -> None:
    """Raises `RuntimeError` for a model in which PEFT has merged an adapter into the base's weights.

    The base then holds the student's adapter, whatever the adapter's own tensors hold.
    """
    for name, part in model.named_modules():
        if getattr(part, "merged_adapters", None):
            raise RuntimeError(
                f"Cannot {action} this model now: the adapter {part.merged_adapters[0]!r} is merged into the weights "
                f"of {name!r}, so the average's would come on top of it. Call `model.unmerge_adapter()` first."
            )


def refuse_prompt_learning(model: nn.Module) -> None:
    """Raises `NotImplementedError` for a model with an adapter that learns tokens instead of changing layers."""
    for config in adapter_configs(model).values():
        if config.is_prompt_learning:
            raise NotImplementedError(
                f"{config.peft_type.value} learns tokens and not layers: its average cannot be saved here, and a "
                "teacher needs a `factory=`. Use LoRA or another adapter of layers, or fine-tune without PEFT."
            )


def _active(student: Any) -> Any:
    active = student.active_adapters if is_peft_model(student) else student.active_adapters()
    return active[0] if len(active) == 1 else active


def _without_initialisation(config: Any) -> Any:
    config = copy.deepcopy(config)
    if isinstance(getattr(config, "init_lora_weights", None), str):
        config.init_lora_weights = True  # other schemes decompose the base's weights, which are not there
    return config
