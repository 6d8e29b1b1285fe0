"""From arguments and data sets to the run: its plan, its stream of items, and the sampler that cuts it into steps."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from datasets import Dataset
from numpy.typing import NDArray

from hf_ema_scaling.data.lengths import holds_zeros, row_lengths
from hf_ema_scaling.data.sampler import ScheduledBatchSampler
from hf_ema_scaling.data.stream import LABELLED, UNLABELLED, DataSource, ReferenceStream
from hf_ema_scaling.data.streaming import is_stream, split_by_shards
from hf_ema_scaling.scaling import (
    OptimizerValues,
    Recipe,
    ScalingPlan,
    StepBorders,
    half_life_from_momentum,
    known_rule,
)
from hf_ema_scaling.scaling.momentum_schedule import MomentumScheduleKind
from hf_ema_scaling.scaling.plan import Correction
from hf_ema_scaling.scaling.recipe import Unit
from hf_ema_scaling.training.arguments import EMATrainingArguments, PseudoLabelArguments
from hf_ema_scaling.training.optimizer_values import hyper_parameters, stated_values
from hf_ema_scaling.training.run_state import RunState
from hf_ema_scaling.training.scheduler import lr_multiplier
from hf_ema_scaling.training.streaming import refuse_streams


@dataclass(frozen=True)
class RunLayout:
    """Everything about a run that is known before its first step."""

    plan: ScalingPlan
    sampler: ScheduledBatchSampler
    identity: dict[str, Any]
    """What a resumed run must share with its checkpoint for data order and clock to continue."""

    @property
    def stream(self) -> ReferenceStream:
        """The items of the run in order."""
        return self.sampler.stream

    def warnings(self) -> list[str]:
        """What the plan warns of, and where the data makes another run of it."""
        planned, run = len(self.plan), self.sampler.num_steps
        found = self.plan.warnings()
        if planned != run:
            found.append(
                f"the run takes {run} optimizer steps and not the {planned} of its plan, in which every step has the "
                "same batch: some batches are smaller than the longest items, and a step that draws none is no step. "
                "It sees the same data; for even steps choose a larger batch, or drop the longest items"
            )
        return found


def lay_out(
    args: EMATrainingArguments,
    labelled: Any,
    *,
    optimizer: str,
    given: OptimizerValues | None = None,
    unlabelled: Any | None = None,
    pseudo: PseudoLabelArguments | None = None,
    world_size: int = 1,
    batch_statistics: bool = False,
    resumed: RunState | None = None,
) -> RunLayout:
    """Lay out a run.

    Args:
        args: the run's arguments.
        labelled: map-style labelled data set, or a stream.
        optimizer: name of the optimizer's family, for the scaling rule.
        given: values of the optimizer that was passed to the trainer, in the place of those in `args`.
        unlabelled: map-style unlabelled data set, or a stream, with `pseudo`.
        pseudo: when unlabelled items begin, and how many.
        world_size: number of processes.
        batch_statistics: whether the model has BatchNorm, or keeps other running statistics.
        resumed: the checkpoint to continue; its steps stay as they were.

    Raises:
        ValueError: for schedules, sizes or starts that do not fit, with the offending value; for a checkpoint of
            other data or another reference recipe; for what streams cannot do.
    """
    refuse_streams(args, labelled, unlabelled, pseudo, world_size)
    batch = args.reference_batch_size
    assert batch is not None
    first = (
        _stream_source(args.max_steps * batch) if is_stream(labelled) else data_source(labelled, args, "train_dataset")
    )
    plan = plan_of(
        args,
        optimizer=optimizer,
        given=given,
        pseudo=pseudo,
        steps_per_epoch=None if first.in_order else float(first.units.sum()) / batch,
        done=None if resumed is None else resumed.done,
    )
    second = None
    if unlabelled is not None:
        streamed, units = is_stream(unlabelled), plan.recipe.max_steps * batch
        second = _stream_source(units) if streamed else data_source(unlabelled, args, "unlabeled_dataset")
    pl_start, cache_steps = plan.recipe.pl_start, plan.recipe.cache_steps
    seed = args.seed if args.data_seed is None else args.data_seed
    identity = {
        "reference_batch_size": batch,
        "batch_unit": args.batch_unit,
        "optimizer": (known_rule(optimizer) or plan.rule).name,
        "scaling_rule": plan.rule.name,
        "seed": seed,
        "bucket_window": args.bucket_window or 0,
        "pl_start": pl_start,
        "unlabelled_ratios": [list(piece) for piece in plan.unlabelled_ratios],
        "labelled_items": _items(first),
        "unlabelled_items": 0 if second is None else _items(second),
        "labelled_sizes": _checksum(first),
        "unlabelled_sizes": None if second is None else _checksum(second),
        "cache": None if pseudo is None or not cache_steps else [cache_steps, pseudo.cache_refresh],
    }
    if resumed is not None:
        resumed.check_identity(identity)
    (_, ratio), *changes = plan.unlabelled_ratios or ((0.0, 1.0),)
    stream = ReferenceStream(
        first,
        reference_batch_size=batch,
        reference_steps=int(plan.recipe.max_steps),
        unlabelled=second,
        pl_start=pl_start or 0.0,
        unlabelled_ratio=ratio,
        ratio_changes=changes,
        seed=seed,
        bucket_window=args.bucket_window or 0,
        cache_steps=cache_steps,
        cache_refresh=1.0 if pseudo is None else pseudo.cache_refresh,
    )
    sampler = ScheduledBatchSampler(
        stream,
        plan.step_borders,
        micro_batch_size=args.per_device_train_batch_size,
        world_size=world_size,
        batch_statistics=batch_statistics,
        halve_every=args.noise_scale_every,
        label_batch_size=None if pseudo is None else pseudo.label_batch_size,
        by_rank=[
            kind
            for kind, data in ((LABELLED, labelled), (UNLABELLED, unlabelled))
            if split_by_shards(data, world_size)
        ],
    )
    return RunLayout(plan, sampler, identity)


def plan_of(
    args: EMATrainingArguments,
    *,
    optimizer: str,
    given: OptimizerValues | None = None,
    pseudo: PseudoLabelArguments | None = None,
    steps_per_epoch: float | None = None,
    done: StepBorders | None = None,
) -> ScalingPlan:
    """The plan of a run, which needs no data but the length of a pass over it.

    Args:
        args: the run's arguments.
        optimizer: name of the optimizer's family, for the scaling rule.
        given: values of the optimizer that was passed to the trainer, in the place of those in `args`.
        pseudo: when unlabelled items begin, and how many.
        steps_per_epoch: reference steps in one pass over the labelled set; None where it is not known.
        done: steps already run, when resuming.

    Raises:
        ValueError: for schedules, sizes or starts that do not fit, with the offending value; without
            `steps_per_epoch`, for arguments that count epochs.
    """
    batch = args.reference_batch_size
    assert batch is not None
    pl_start = None if pseudo is None else float(pseudo.pl_start)
    schedule = args.schedule(small_batch_until=pl_start or 0.0)
    by_epochs = any(stage.unit == "epochs" for stage in schedule.stages)
    if pseudo is not None and by_epochs:
        raise ValueError("until_epochs is ambiguous with unlabelled data: end stages by until or until_fraction")
    if steps_per_epoch is None and (args.max_steps <= 0 or args.ema_epoch_weight is not None or by_epochs):
        counted = "max_steps" if args.max_steps <= 0 else "until_epochs" if by_epochs else "ema_epoch_weight"
        raise ValueError(
            f"{counted} counts epochs of the labelled set, whose length is not known here: give "
            "max_steps, or steps_per_epoch (the reference steps in a pass over it)"
        )
    if args.max_steps <= 0 and any(stage.sources for stage in schedule.stages):
        raise ValueError(
            "max_steps is needed where a stage states labelled and unlabelled sizes: passes over the labelled set "
            f"(num_train_epochs={args.num_train_epochs:g}) then take longer in some stages than in others"
        )
    ratio = 0.0 if pseudo is None else pseudo.unlabeled_ratio
    if args.max_steps > 0:
        reference_steps = args.max_steps
    else:
        # A pass over the labelled set takes (1 + ratio) times the clock once unlabelled items share the batches.
        supervised = (steps_per_epoch or 0.0) * args.num_train_epochs
        reference_steps = int(np.ceil(supervised + ratio * max(0.0, supervised - (pl_start or 0.0))))
    # A pass over the labelled set is longer where unlabelled data shares the batches, and there momentum matters.
    momentum = args.momentum((steps_per_epoch or 1.0) * (1.0 + ratio))
    values = given or stated_values(args, optimizer, hyper_parameters(optimizer, args.scaling_rule))
    recipe = Recipe(
        reference_batch_size=batch,
        unit=cast(Unit, args.batch_unit),
        max_steps=reference_steps,
        learning_rate=values.learning_rate,
        ema_momentum=momentum,
        optimizer=optimizer,
        weight_decay=values.weight_decay,
        betas=values.betas or (0.0, 0.0),
        eps=values.eps or 0.0,
        sgd_momentum=values.momentum or 0.0,
        alpha=values.alpha or 0.0,
        max_grad_norm=args.max_grad_norm or None,
        warmup_steps=args.get_warmup_steps(reference_steps),
        ema_start=args.ema_start,
        momentum_schedule=cast(MomentumScheduleKind, args.ema_momentum_schedule),
        pl_start=pl_start,
        unlabelled_ratio=ratio or 1.0,
        steps_per_epoch=steps_per_epoch if pseudo is None else None,
        pl_ramp=0.0 if pseudo is None else pseudo.pl_ramp,
        cache_steps=0.0 if pseudo is None else pseudo.cache_length(half_life_from_momentum(momentum, 1.0)),
        augment_start=args.augment_start,
    )
    return ScalingPlan(
        recipe,
        schedule,
        lr_multiplier=lr_multiplier(
            str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)),
            learning_rate=values.learning_rate,
            warmup_steps=args.get_warmup_steps(reference_steps),
            reference_steps=reference_steps,
            specific=cast("dict[str, Any] | None", args.lr_scheduler_kwargs),
        ),
        scaling_rule=None if args.scaling_rule == "auto" else args.scaling_rule,
        scale_ema=args.scale_ema,
        ema_update_every=args.ema_update_every,
        ema_correction=cast(Correction, args.ema_correction),
        ema_dtype=args.ema_dtype,
        done=done,
    )


def data_source(dataset: Any, args: EMATrainingArguments, name: str) -> DataSource:
    """The sizes of a map-style data set.

    Units are samples, the durations in `args.duration_column`, or the tokens that `token_counts` finds; seconds and
    tokens are lengths for bucketing, too. In samples, lengths come from `args.duration_column` or
    `args.length_column_name`, where the data set has one of them.

    Raises:
        TypeError: for data without a length.
        ValueError: for an empty data set, a missing column, or sizes that are not above 0.
    """
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        raise TypeError(f"{name} must be a map-style data set with a length, got {type(dataset).__name__}")
    if len(dataset) == 0:
        raise ValueError(f"{name} is empty")
    if args.batch_unit == "tokens":
        tokens = token_counts(dataset, args.length_column_name, name)
        return DataSource(tokens, tokens)
    columns: list[str] = list(getattr(dataset, "column_names", None) or [])
    durations = _column(dataset, args.duration_column) if args.duration_column in columns else None
    if args.batch_unit == "seconds":
        if durations is None:
            raise ValueError(
                f"batch_unit=seconds needs the column '{args.duration_column}' (seconds of audio) in {name}; it has "
                f"{columns}: add it, or name another by duration_column"
            )
        return DataSource(durations, durations)
    lengths = durations
    if lengths is None and args.length_column_name in columns:
        lengths = _column(dataset, args.length_column_name)
    if args.bucket_window and lengths is None:
        raise ValueError(
            f"bucket_window={args.bucket_window} needs lengths: {name} has neither '{args.duration_column}' nor "
            f"'{args.length_column_name}' among its columns {columns}"
        )
    return DataSource.of_samples(len(dataset), lengths)


def token_counts(dataset: Any, length_column: str, name: str) -> NDArray[np.float64]:
    """Tokens of each row of a map-style data set: `length_column` where it has it, else the lengths of `input_ids`.

    Tokens are those of the input, special tokens included, before padding and augmentation; labels of a
    sequence-to-sequence model do not count. Of an Arrow data set only offsets are read; of others every row, once.

    Raises:
        ValueError: for rows with neither, and for rows that are padded already.
    """
    stored = isinstance(dataset, Dataset)
    first = {} if stored else dataset[0]
    columns = dataset.column_names if stored else sorted(first) if isinstance(first, Mapping) else []
    if length_column in columns:
        rows = dataset[length_column][:] if stored else [dataset[i][length_column] for i in range(len(dataset))]
        return np.asarray(rows, dtype=np.float64)
    if "input_ids" not in columns:
        raise ValueError(
            f"batch_unit=tokens needs the column '{length_column}' (tokens of each row) or 'input_ids' in {name}; it "
            f"has {columns}: tokenise it first, or name the column with the number of tokens by length_column_name"
        )
    masked = "attention_mask" in columns
    if stored:
        tokens = row_lengths(dataset, "input_ids")
        padded = masked and holds_zeros(dataset, "attention_mask")
    else:
        rows = [dataset[i] for i in range(len(dataset))]
        tokens = np.array([len(row["input_ids"]) for row in rows])
        padded = masked and any(not value for row in rows for value in row["attention_mask"])
    if padded:
        raise ValueError(
            f"rows of {name} are padded (zeros in attention_mask), and padding is no token: leave it to the collator, "
            f"or give the tokens of each row in a column '{length_column}'"
        )
    return tokens.astype(np.float64)


def _stream_source(units: float) -> DataSource:
    """The rows of a stream that a run of so many samples can draw; its interleaving looks one ahead."""
    return DataSource.of_stream(int(np.ceil(units)) + 2)


def _items(source: DataSource) -> int | str:
    return "a stream" if source.in_order else len(source)


def _checksum(source: DataSource) -> str:
    """Of all that the order of a source depends on."""
    if source.in_order:
        return "a stream"
    lengths = b"" if source.lengths is None else np.ascontiguousarray(source.lengths).tobytes()
    return f"{zlib.crc32(np.ascontiguousarray(source.units).tobytes() + lengths):08x}"


def _column(dataset: Any, name: str) -> NDArray[np.float64]:
    return np.asarray(dataset[name][:], dtype=np.float64)
