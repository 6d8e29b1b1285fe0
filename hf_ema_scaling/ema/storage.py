"""The average on disk: a complete `from_pretrained` folder of float32 weights plus `ema_state.json`."""

from __future__ import annotations

import contextlib
import json
import shutil
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from hf_ema_scaling.ema.adapter_storage import adapter_names, read_adapters, read_all, write_adapters
from hf_ema_scaling.ema.adapters import adapter_configs
from hf_ema_scaling.ema.average import WeightAverage
from hf_ema_scaling.ema.durable import check_seal, flush, rename, sealed_json
from hf_ema_scaling.ema.exact import NotExactError, exact_record, read_exact, rounded, save_exact, with_exact
from hf_ema_scaling.ema.names import unwrap
from hf_ema_scaling.ema.sharding import class_of
from hf_ema_scaling.ema.teacher import inference_config

STATE_NAME = "ema_state.json"
FORMAT_VERSION = 1
OnMissing = Literal["raise", "rebuild"]
"""What to do when the average to resume is missing or damaged."""
_NO_DTYPE_OF_SAFETENSORS = (torch.complex32, torch.complex128)


class AverageStateError(RuntimeError):
    """A saved average cannot be restored; the message names the file and the way out."""


def save_average(
    folder: str | Path,
    model: nn.Module,
    average: WeightAverage,
    *,
    state: Mapping[str, Any],
    processing_class: Any | None = None,
    write: bool = True,
) -> None:
    """Saves the average as a folder that `from_pretrained` loads, and that `load_average` restores bit for bit.

    The folder is written beside its final place, flushed to the disk and then renamed, so it is complete or absent
    whatever ends the process; an older folder of the same name is replaced, and until then remains readable. The
    student, its configuration included, is not changed.

    Args:
        folder: Where to save, e.g. `checkpoint-100/ema`. Its parent is created.
        model: The student, wrapped or not. A transformers model gives its configuration and generation
            configuration; of a model with PEFT adapters only these are saved (`ema.adapter_storage`); any other module
            is saved as `model.safetensors` alone.
        average: The average.
        state: JSON values the caller wants back from `load_average`, e.g. the clock and the momentum.
        processing_class: Tokenizer, feature extractor or processor to save along.
        write: False on the processes that only take part in gathering sharded tensors; with sharded models all
            processes must call this. The one that writes holds the whole average on its CPU meanwhile.

    Raises:
        TypeError, ValueError: `state` is not JSON, or has NaN or infinity; a tensor's dtype is none of safetensors; or
            as `adapter_tensors`.
        NotImplementedError: PEFT adapters that are not stored as they are held.
    """
    folder = Path(folder)
    inner = unwrap(model)
    tensors = average.state_dict(model, keep=write)
    if not write:
        return
    kept = {key: tensors.get(key, tensor) for key, tensor in average.tensors().items()}
    if adapters := bool(adapter_configs(inner)):
        kept = {key: kept[key] for key in adapter_names(inner, average, tensors)}
    _check_dtypes(kept)
    record: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "num_updates": average.num_updates,
        "buffers": average.buffers,
        "tensors": {key: _describe(tensor) for key, tensor in kept.items()},
        "state": dict(state),
        **exact_record(average),
    }
    if average.gathered is not None:
        record["gathered"] = average.gathered
    text = sealed_json(record)
    folder.parent.mkdir(parents=True, exist_ok=True)
    _put_back(folder)
    partial, old = folder.with_name(f".{folder.name}.partial"), _old(folder)
    for leftover in (partial, old):
        shutil.rmtree(leftover, ignore_errors=True)
    partial.mkdir()
    try:
        if adapters:
            write_adapters(partial, inner, average, rounded(tensors, average))
        elif isinstance(inner, PreTrainedModel):
            _save_pretrained(partial, inner, rounded(tensors, average))
        else:
            contiguous = {key: tensor.contiguous() for key, tensor in rounded(kept, average).items()}
            save_file(contiguous, partial / SAFE_WEIGHTS_NAME, metadata={"format": "pt"})
        if processing_class is not None:
            processing_class.save_pretrained(partial)
        save_exact(partial, kept, average)
        (partial / STATE_NAME).write_text(text, encoding="utf-8")
        flush(partial)
        if folder.exists():
            rename(folder, old)  # a directory cannot be renamed onto one that is not empty
        rename(partial, folder)
    finally:
        _put_back(folder)
        shutil.rmtree(partial, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)


