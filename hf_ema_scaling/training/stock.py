"""What averages ask of a Trainer's loop, the stock one's above all: batch size, finite weights, what is refused."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.data import IterableDataset
from transformers import TrainerState, TrainingArguments

from hf_ema_scaling.ema.names import local_shard
from hf_ema_scaling.ema.sharding import is_flat_sharded, over_shards
from hf_ema_scaling.training.checks import batch_statistics_of
from hf_ema_scaling.training.optimizer_values import is_schedule_free
from hf_ema_scaling.training.sharded import FSDP1, ZERO_3, refuse_tied_shards


def loader_batch_size(loader: Any, world_size: int) -> int:
    """Samples that one batch of a prepared loader holds over all processes.

    Args:
        loader: A loader that `accelerator.prepare` returned.
        world_size: Number of processes.

    Raises:
        ValueError: The loader does not say.
    """
    size: Any = None
    try:
        if isinstance(getattr(loader, "dataset", None), IterableDataset):
            # accelerate's own total is that of one process, or missing, for iterable data.
            size = loader.batch_size * (1 if getattr(loader, "split_batches", False) else world_size)
        else:
            size = loader.total_batch_size
    except (AttributeError, TypeError):
        pass
    if not isinstance(size, int) or size < 1:
        raise ValueError(
            f"EMACallback cannot tell how many samples a batch of {type(loader).__name__} holds, and so not kappa: "
            "the loader must come from accelerator.prepare and have a fixed batch size (a batch sampler of one's own "
            "needs a batch_size attribute). For batches that change size use EMATrainer."
        )
    return size


def rows_of_a_batch(args: TrainingArguments, state: TrainerState, loader: Any) -> int:
    """Samples, over all processes, of one of the batches that an optimizer step accumulates.

    It is the loader's batch. TRL's trainers that generate (GRPO, RLOO, distillation) draw the rows of several such
    batches at once and take them apart; there it is the Trainer's batch size.

    Args:
        args: Trainer's arguments.
        state: Of the run that begins.
        loader: A loader that `accelerator.prepare` returned.

    Raises:
        ValueError: The loader does not say how many rows its batches have.
    """
    drawn = loader_batch_size(loader, args.world_size)
    if not any(kind.__module__.partition(".")[0] == "trl" for kind in type(args).__mro__):
        return drawn
    # A batch size that was searched for is in the state alone.
    per_process = state.train_batch_size if args.auto_find_batch_size else None
    rows = (per_process or args.train_batch_size) * args.world_size
    return rows if drawn % rows == 0 else drawn


@torch.no_grad()
def nonfinite_parameter(model: nn.Module) -> str | None:
    """Name of the first trainable parameter, or running statistic, with a NaN or an infinity, or None.

    Of shards, on any process.

    One multi-tensor reduction and one host synchronisation; the names are looked at only when something is wrong.
    """
    named = [(name, p.detach()) for name, p in model.named_parameters() if p.requires_grad and p.numel()]
    # A step that is skipped has no effect on parameters, but its forward passes have one on these.
    statistics = {id(buffer) for buffer in batch_statistics_of(model) if buffer.is_floating_point()}
    named += [(name, buffer) for name, buffer in model.named_buffers() if id(buffer) in statistics]
    # On a CPU the Euclidean norm takes a twentieth of the time of the largest magnitude, but overflows where a weight
    # is above 1e19: what it finds is looked at again.
    for order in (2.0, math.inf):
        finite = _finite_norms([p for _, p in named], order)
        if all(finite):
            return None
    return next(name for (name, _), good in zip(named, finite, strict=True) if not good)


def _finite_norms(parameters: list[Tensor], order: float) -> list[bool]:
    """Whether the norm of each tensor is finite, the same on every process; NaN is carried along by any norm."""
    if not parameters:
        return []
    # A process whose shard is empty has nothing to say about it: of nothing there is no largest magnitude.
    shards = [shard if shard.numel() else shard.new_zeros(1) for shard in map(local_shard, parameters)]
    alike: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for at, shard in enumerate(shards):
        alike.setdefault((shard.device, shard.dtype), []).append(at)
    finite = torch.empty(len(shards), dtype=torch.bool, device=shards[0].device)
    for (_, dtype), here in alike.items():
        # Half precision would overflow in the sum.
        wide = torch.promote_types(dtype, torch.float32)
        norms = torch.stack(torch._foreach_norm([shards[at] for at in here], order, wide))
        finite[here] = norms.isfinite().to(finite.device)
    if any(isinstance(p, DTensor) for p in parameters):
        # One process must not stop while the others wait for it.
        finite = over_shards((~finite).int(), parameters) == 0
    return [bool(good) for good in finite.tolist()]


def learns(optimizer: Any) -> bool:
    """Whether the step just made had a learning rate above 0."""
    # The scheduler moves after this hook, so these are the learning rates of the step just made.
    return optimizer is not None and any(float(group["lr"]) > 0 for group in optimizer.param_groups)


def refuse_unsupported(args: TrainingArguments, model: nn.Module, optimizer: Any = None) -> None:
    """Raises for optimizers and shardings that a callback cannot average, with the way out."""
    named = "schedule_free" in str(getattr(args.optim, "value", args.optim))
    if (named and optimizer is None) or is_schedule_free(optimizer):
        kind = type(getattr(optimizer, "optimizer", optimizer)).__name__
        raise ValueError(
            f"{f'optim={args.optim!r}' if named else kind} keeps an average of its own and swaps weights in "
            "evaluation; use either it or EMACallback, for example with optim='adamw_torch'."
        )
    if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        raise NotImplementedError(f"EMACallback cannot average here. {ZERO_3}, ZeRO-1 or 2, or DDP.")
    if is_flat_sharded(model):
        raise NotImplementedError(f"EMACallback cannot average here. {FSDP1}.")
    refuse_tied_shards(model)
