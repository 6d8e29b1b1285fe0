"""Training in shards: what of it is refused, with the reason, and what the trainers do differently where it is not."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Shard
from transformers import PreTrainedConfig, Trainer

from hf_ema_scaling.ema import unwrap
from hf_ema_scaling.ema.adapters import adapter_configs, is_peft_model
from hf_ema_scaling.ema.names import entries_of
from hf_ema_scaling.ema.sharding import is_flat_sharded

FSDP1 = (
    "FSDP1 keeps parameters as pieces of flat buffers, which have neither names nor shapes to average by: set "
    "fsdp_version: 2"
)
ZERO_3 = (
    "DeepSpeed ZeRO-3 partitions the parameters: outside its own gathering contexts they are placeholders without "
    "elements, so there is nothing to average: use FSDP2 (fsdp_version: 2)"
)
ZERO = (
    "DeepSpeed steps its optimizer inside backward(), with clipping and overflow checks of its own, so the plan's "
    "clipping, on_nonfinite, ema_correction='path' and the noise scale come too late, and it keeps the optimizer's "
    "state flat, which a change of stage could not rescale. Use DDP or FSDP2 (fsdp_version: 2); a stock Trainer with "
    "EMACallback averages under ZeRO-1 and 2"
)


def refuse_sharding(trainer: Trainer) -> None:
    """Raises for shardings that the trainers of this library cannot train, and for what does not work in shards.

    FSDP2 trains: sharded at load time by `from_pretrained(distributed_config=DistributedConfig(fsdp_size=n))`, with
    `dp_replicate_size` copies of the shards (HSDP) where that is given, or by accelerate's plugin with
    `fsdp_version: 2` (with `parallelism_config=ParallelismConfig(dp_replicate_size=m, dp_shard_size=n)` m copies of n
    shards, at least two), which wants accelerators: it has not been run on a GPU, only on CPUs that it was made to
    take for such. PEFT adapters train in both; of a model sharded at load time they are whole on every process, and
    PEFT cannot copy a sharded module for `modules_to_save`. What is said of DeepSpeed comes from accelerate's source
    and has not been run.

    Args:
        trainer: a trainer whose own constructor has run.

    Raises:
        NotImplementedError, ValueError: with the reason and the way out.
    """
    if trainer.is_deepspeed_enabled:
        stage = int(trainer.accelerator.state.deepspeed_plugin.zero_stage)
        raise NotImplementedError(ZERO_3 if stage == 3 else f"ZeRO-{stage}: {ZERO}")
    model: Any = trainer.model
    plugin = getattr(trainer.accelerator.state, "fsdp_plugin", None)
    if is_flat_sharded(model) or (plugin is not None and getattr(plugin, "fsdp_version", 1) != 2):
        raise NotImplementedError(FSDP1)
    config = getattr(trainer.accelerator, "parallelism_config", None)
    _refuse_other_parallelism(config, ("tp_size", "cp_size", "sp_size"))
    if trainer.is_fsdp_xla_enabled:
        raise NotImplementedError("FSDP of XLA keeps its own kind of shards, which are not averaged here: use FSDP2")
    if not (trainer.is_fsdp_enabled or trainer.is_distributed_loading_by_transformers):
        return
    if trainer.is_distributed_loading_by_transformers:
        _refuse_load_time_sharding(trainer)
    else:
        _refuse_without_embeddings(model)
    if trainer.args.fp16 or getattr(trainer.accelerator, "scaler", None) is not None:
        raise NotImplementedError(
            "fp16 with FSDP2: each process would judge the overflow of its own shards, and some would skip a step "
            "that others take: use bf16"
        )
    for name, value in _layer_drops(getattr(unwrap(model), "config", None)):
        raise ValueError(
            f"{name}={value} (the model's configuration) under FSDP2: each process would skip layers of its own "
            f"choice, and gathering a layer waits for all. Set config.{name} = 0.0"
        )


def _refuse_without_embeddings(model: Any) -> None:
    """Accelerate's FSDP2 asks a model for its input embeddings; transformers' speech encoders answer with an error."""
    try:
        getattr(unwrap(model), "get_input_embeddings", lambda: None)()
    except NotImplementedError as error:
        raise NotImplementedError(
            f"{type(unwrap(model)).__name__} has no input embeddings, which accelerate's FSDP2 wants: train it by DDP"
        ) from error


def _refuse_other_parallelism(config: Any, names: tuple[str, ...]) -> None:
    """Raises `NotImplementedError` where several processes would have to draw the same items."""
    others = {name: getattr(config, name, None) or 1 for name in names}
    if max(others.values()) > 1:
        listed = ", ".join(f"{name}={size}" for name, size in others.items() if size > 1)
        raise NotImplementedError(f"{listed}: only data parallelism is supported, so that each process draws a share")


def _refuse_load_time_sharding(trainer: Trainer) -> None:
    model: Any = trainer.model
    config: Any = model.config.distributed_config
    _refuse_other_parallelism(config, ("tp_size", "pp_size", "ep_size"))
    copies, processes = getattr(config, "dp_size", config.fsdp_size), trainer.accelerator.num_processes
    if copies != processes:
        raise ValueError(f"fsdp_size * dp_replicate_size is {copies}, but there are {processes} processes")
    refuse_tied_shards(model)
    if trainer.args.load_best_model_at_end:
        raise NotImplementedError(
            "load_best_model_at_end with a model sharded at load time: Trainer loads whole tensors, which the shards "
            "do not take. Load the best checkpoint, or its ema/, by from_pretrained after training"
        )


def refuse_tied_shards(model: nn.Module) -> None:
    """Raises for weights tied over uneven shards in a model sharded at load time, which computes with old values.

    transformers (5.24) shards such a weight in both its places and ties the places afterwards. Where a shard is
    padded each place keeps its own padded copy, and the optimizer and the average write into one of them only: on
    the process with the short shard the other place still has the rows of the checkpoint.

    Args:
        model: before its first forward pass.

    Raises:
        ValueError: naming the weight.
    """
    inner: Any = unwrap(model)
    if getattr(getattr(inner, "config", None), "distributed_config", None) is None:
        return
    for entry in entries_of(inner):
        tensor = entry.tensor
        if not isinstance(tensor, DTensor) or len({id(slot.owner) for slot in entry.slots}) == 1:
            continue
        for number, placement in enumerate(tensor.placements):
            shards = tensor.device_mesh.size(number)
            if isinstance(placement, Shard) and tensor.shape[placement.dim] % shards:
                places = " and ".join(slot.name for slot in entry.slots)
                raise ValueError(
                    f"{places} are one weight of {tensor.shape[placement.dim]} rows in {shards} shards: of tied "
                    "weights that were sharded at load time into shards of unequal size, one place goes on with the "
                    "rows of the checkpoint on one process. Pad the rows before the model is saved and sharded "
                    f"(model.resize_token_embeddings(pad_to_multiple_of={shards})), use accelerate's FSDP2 on GPUs, "
                    "or DDP"
                )


def refuse_resume(trainer: Trainer, checkpoint: str | bool | None) -> None:
    """Raises where optimizer states cannot be restored, so that nothing goes on from weights alone without a word.

    Args:
        trainer: the trainer.
        checkpoint: what to resume, True for the last one; None or False for nothing.

    Raises:
        NotImplementedError: for a model sharded at load time.
    """
    if checkpoint and trainer.is_distributed_loading_by_transformers:
        raise NotImplementedError(
            "a run whose model was sharded at load time (DistributedConfig) cannot be resumed: Trainer neither saves "
            "nor loads the optimizer's shards. Train it in one go, with accelerate's FSDP2 on GPUs, or under DDP"
        )


def check_optimizer_state(trainer: Trainer, checkpoint: str | None) -> None:
    """Refuses a checkpoint that was written without optimizer state; under accelerate's FSDP2 it has other names.

    Args:
        trainer: the trainer.
        checkpoint: what to resume; None for nothing.

    Raises:
        ValueError: naming the checkpoint.
    """
    if checkpoint is None:
        return
    names = ("optimizer.bin", "optimizer_0") if trainer.is_fsdp_enabled else ("optimizer.pt",)
    if not any((Path(checkpoint) / name).exists() for name in names):
        raise ValueError(f"{checkpoint} holds no optimizer state (save_only_model?) and cannot be resumed")


def adds_adapters_to_shards(trainer: Trainer) -> bool:
    """Whether the model was sharded at load time and has adapters by transformers' own `add_adapter`."""
    model = trainer.model
    if model is None or not trainer.is_distributed_loading_by_transformers or is_peft_model(model):
        return False
    return bool(adapter_configs(model))


