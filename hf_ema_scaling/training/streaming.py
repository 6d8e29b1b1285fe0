"""Streamed data in the trainers: what it cannot do, the loader over it, and where a checkpoint says that it stands."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from accelerate.data_loader import prepare_data_loader
from torch.utils.data import DataLoader
from transformers.utils import logging

from hf_ema_scaling.data.collator import TwoSourceDataset
from hf_ema_scaling.data.step_stream import StepCollator, StepStream
from hf_ema_scaling.data.stream import LABELLED, UNLABELLED
from hf_ema_scaling.data.streaming import StreamHead, StreamReader, is_stream, row_digest
from hf_ema_scaling.training.arguments import EMATrainingArguments, PseudoLabelArguments

if TYPE_CHECKING:
    from hf_ema_scaling.training.reference_run import ReferenceRun

logger = logging.get_logger(__name__)

FIRST_ROWS = 8
"""By which streams of several processes are compared: other orders may share the first row."""
NAMES = {LABELLED: "train_dataset", UNLABELLED: "unlabeled_dataset"}


@dataclass(frozen=True)
class Refusal:
    """Something that streams cannot do."""

    why: str
    """The value, the reason and the way out, as a sentence without its full stop."""
    write: Mapping[str, str] = field(default_factory=dict)
    """Arguments, and what to set them to instead."""
    error: type[Exception] = ValueError


def refuse(found: Sequence[Refusal], *, flags: bool = False) -> None:
    """Raises one error for everything that was found; nothing where there is nothing.

    Args:
        found: what is not possible.
        flags: whether arguments are written as on the command line of a recipe.

    Raises:
        ValueError, NotImplementedError: that which a single refusal asks for, ValueError for several.
    """
    if not found:
        return
    if len(found) == 1:
        raise found[0].error(found[0].why)
    settings = {name: value for one in found for name, value in one.write.items()}
    written = (
        " ".join(f"--{k} {v}" for k, v in settings.items())
        if flags
        else ", ".join(f"{k}={'None' if v == 'null' else v}" for k, v in settings.items())
    )
    listed = "".join(f"\n  - {one.why}" for one in found)
    raise ValueError(f"{len(found)} settings do not go with streams:{listed}\nIn their place write: {written}")


def refuse_streams(
    args: EMATrainingArguments, labelled: Any, unlabelled: Any, pseudo: PseudoLabelArguments | None, world_size: int
) -> None:
    """Refuses what needs lengths, sizes or random access where a data set is a stream, all of it at once.

    Raises:
        ValueError, NotImplementedError: with the reasons and the way out.
    """
    streams = {NAMES[kind]: data for kind, data in ((LABELLED, labelled), (UNLABELLED, unlabelled)) if is_stream(data)}
    refuse(stream_refusals(args, pseudo, tuple(streams)))
    if world_size > 1:
        split = [name for name, data in streams.items() if getattr(data, "_distributed", None) is not None]
        if split:
            raise ValueError(
                f"{split[0]} is split by node already: pass the whole stream, the trainer splits it over the "
                f"{world_size} processes"
            )


def stream_refusals(
    args: EMATrainingArguments, pseudo: PseudoLabelArguments | None, streams: Sequence[str]
) -> list[Refusal]:
    """What arguments ask for that streams cannot do.

    Args:
        args: of the run.
        pseudo: of its pseudo-labels, where there are any.
        streams: which data sets are streams, by the trainer's name for them.
    """
    if not streams:
        return []
    listed, found = " and ".join(streams), []
    if args.batch_unit != "samples":
        found.append(
            Refusal(
                f"batch_unit={args.batch_unit} needs the size of every row before the run, and {listed} is a stream: "
                "use batch_unit=samples, with reference_batch_size in rows, or a map-style data set",
                {"batch_unit": "samples", "reference_batch_size": "ROWS"},
            )
        )
    if args.bucket_window:
        found.append(
            Refusal(
                f"bucket_window={args.bucket_window} needs the lengths of all rows, and {listed} is a stream: set it "
                "to 0 (rows are sorted by length inside a step all the same), or use a map-style data set",
                {"bucket_window": "0"},
            )
        )
    if args.dataloader_num_workers:
        found.append(
            Refusal(
                f"dataloader_num_workers={args.dataloader_num_workers}: workers of a loader shard and shuffle a "
                f"stream by their own number, so the order of {listed} would depend on them: set it to 0",
                {"dataloader_num_workers": "0"},
                NotImplementedError,
            )
        )
    if pseudo is not None:
        found += _of_pseudo_labels(pseudo, streams)
    return [*found, *_passes(args)] if NAMES[LABELLED] in streams else found


def _of_pseudo_labels(pseudo: PseudoLabelArguments, streams: Sequence[str]) -> list[Refusal]:
    listed, found = " and ".join(streams), []
    for name in ("cache_steps", "cache_half_lives"):
        if value := getattr(pseudo, name):
            off = {"cache_steps": "0", "cache_half_lives": "null"}[name]
            found.append(
                Refusal(
                    f"{name}={value:g}: a cache draws the same row several times, and {listed} is a stream: set it to "
                    f"{'None' if off == 'null' else off} for labels that are made as rows are drawn, or use map-style "
                    "data sets",
                    {name: off},
                    NotImplementedError,
                )
            )
    if pseudo.source_column is not None and NAMES[UNLABELLED] in streams:
        found.append(
            Refusal(
                f"source_column={pseudo.source_column!r} needs all rows at the start, and unlabeled_dataset is a "
                "stream: give a map-style data set, or leave it out",
                {"source_column": "null"},
            )
        )
    if pseudo.hidden_reference_column is not None and NAMES[UNLABELLED] in streams:
        found.append(
            Refusal(
                f"hidden_reference_column={pseudo.hidden_reference_column!r} is taken out of all rows at the start, "
                "and unlabeled_dataset is a stream: give a map-style data set, or leave it out",
                {"hidden_reference_column": "null"},
                TypeError,
            )
        )
    if pseudo.calibration_rows and NAMES[LABELLED] in streams:
        found.append(
            Refusal(
                f"calibration_rows={pseudo.calibration_rows} asks for the same labelled rows again and again, which a "
                "stream cannot give: leave it at 0, or use a map-style train_dataset",
                {"calibration_rows": "0"},
            )
        )
    return found


def _passes(args: EMATrainingArguments) -> list[Refusal]:
    """What counts passes over a labelled set whose length nobody knows."""
    found = []
    if args.max_steps <= 0:
        found.append(
            Refusal(
                f"num_train_epochs={args.num_train_epochs:g} counts passes, and train_dataset is a stream, whose "
                "length is not known: give max_steps, in reference steps",
                {"max_steps": "STEPS"},
            )
        )
    for name in ("eval_strategy", "save_strategy", "logging_strategy"):
        strategy = getattr(args, name)
        if str(getattr(strategy, "value", strategy)) == "epoch":
            steps = f"{name.removesuffix('strategy')}steps"
            found.append(
                Refusal(
                    f"{name}=epoch waits for the end of a pass, and train_dataset is a stream, whose length is not "
                    f"known: use 'steps' with {steps}",
                    {name: "steps", steps: "STEPS"},
                )
            )
    if args.ema_epoch_weight is not None:
        found.append(
            Refusal(
                f"ema_epoch_weight={args.ema_epoch_weight} is the weight after a pass, and train_dataset is a stream, "
                "whose length is not known: give ema_momentum or ema_half_life",
                {"ema_epoch_weight": "null", "ema_momentum": "MOMENTUM"},
            )
        )
    if any(stage.unit == "epochs" for stage in args.schedule(small_batch_until=0.0).stages):
        found.append(
            Refusal(
                "until_epochs counts passes, and train_dataset is a stream, whose length is not known: end stages by "
                "until or until_fraction",
                {"batch_schedule": "STAGES"},
            )
        )
    return found


def stream_loader(trainer: ReferenceRun, rows: TwoSourceDataset) -> DataLoader[Any] | None:
    """The loader of a run with streamed data, at the place of the checkpoint that it resumes; None without streams."""
    unlabelled, _ = trainer.unlabelled_data()
    streams = {
        kind: data for kind, data in ((LABELLED, trainer.train_dataset), (UNLABELLED, unlabelled)) if is_stream(data)
    }
    if not streams:
        return None
    sampler, accelerator, resumed = trainer.sampler, trainer.accelerator, trainer._resumed
    _refuse_different(accelerator, streams)
    rank, processes = accelerator.process_index, accelerator.num_processes
    saved = None
    if resumed is not None and resumed.checkpoint is not None and resumed.global_step:
        saved = read_places(resumed.checkpoint, rank, processes, sampler.by_rank & streams.keys())
    first = 0 if resumed is None else resumed.global_step

    def open_readers() -> dict[int, StreamReader]:
        readers = {}
        for kind, data in streams.items():
            share = (rank, processes) if kind in sampler.by_rank else None
            readers[kind] = StreamReader(data, NAMES[kind], share)
            drawn = sampler.drawn_of(kind, first - 1)[1] if first else 0
            place = None if saved is None else saved["sources"].get(str(kind))
            if place is not None and place["drawn"] == drawn:
                readers[kind].resume(place)
            elif drawn:
                logger.warning(
                    f"The checkpoint does not say where {NAMES[kind]} stands after {drawn} rows: reading them again."
                )
                readers[kind].skip(drawn if share is None else len(range(rank, drawn, processes)))
        return readers

    steps = StepStream(
        sampler,
        rows,
        open_readers,
        rank=rank,
        first_step=first,
        length_columns=(trainer.args.duration_column, trainer.args.length_column_name),
    )
    loader: DataLoader[Any] = DataLoader(
        steps,
        batch_size=None,
        collate_fn=StepCollator(trainer.data_collator),  # type: ignore[arg-type]  # given one item, not a list
        pin_memory=trainer.args.dataloader_pin_memory,
    )
    # As if alone: what each process draws is split already.
    prepared: DataLoader[Any] = prepare_data_loader(
        loader, num_processes=1, process_index=0, put_on_device=False, dispatch_batches=False
    )
    return prepared


def _refuse_different(accelerator: Accelerator, streams: Mapping[int, Any]) -> None:
    """Refuses streams that are not the same on all processes, which would share out something else on each."""
    if accelerator.num_processes == 1:
        return
    for kind, data in streams.items():
        head = StreamHead(data, NAMES[kind])
        rows = [head[number] for number in range(head.at_most(FIRST_ROWS))]
        mine = torch.tensor([row_digest(rows)], device=accelerator.device)
        if len(set(accelerator.gather(mine).tolist())) > 1:
            raise ValueError(
                f"{NAMES[kind]} begins with other rows on each process, so shares of it would overlap: give every "
                "shuffle a fixed seed, and do not split the stream by rank yourself"
            )


def places_file(checkpoint: str | Path, rank: int) -> Path:
    """Where the places of a process are."""
    return Path(checkpoint) / f"stream_state_{rank}.json"


def save_places(places: str | None, checkpoint: str | Path, rank: int) -> None:
    """Write the places that came with the last step; nothing where no step was taken, or nothing is streamed."""
    if places is not None:
        Path(checkpoint).mkdir(parents=True, exist_ok=True)
        places_file(checkpoint, rank).write_text(places + "\n", encoding="utf-8")


def read_places(
    checkpoint: str | Path, rank: int, processes: int, by_rank: frozenset[int]
) -> Mapping[str, Any] | None:
    """The places of a process in a checkpoint; None where they are not there.

    Args:
        checkpoint: the folder.
        rank: of this process.
        processes: their number.
        by_rank: streamed sources of which each process reads shards of its own.

    Raises:
        ValueError: where the number of processes changed and rows are bound to processes.
    """
    # Where all read every row, all stand at the same place: the file of process 0 serves any number of them.
    path = places_file(checkpoint, 0)
    if not path.is_file():
        return None
    places: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    bound = sorted({*places["by_rank"], *by_rank})
    if not bound:
        return places
    if places["processes"] != processes or places["by_rank"] != sorted(by_rank):
        then, now = ([NAMES[kind] for kind in kinds] for kinds in (places["by_rank"], sorted(by_rank)))
        raise ValueError(
            f"{checkpoint} was written by {places['processes']} processes (with shards of their own of: "
            f"{', '.join(then) or 'nothing'}), and this run has {processes} (of: {', '.join(now) or 'nothing'}). "
            f"Which rows of {NAMES[bound[0]]} were seen depends on both: resume with {places['processes']} processes "
            "and the same shards. (A stream whose number of shards is no multiple of the number of processes may move)"
        )
    path = places_file(checkpoint, rank)
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
