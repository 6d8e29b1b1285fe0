"""The average of a model with PEFT adapters on disk: adapters that PEFT loads over the base, and never the base.

`ema/adapter/` holds `adapter_config.json` and `adapter_model.safetensors`, for
`PeftModel.from_pretrained(base, "checkpoint-100/ema/adapter")`; several adapters have a folder `ema/adapter/<name>/`
each. They lie one folder deeper than `ema/` because Trainer, when it resumes, loads every adapter that it finds in a
folder directly below the checkpoint into the student. Persistent buffers that the average keeps (running statistics)
are no part of an adapter and go to `ema/buffers.safetensors`.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hf_ema_scaling.ema.adapters import adapter_configs, base_of, is_peft_model, refuse_prompt_learning
from hf_ema_scaling.ema.average import WeightAverage
from hf_ema_scaling.ema.names import canonical_name
from hf_ema_scaling.ema.sharding import class_of

ADAPTER_FOLDER = "adapter"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
BUFFERS = "buffers.safetensors"
ADDED_PREFIX = "base_model.model."


def check_adapters(model: nn.Module, average: WeightAverage) -> None:
    """Says before training what `adapter_tensors` would say when the average is saved; for other models nothing.

    Args:
        model: The unwrapped student.
        average: Its average.

    Raises:
        NotImplementedError, ValueError: As `adapter_tensors`.
    """
    if adapter_configs(model):
        adapter_tensors(model, average, {canonical_name(name): value for name, value in model.state_dict().items()})


def adapter_tensors(
    model: nn.Module, average: WeightAverage, state: Mapping[str, Tensor]
) -> dict[str, dict[str, str]]:
    """Where each tensor of the adapters goes: name in `average.tensors()` by name in the adapter's file, per adapter.

    Args:
        model: The unwrapped student, with adapters.
        average: Its average.
        state: `average.state_dict(model)`; only names and shapes matter.

    Raises:
        NotImplementedError: PEFT stores this kind of adapter in another form than the model holds it, or loads it over
            other base weights.
        ValueError: A trainable parameter belongs to no adapter, so that neither PEFT nor Trainer saves it.
    """
    refuse_prompt_learning(model)
    _refuse_lost_bases(model)
    # Numbers in the shapes of the tensors, which survive that PEFT copies them (as it does of sharded models).
    numbered = {name: torch.tensor(float(i)).expand(state[name].shape) for i, name in enumerate(state)}
    places: dict[str, dict[str, str]] = {}
    for adapter in adapter_configs(model):
        found = {
            file_name: average.resolve(name) if (name := _numbered(tensor, numbered)) else None
            for file_name, tensor in _stored(model, adapter, numbered).items()
        }
        unknown = [file_name for file_name, name in found.items() if name is None]
        strange = sorted(set(unknown) - set(_constants(model, adapter, state) if unknown else ()))
        if strange:
            raise NotImplementedError(
                f"PEFT changes {', '.join(strange[:3])} of adapter {adapter!r} as it saves it, so its average cannot "
                "be restored bit for bit. Use LoRA, or save the average of the whole model without PEFT."
            )
        places[adapter] = {file_name: name for file_name, name in found.items() if name is not None}
    saved = {name for place in places.values() for name in place.values()}
    left = {resolved for key, _ in model.named_parameters() if (resolved := average.resolve(key)) is not None}
    lost = sorted(left - saved - average.references)
    if lost:
        raise ValueError(
            f"{', '.join(lost[:3])} ({len(lost)} in all) are trained but belong to no adapter: neither PEFT nor "
            "Trainer saves them. Name their modules in modules_to_save of the adapter's configuration."
        )
    return places


def _stored(model: nn.Module, adapter: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What PEFT would store of a state of the model, by name in the file, in the shapes that the model has."""
    from peft import get_peft_model_state_dict

    config = adapter_configs(model)[adapter]
    # AdaLoRA leaves out what its student no longer uses; the average still does, with what it was.
    pattern = {"rank_pattern": config.rank_pattern} if _is_adalora(config) else {}
    vars(config).update(dict.fromkeys(pattern))
    try:
        stored = get_peft_model_state_dict(
            model, state_dict=dict(state), adapter_name=adapter, save_embedding_layers=False
        )
    finally:
        vars(config).update(pattern)
    # What transformers puts before the names of an adapter that it added, so that PEFT reads them too.
    prefix = "" if is_peft_model(model) else ADDED_PREFIX
    return {prefix + file_name: tensor for file_name, tensor in stored.items()}