def load_average(folder: str | Path, model: nn.Module, average: WeightAverage) -> dict[str, Any]:
    """Restores an average saved by `save_average`, bit for bit; every tensor is verified against its checksum.

    Weights that `save_pretrained` stored under other names go through the model class's `from_pretrained`, offline
    and without remote code. Non-persistent buffers are taken from the student.

    Args:
        folder: The saved folder.
        model: The student, wrapped or not.
        average: Receives the tensors and `num_updates`; unchanged if anything is wrong.

    Returns:
        The caller's `state`.

    Raises:
        AverageStateError: The folder, a file or a tensor is missing, damaged, or does not fit.
    """
    folder = Path(folder)
    _put_back(folder)
    record = read_record(folder)
    if record["buffers"] != average.buffers:
        raise AverageStateError(
            f"{folder / STATE_NAME} was written with buffers={record['buffers']!r}, this run has "
            f"{average.buffers!r}. Use the same setting to resume."
        )
    tensors = _read_weights(folder, unwrap(model), average, record["tensors"])
    try:
        exact = with_exact(folder, record, tensors, average)
    except NotExactError as error:
        raise AverageStateError(f"The saved average in {folder} cannot be restored: {error}.") from error
    tensors = exact if "exact" in record else tensors
    for key, expected in record["tensors"].items():
        found = _describe(tensors[key])
        if found != expected:
            raise _damaged(folder, f"tensor {key!r} is {found}, {STATE_NAME} says {expected}")
    try:
        average.load(exact)
    except ValueError as error:
        raise AverageStateError(
            f"The average in {folder} belongs to another model: {error} Resume with the model it was saved from."
        ) from error
    average.num_updates = record["num_updates"]
    if average.gathered is not None:
        average.gathered = float(record.get("gathered", 0.0))
    average.rebind(model)
    state: dict[str, Any] = record["state"]
    return state


def read_state(folder: str | Path) -> dict[str, Any]:
    """The caller's `state` in a saved average, whose weights are not read.

    Raises:
        AverageStateError: The folder or `ema_state.json` is missing or damaged.
    """
    folder = Path(folder)
    _put_back(folder)
    state: dict[str, Any] = read_record(folder)["state"]
    return state


def check_average(folder: str | Path) -> dict[str, Any]:
    """Reads a saved average without a model and verifies what can be so: every file, and each tensor stored by name.

    Returns:
        The caller's `state`.

    Raises:
        AverageStateError: The folder or a file in it is missing or damaged.
    """
    folder = Path(folder)
    _put_back(folder)
    record = read_record(folder)
    try:
        stored = read_all(folder) or _read_files(folder)
        stored |= read_exact(folder, record)
    except (OSError, SafetensorError, NotExactError) as error:
        raise _damaged(folder, str(error)) from error
    for key, expected in record["tensors"].items():
        # What is not stored, or by another name, is for `load_average` to find.
        if key in stored and (found := _describe(stored[key])) != expected:
            raise _damaged(folder, f"tensor {key!r} is {found}, {STATE_NAME} says {expected}")
    state: dict[str, Any] = record["state"]
    return state


def _check_dtypes(tensors: Mapping[str, Tensor]) -> None:
    for key, tensor in tensors.items():
        if tensor.dtype in _NO_DTYPE_OF_SAFETENSORS:
            raise TypeError(
                f"{key!r} is {tensor.dtype}, which safetensors cannot store (of complex dtypes only torch.complex64): "
                "keep its real and imaginary part (torch.view_as_real), or register it with persistent=False."
            )