@contextlib.contextmanager
def saved_as_whole(model: Any) -> Iterator[dict[str, Tensor]]:
    """Inside, `save_pretrained` on one process writes the adapters added to a sharded base, which are whole there.

    By itself it waits for ever: PEFT, asked on the writing process alone, gathers the base's shards, which takes all
    processes. Past that it would write the gathered base under the adapter's file name.

    Args:
        model: as `adds_adapters_to_shards` tells.

    Yields:
        The `state_dict` to save: what is held whole.
    """
    config = model.config.distributed_config
    model.config.distributed_config = None
    try:
        yield {name: tensor for name, tensor in model.state_dict().items() if not isinstance(tensor, DTensor)}
    finally:
        model.config.distributed_config = config


def without_sync(
    accelerator: Accelerator, model: nn.Module, *, unless: bool
) -> contextlib.AbstractContextManager[None]:
    """Inside, unless told otherwise, backward passes add up gradients without communication.

    DDP gets `accelerator.no_sync`. FSDP2 keeps whole gradients on every process until the next pass outside, one copy
    of the model in the reduced dtype; `accelerator_config={"gradient_accumulation_kwargs": {"sync_each_batch": True}}`
    reduces them in every pass instead: slower, without that copy, equal to rounding.
    """
    if unless:
        return contextlib.nullcontext()
    inner = unwrap(model)
    if not isinstance(inner, FSDPModule):
        return accelerator.no_sync(model)
    if accelerator.gradient_state.plugin_kwargs.get("sync_each_batch", False):
        return contextlib.nullcontext()
    return _deferred(inner)


@contextlib.contextmanager
def _deferred(model: FSDPModule) -> Any:
    model.set_requires_gradient_sync(False)
    try:
        yield
    finally:
        model.set_requires_gradient_sync(True)


def _layer_drops(config: Any) -> list[tuple[str, float]]:
    """Layer-drop probabilities above 0 in a configuration and its parts, by name."""
    if not isinstance(config, PreTrainedConfig):
        return []
    names = ("layerdrop", "encoder_layerdrop", "decoder_layerdrop")
    found = [(name, float(getattr(config, name, 0.0) or 0.0)) for name in names]
    drops = [(name, value) for name, value in found if value > 0]
    for part in config.sub_configs:
        drops += [(f"{part}.{name}", value) for name, value in _layer_drops(getattr(config, part, None))]
    return drops