def _constants(model: nn.Module, adapter: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What PEFT stores with an adapter and not from the model's state, such as the places in a weight it changes."""
    marked = [
        {name: torch.full((), mark).expand(tensor.shape) for name, tensor in state.items()} for mark in (0.25, 0.5)
    ]
    one, other = (_stored(model, adapter, values) for values in marked)
    return {name: tensor for name, tensor in one.items() if torch.equal(tensor, other[name])}


def _is_adalora(config: Any) -> bool:
    return str(config.peft_type.value) == "ADALORA"


def _refuse_lost_bases(model: nn.Module) -> None:
    """Raises `NotImplementedError` for adapters that came with a change of the base which loading cannot repeat."""
    for adapter, config in adapter_configs(model).items():
        scheme = str(getattr(config, "init_lora_weights", "")).lower()
        if scheme.startswith("pissa_niter") or scheme in ("corda", "lora_ga"):
            raise NotImplementedError(
                f"init_lora_weights={config.init_lora_weights!r} of adapter {adapter!r} changed the base's weights in "
                "a way that PEFT does not repeat when it loads the adapter, so a saved average would compute with "
                "other weights than this one. Use 'pissa' or 'olora', which it repeats; or save the base as it is now "
                f"(`model.unload().save_pretrained(...)`), build the adapter over that one, and set "
                f"`model.peft_config[{adapter!r}].init_lora_weights = True`."
            )


def _numbered(tensor: Tensor, numbered: Mapping[str, Tensor]) -> str | None:
    """The name of the tensor that holds this number in this shape; None if something was made of it."""
    number = float(tensor.flatten()[0]) if tensor.numel() else -1.0
    name = list(numbered)[int(number)] if number.is_integer() and 0 <= number < len(numbered) else None
    return name if name is not None and torch.equal(tensor, numbered[name].to(tensor)) else None


def adapter_names(model: nn.Module, average: WeightAverage, state: Mapping[str, Tensor]) -> list[str]:
    """The names in `average.tensors()` of all that `write_adapters` writes.

    Raises:
        NotImplementedError, ValueError: As `adapter_tensors`.
    """
    places = adapter_tensors(model, average, state)
    names = [name for place in places.values() for name in place.values()]
    return [*names, *_buffers(average, names, model)]


def write_adapters(folder: Path, model: nn.Module, average: WeightAverage, state: Mapping[str, Tensor]) -> None:
    """Writes the average's adapters, and its buffers if there are any, into `folder`.

    Args:
        folder: An empty folder.
        model: The unwrapped student, with adapters.
        average: Its average.
        state: `average.state_dict(model)`.

    Raises:
        NotImplementedError, ValueError: As `adapter_tensors`.
    """
    places = adapter_tensors(model, average, state)
    gathered = {average.resolve(name): tensor for name, tensor in state.items()}
    for adapter, config in adapter_configs(model).items():
        target = _place(folder, adapter, places)
        target.mkdir(parents=True)
        # A copy of each: PEFT may store one tensor under two names, which safetensors refuses.
        tensors = {
            file_name: gathered[name].clone(memory_format=torch.contiguous_format)
            for file_name, name in places[adapter].items()
        }
        tensors |= _constants(model, adapter, state)
        save_file(tensors, target / ADAPTER_WEIGHTS, metadata={"format": "pt"})
        _write_config(target, model, config)
    names = [name for place in places.values() for name in place.values()]
    buffers = {name: gathered[name].contiguous() for name in _buffers(average, names, model)}
    if buffers:
        save_file(buffers, folder / BUFFERS, metadata={"format": "pt"})


def read_adapters(folder: Path, model: nn.Module, average: WeightAverage) -> dict[str, Tensor]:
    """Reads what `write_adapters` wrote, by the names of `average.tensors()`.

    Raises:
        OSError, SafetensorError, KeyError: A file is missing or damaged, or lacks a tensor; the message names it.
    """
    state = average.state_dict(model)
    places = adapter_tensors(model, average, state)
    files = {_place(folder, adapter, places) / ADAPTER_WEIGHTS: place for adapter, place in places.items()}
    buffers = _buffers(average, [name for place in places.values() for name in place.values()], model)
    if buffers:
        files[folder / BUFFERS] = {name: name for name in buffers}
    constants = {
        _place(folder, adapter, places) / ADAPTER_WEIGHTS: _constants(model, adapter, state) for adapter in places
    }
    tensors: dict[str, Tensor] = {}
    for path, place in files.items():
        stored = _read(path, folder)
        for file_name, name in place.items():
            if file_name not in stored:
                raise KeyError(f"{path.relative_to(folder)} lacks {file_name}")
            tensors[name] = stored[file_name]
        for file_name, tensor in constants.get(path, {}).items():
            if file_name not in stored or not torch.equal(stored[file_name], tensor.to(stored[file_name])):
                raise KeyError(f"{file_name} in {path.relative_to(folder)} is not that of the model's adapter")
    return tensors


def read_all(folder: Path) -> dict[str, Tensor]:
    """Reads every file of `write_adapters` without a model: buffers by name, adapters by their names in the files.

    Returns:
        The tensors; none where the folder holds no adapters.

    Raises:
        OSError, SafetensorError: A file is missing or damaged; the message names it.
    """
    configs = sorted((folder / ADAPTER_FOLDER).rglob("adapter_config.json"))
    files = [path.with_name(ADAPTER_WEIGHTS) for path in configs]
    if files and (folder / BUFFERS).exists():
        files.append(folder / BUFFERS)
    return {name: tensor for path in files for name, tensor in _read(path, folder).items()}


def _read(path: Path, folder: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except SafetensorError as error:
        raise SafetensorError(f"{path.relative_to(folder)} is not readable ({error})") from error
    except OSError as error:
        raise OSError(f"{path.relative_to(folder)} is missing or not readable") from error


def _place(folder: Path, adapter: str, places: Mapping[str, Any]) -> Path:
    return folder / ADAPTER_FOLDER / adapter if len(places) > 1 else folder / ADAPTER_FOLDER


def _buffers(average: WeightAverage, written: list[str], model: nn.Module) -> list[str]:
    parameters = {average.resolve(name) for name, _ in model.named_parameters()}
    return [name for name in average.tensors() if name not in parameters and name not in written]


def _write_config(folder: Path, model: nn.Module, config: Any) -> None:
    base = base_of(model)
    config = copy.deepcopy(config)
    config.inference_mode = True
    if _is_adalora(config):
        config.rank_pattern = None  # what is stored has all ranks
    if config.base_model_name_or_path is None:
        config.base_model_name_or_path = getattr(base, "name_or_path", None)
    # Lets AutoPeftModel find the base's class where no task says it.
    mapping = {"base_model_class": class_of(base).__name__, "parent_library": class_of(base).__module__}
    config.save_pretrained(folder, auto_mapping_dict=None if config.task_type or not is_peft_model(model) else mapping)


def load_added_adapter(model: Any, checkpoint: str | Path) -> bool:
    """Loads the adapter of a checkpoint into a transformers model that has it by `add_adapter`, in place.

    Trainer resumes `PeftModel` only, and fails on such a model for want of full weights.

    Args:
        model: The unwrapped student.
        checkpoint: A folder that its `save_pretrained` wrote.

    Returns:
        Whether it is such a model, and so was loaded.

    Raises:
        ValueError: The checkpoint's adapter is another.
    """
    path = Path(checkpoint) / ADAPTER_WEIGHTS
    if is_peft_model(model) or not adapter_configs(model) or not path.is_file():
        return False
    from peft import set_peft_model_state_dict

    (adapter,) = model.active_adapters()  # transformers saves one active adapter only
    stored = {name.removeprefix(ADDED_PREFIX): tensor for name, tensor in load_file(path).items()}
    result: Any = set_peft_model_state_dict(model, dict(stored), adapter_name=adapter)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    wrong = sorted({*result.unexpected_keys, *(trained & set(result.missing_keys))})
    if wrong:
        raise ValueError(f"{path} is not of this model's adapter {adapter!r}: {', '.join(wrong[:5])} do not match")
    return True