def _old(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.old")


def _put_back(folder: Path) -> None:
    """Undoes a replacement that ended between its two renames: the older folder gets its name again."""
    # Of several processes, one moves it; where none may, the folder is reported as missing.
    with contextlib.suppress(OSError):
        if not folder.exists() and _old(folder).is_dir():
            rename(_old(folder), folder)


def _save_pretrained(folder: Path, model: PreTrainedModel, tensors: Mapping[str, Tensor]) -> None:
    original = model.config
    # save_pretrained writes the dtype and class name into the configuration it finds, and empties the state_dict.
    model.config = inference_config(model)
    try:
        model.save_pretrained(folder, state_dict=dict(tensors))
    finally:
        model.config = original
    path = folder / CONFIG_NAME
    config = json.loads(path.read_text(encoding="utf-8"))
    config["dtype"] = "float32"  # save_pretrained records the student's dtype, the weights are the shadow's
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def read_record(folder: Path) -> dict[str, Any]:
    """What `ema_state.json` says, verified against the checksum in it; of an older version it may have none.

    Raises:
        AverageStateError: The folder or `ema_state.json` is missing or damaged.
    """
    path = folder / STATE_NAME
    if not folder.is_dir():
        raise AverageStateError(
            f"There is no saved average at {folder}. Resume from a checkpoint written with the average, or start a "
            "new average on purpose by not resuming it."
        )
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        version = record["format_version"]
        if version != FORMAT_VERSION:
            raise AverageStateError(
                f"{path} has format version {version!r}, this version reads {FORMAT_VERSION}. Use the version of "
                "hf_ema_scaling that wrote it."
            )
        fields = {"num_updates": int, "buffers": str, "tensors": dict, "state": dict}
        wrong = [name for name, kind in fields.items() if not isinstance(record[name], kind)]
    except FileNotFoundError as error:
        raise _damaged(folder, f"{STATE_NAME} is missing") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _damaged(folder, f"{STATE_NAME} is not readable ({type(error).__name__}: {error})") from error
    if wrong:
        raise _damaged(folder, f"{STATE_NAME} has wrong values for {', '.join(wrong)}")
    try:
        check_seal(record)
    except ValueError as error:
        raise _damaged(folder, f"{STATE_NAME} is not as it was written ({error})") from error
    return dict(record)


def _read_weights(
    folder: Path, model: nn.Module, average: WeightAverage, expected: Mapping[str, Any]
) -> dict[str, Tensor]:
    if adapter_configs(model):
        try:
            read = read_adapters(folder, model, average)
        except (OSError, SafetensorError, KeyError) as error:
            raise _damaged(folder, str(error.args[0])) from error
        missing = sorted(set(expected) - set(read))
        if missing:
            raise _damaged(folder, f"the model's adapters have no {', '.join(missing[:5])}")
        return read
    stored = _read_files(folder)
    named = {average.resolve(name): tensor for name, tensor in stored.items()}
    if None not in named and set(expected) <= set(named):
        return {key: named[key] for key in expected if key is not None}
    if not isinstance(model, PreTrainedModel):
        missing = sorted(set(expected) - set(stored))
        raise _damaged(folder, f"{SAFE_WEIGHTS_NAME} lacks {', '.join(missing[:5]) or 'nothing, but has other names'}")
    kind: Any = class_of(model)
    from_pretrained = kind.from_pretrained
    try:
        with torch.random.fork_rng(devices=[]):
            loaded, info = from_pretrained(
                folder, dtype=torch.float32, local_files_only=True, output_loading_info=True
            )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise _damaged(folder, f"from_pretrained refused it ({error})") from error
    named = {average.resolve(name): tensor for name, tensor in loaded.state_dict().items()}
    # from_pretrained fills what is missing with fresh initial values and goes on.
    missing = sorted({*info["missing_keys"], *(key for key in expected if key not in named)})
    if missing:
        raise _damaged(folder, f"the weights lack {', '.join(missing[:5])}")
    return {key: named[key] for key in expected}


def _read_files(folder: Path) -> dict[str, Tensor]:
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    names = [SAFE_WEIGHTS_NAME]
    if index.exists():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise _damaged(folder, f"{index.name} is not readable ({error})") from error
    tensors: dict[str, Tensor] = {}
    for name in names:
        try:
            tensors.update(load_file(folder / name))
        except FileNotFoundError as error:
            # safetensors says so also of a file that this process may not read.
            what = "is not readable: permission denied?" if (folder / name).is_file() else "is missing"
            raise _damaged(folder, f"{name} {what}") from error
        except (SafetensorError, OSError, ValueError) as error:
            raise _damaged(folder, f"{name} is not readable ({error})") from error
    return tensors


def _describe(tensor: Tensor) -> dict[str, Any]:
    """Dtype, shape and CRC-32 of a tensor: what must agree for it to be the tensor that was saved."""
    data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return {
        "dtype": str(tensor.dtype).removeprefix("torch."),
        "shape": list(tensor.shape),
        "crc32": f"{zlib.crc32(data.numpy().data):08x}",
    }


def _damaged(folder: Path, what: str) -> AverageStateError:
    return AverageStateError(
        f"The saved average in {folder} is damaged: {what}. Restore the folder from a copy, or resume from another "
        "checkpoint."
    )
