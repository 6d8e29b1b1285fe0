"""Start-up self-checks: bad targets, a dead average, and a gradient that depends on how a batch is split."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import Trainer

from hf_ema_scaling.data.collator import MicroBatch
from hf_ema_scaling.data.lengths import row_lengths
from hf_ema_scaling.data.stream import LABELLED
from hf_ema_scaling.ema import WeightAverage, check_moved, unwrap
from hf_ema_scaling.ema.adapters import has_adapters
from hf_ema_scaling.labels.ctc import blank_id, ctc_frame_lengths, frames_of, min_ctc_frames
from hf_ema_scaling.labels.decoder import bare, is_encoder_decoder, wraps_last_token
from hf_ema_scaling.training.optimizer_values import check_optim_args, is_schedule_free
from hf_ema_scaling.training.sharded import refuse_sharding

logger = logging.getLogger(__name__)

# Relative size of an update of the average that float32 shows beyond doubt in at least one weight.
VISIBLE = 1e-6


class LivenessWatch:
    """After three updates that moved weights, the average must have moved and must differ from the student.

    Updates too small for float32 to show (the first steps of a long warm-up) do not count.

    Args:
        average: the average as it is before the first update.
    """

    UPDATES = 3

    def __init__(self, average: WeightAverage) -> None:
        self.initial = average.fingerprint()
        self.seen = 0

    def after_update(self, model: nn.Module, average: WeightAverage, weight: float) -> bool:
        """Look at one update; True when the watch is over.

        Args:
            model: the student.
            average: its average.
            weight: weight of the student in the update just made.

        Raises:
            DeadTeacherError: the average did not move, or equals the student.
        """
        if weight * average.distance(model) < VISIBLE and not average.equals(model):
            return False
        self.seen += 1
        if self.seen < self.UPDATES:
            return False
        check_moved(model, average, self.initial)
        return True


def ctc_target_frames(labels: Tensor) -> Tensor:
    """Frames that CTC needs for each row of labels (padded with -100), tokens plus repeats; int64 `(rows,)`."""
    tokens = labels >= 0
    repeats = (labels[:, 1:] == labels[:, :-1]) & tokens[:, 1:]
    return tokens.sum(-1) + repeats.sum(-1)


def check_labelled(model: nn.Module, micro_batches: Iterable[MicroBatch], ctc: bool) -> None:
    """Refuses labelled micro-batches without labels, with `ctc` also what `check_ctc_targets` refuses, and for
    encoder-decoders what `check_decoder_targets` does.

    Raises:
        ValueError: naming the columns there are, or the row.
    """
    for micro_batch in micro_batches:
        if micro_batch["source"] != LABELLED:
            continue
        if "labels" not in micro_batch["inputs"]:
            raise ValueError(
                "the rows of train_dataset have no 'labels' after collating, only "
                f"{', '.join(micro_batch['inputs'])}: add that column, or pass the data as unlabeled_dataset"
            )
        if ctc:
            check_ctc_targets(model, micro_batch["inputs"], micro_batch["indices"])
        elif is_encoder_decoder(model):
            check_decoder_targets(model, micro_batch["inputs"], micro_batch["indices"])


def check_ctc_setup(model: nn.Module, processing_class: Any, data_collator: Any) -> None:
    """Refuses a CTC model whose blank is not its tokenizer's padding, or whose rows nobody can collate.

    Args:
        model: a CTC model, wrapped or not.
        processing_class: processor or tokenizer, if there is one.
        data_collator: the one given to the trainer, if any.

    Raises:
        ValueError: see above.
    """
    if processing_class is None:
        if data_collator is None:
            raise ValueError("a CTC model needs processing_class=processor (or a data_collator) to pad its rows")
        return
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    blank, padding = blank_id(model.config), getattr(tokenizer, "pad_token_id", None)
    if padding is not None and padding != blank:
        raise ValueError(
            f"the blank of the model is id {blank} (model.config.pad_token_id), the padding of the tokenizer id "
            f"{padding}: they must be one. Set model.config.pad_token_id = {padding} before training starts, or give "
            "the tokenizer the model was trained with"
        )


def check_ctc_targets(model: nn.Module, inputs: Mapping[str, Tensor], indices: list[int]) -> None:
    """Refuses labelled rows that CTC cannot learn: no tokens, or more than the model has frames for.

    Args:
        model: a CTC model, wrapped or not.
        inputs: collated rows with `labels`.
        indices: their row numbers in the labelled data set, for the message.

    Raises:
        ValueError: naming the first such row; also for tokens that are the blank or that the model has no output for.
    """
    labels = inputs["labels"]
    config: Any = unwrap(model).config
    size, blank = int(config.vocab_size), blank_id(config)
    strange = (((labels >= size) | (labels == blank)) & (labels >= 0)).nonzero().tolist()
    if strange:
        row, place = strange[0]
        what = "the blank, which is no target" if labels[row, place] == blank else f"outside the vocabulary of {size}"
        raise ValueError(
            f"labelled row {indices[row]} holds the token {int(labels[row, place])}, {what}: were the labels made by "
            "this model's tokenizer?"
        )
    needed = ctc_target_frames(labels)
    frames = ctc_frame_lengths(model, inputs).to(needed.device)
    bad = ((needed == 0) | (needed > frames)).nonzero().flatten().tolist()
    if bad:
        row = bad[0]
        problem = (
            "has no label tokens"
            if needed[row] == 0
            else f"needs {int(needed[row])} frames for its labels, but the model makes {int(frames[row])} of its audio"
        )
        raise ValueError(
            f"labelled row {indices[row]} {problem}: drop such rows before training, or use a model with less "
            "subsampling"
        )


def check_decoder_targets(model: nn.Module, inputs: Mapping[str, Tensor], indices: list[int]) -> None:
    """Refuses labelled rows that begin with the token that starts the decoder: it would read that token twice.

    Tokenizers of Whisper, Moonshine and SeamlessM4T write it, and generation, like the labelers, begins behind one.

    Args:
        model: an encoder-decoder, wrapped or not.
        inputs: collated rows with `labels`.
        indices: their row numbers in the labelled data set, for the message.

    Raises:
        ValueError: naming the first such row.
    """
    start = getattr(bare(model).config, "decoder_start_token_id", None)
    if start is None or wraps_last_token(model) or "decoder_input_ids" in inputs:
        return
    bad = (inputs["labels"][:, 0] == start).nonzero().flatten().tolist()
    if bad:
        raise ValueError(
            f"the labels of labelled row {indices[bad[0]]} begin with id {start}, with which the decoder starts by "
            "itself: it would see that token twice in training and once in generation. Leave out the first id of the "
            "labels"
        )


def fitting_rows(model: nn.Module, dataset: Dataset) -> list[int]:
    """Numbers of the rows whose labels fit the frames that the model makes of their audio.

    Args:
        model: a CTC model.
        dataset: rows with `labels` and `input_features` or `input_values`, as `prepare_ctc` makes them; without
            `labels` one frame is enough.
    """
    column = next(key for key in ("input_features", "input_values") if key in dataset.column_names)
    if "labels" in dataset.column_names:
        needed = [min_ctc_frames([int(token) for token in labels]) for labels in dataset["labels"]]
    else:
        needed = [1] * len(dataset)
    fits = frames_of(model, torch.from_numpy(row_lengths(dataset, column))) >= torch.tensor(needed)
    rows: list[int] = fits.nonzero().flatten().tolist()
    return rows


def drop_unfitting(model: nn.Module, dataset: Dataset, name: str) -> Dataset:
    """The `fitting_rows` of a data set; says how many do not fit.

    Raises:
        ValueError: when no row fits.
    """
    rows, total = fitting_rows(model, dataset), len(dataset)
    if not rows:
        raise ValueError(f"no row of {name} fits: the model makes fewer frames of each than its labels need")
    if len(rows) == total:
        return dataset
    dropped = total - len(rows)
    why = "their labels need more frames than there are" if "labels" in dataset.column_names else "they make no frame"
    logger.warning("dropped %d of %d rows of %s: %s", dropped, total, name, why)
    return dataset.select(rows)


def gradient_difference(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> float:
    """||first - second|| / ||first|| over all parameters, in float64."""
    difference = sum(float((first[name].double() - second[name].double()).square().sum()) for name in first)
    size = sum(float(value.double().square().sum()) for value in first.values())
    return (difference / size) ** 0.5 if size > 0 else float(difference > 0)


def nonfinite_gradient(norm: float, number: int, clock: float) -> FloatingPointError:
    """The error for a gradient norm that is not finite at optimizer step `number`, at `clock` reference steps."""
    return FloatingPointError(
        f"the gradient norm is {norm} at optimizer step {number} (reference step {clock:.1f}); weights and average "
        "are those of the step before. Look for corrupt inputs or too high a learning rate, or set on_nonfinite='skip'"
    )


def has_batch_statistics(model: nn.Module) -> bool:
    """Whether micro-batches leave a mark on the model: by BatchNorm, or running statistics of InstanceNorm."""
    return any(map(_has_statistics, model.modules()))


def _has_statistics(part: nn.Module) -> bool:
    normalises = isinstance(part, nn.modules.batchnorm._BatchNorm)
    return normalises or (isinstance(part, nn.modules.batchnorm._NormBase) and part.track_running_stats)


class frozen_statistics:
    """Inside the block BatchNorm and InstanceNorm neither use nor update statistics of the batch."""

    def __init__(self, model: nn.Module) -> None:
        self.parts = [part for part in model.modules() if _has_statistics(part) and part.training]

    def __enter__(self) -> None:
        for part in self.parts:
            part.eval()

    def __exit__(self, *error: object) -> None:
        for part in self.parts:
            part.train()


def batch_statistics_of(model: nn.Module) -> list[Tensor]:
    """The buffers of BatchNorm, and of InstanceNorm that has any: running means, variances and counts."""
    parts = (part for part in model.modules() if _has_statistics(part))
    return [buffer for part in parts for buffer in part.buffers(recurse=False)]


def share_statistics(model: nn.Module) -> None:
    """Gives every process the running statistics of process 0, the ones that are saved.

    `DistributedDataParallel` does so before a forward pass only: until then averages, evaluations and teachers would
    differ from process to process.
    """
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for buffer in batch_statistics_of(model):
        by_dtype.setdefault(buffer.dtype, []).append(buffer)
    for buffers in by_dtype.values():
        flat = torch.cat([buffer.flatten() for buffer in buffers])
        torch.distributed.broadcast(flat, src=0)
        for buffer, values in zip(buffers, flat.split([buffer.numel() for buffer in buffers]), strict=True):
            buffer.copy_(values.view_as(buffer))


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Copies of the gradients by parameter name; zeros where there is none."""
    return {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.detach().clone()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def refuse_unsupported(trainer: Trainer) -> None:
    """Raises for what the trainers of this library do not support, with the reason and the way out.

    Args:
        trainer: a trainer whose own constructor has run.

    Raises:
        ValueError, NotImplementedError: see above.
    """
    if trainer.compute_loss_func is not None:
        raise ValueError("compute_loss_func is not used here: pass example_loss, which returns one loss per row")
    if trainer.lr_scheduler is not None:
        raise ValueError("a scheduler cannot be passed: choose lr_scheduler_type, which runs on the reference clock")
    if trainer.optimizer_cls_and_kwargs is not None:
        raise ValueError("optimizer_cls_and_kwargs hide what there is to scale: pass optimizers=(optimizer, None)")
    if trainer.optimizer is not None and trainer.args.optim_args:
        raise ValueError(f"optim_args={trainer.args.optim_args!r} has no effect on the optimizer that was passed")
    if is_schedule_free(trainer.optimizer):
        raise ValueError(
            f"{type(trainer.optimizer).__name__} keeps an average of its own and swaps weights in evaluation: use "
            "another optimizer, for example optim='adamw_torch'"
        )
    check_optim_args(trainer.args)
    if str(getattr(trainer.args.train_sampling_strategy, "value", trainer.args.train_sampling_strategy)) != "random":
        raise ValueError(
            f"train_sampling_strategy={trainer.args.train_sampling_strategy} is not used: set bucket_window to put "
            "items of like length together"
        )
    if trainer.args.gradient_accumulation_steps != 1:  # accelerator_config can set it behind the arguments' back
        raise ValueError(
            f"gradient accumulation over {trainer.args.gradient_accumulation_steps} batches (accelerator_config): one "
            "dataloader batch is one optimizer step here; choose the batch by kappa, batch_size or batch_schedule"
        )
    for option in ("dispatch_batches", "split_batches"):
        if getattr(trainer.args.accelerator_config, option, None):
            raise ValueError(f"{option} (accelerator_config) would cut the steps up: leave it off")
    if isinstance(trainer.eval_dataset, dict):
        for name in trainer.eval_dataset:
            if name == "ema" or name.startswith("ema_"):
                raise ValueError(f"an evaluation set cannot be called {name!r}: eval_ema_* is the average")
    if trainer.args.dataloader_drop_last:
        raise ValueError("dataloader_drop_last does nothing here: batches straddle passes and nothing is dropped")
    if trainer.args.ddp_static_graph and trainer.accelerator.num_processes > 1:
        raise ValueError(
            "ddp_static_graph: micro-batches add up gradients without communication (no_sync), under which PyTorch's "
            "reducer fails by an internal assertion, and their number may change from step to step: leave it out"
        )
    scaled = trainer.args.fp16 or getattr(trainer.accelerator, "scaler", None) is not None
    if getattr(trainer.args, "ema_correction", "none") == "path" and scaled:
        raise ValueError(
            "ema_correction='path' moves the average before the optimizer step, and with fp16 that step may turn out "
            "to be skipped: use bf16, or ema_correction='none'"
        )
    model: Any = trainer.model
    if getattr(trainer.args, "ema_correction", "none") == "path" and has_adapters(model):
        raise NotImplementedError(
            "ema_correction='path' is not derived for adapters, whose average is bias-corrected: use 'none'"
        )
    if trainer.args.n_gpu > 1:
        raise NotImplementedError("DataParallel is not supported: start one process per GPU (accelerate launch)")
    refuse_sharding(trainer)
