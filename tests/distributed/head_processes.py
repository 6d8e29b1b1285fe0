"""What `test_heads.py` runs on two gloo processes; each process writes what it saw to `<folder>/<rank>.pt`."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import collapse_runs
import head_runs
import tiny
import tiny_generation
import torch

from hf_ema_scaling.labels import Labeler, LabelsByPosition, PseudoLabel, generative_labeler_for, labeler_for
from hf_ema_scaling.training import collapse_watch
from hf_ema_scaling.training.arguments import PseudoLabelArguments
from hf_ema_scaling.training.collapse import CollapseError
from hf_ema_scaling.training.seq2seq import PseudoLabelSeq2SeqTrainer
from hf_ema_scaling.training.trainer import PseudoLabelTrainer

FAMILIES = ("t5", "whisper", "gpt2", "bert")
SILENT_STEP = 2
"""Optimizer step at which process 1 keeps no label."""


class Noting:
    """Another labeler's labels, noted by position, but for positions that are dropped."""

    def __init__(self, labeler: Any, dropped: Collection[int] = ()) -> None:
        self.labeler, self.dropped = labeler, set(dropped)
        self.found: dict[int, tuple[int, ...]] = {}
        self.silent = False
        self.places: tuple[int, ...] = ()

    def at(self, positions: Sequence[int]) -> Labeler:
        self.places = tuple(positions)
        return self

    def label(self, teacher: Any, batch: Mapping[str, torch.Tensor]) -> list[PseudoLabel]:
        places, self.places = self.places, ()
        inner = self.labeler.at(places) if places and isinstance(self.labeler, LabelsByPosition) else self.labeler
        labels = inner.label(teacher, batch)
        if self.silent:
            self.dropped.update(places)
        self.found.update(zip(places, [label.ids for label in labels], strict=False))
        return [
            dataclasses.replace(label, reason="confidence") if place in self.dropped else label
            for label, place in zip(labels, places or [-1] * len(labels), strict=True)
        ]


class NotingTargets(Noting):
    def with_targets(self, inputs: Any, labels: Any) -> dict[str, torch.Tensor]:
        return self.labeler.with_targets(inputs, labels)


def trainer(folder: Path, family: str, *, rank: int | None = None, dropped: Collection[int] = ()) -> Any:
    """Two reference batches a step; sampled labels where they are generated."""
    # The random T5 has large weights: at a higher rate it makes much of the last digit within a few steps.
    rate = 1e-3 if family == "t5" else 1e-2
    values: dict[str, Any] = {"max_steps": 8, "kappa": 2.0, "per_device_train_batch_size": 2, "learning_rate": rate}
    values |= {"reference_batch_size": 8, "adam_epsilon": 1e-3, "logging_strategy": "steps", "logging_steps": 2}
    pseudo = PseudoLabelArguments(pl_start=2.0, unlabeled_ratio=3.0)
    if family == "bert":
        made: dict[str, Any] = head_runs.texts(folder, head_runs.classifier(), tiny.sentences(20), **values)
        model = made.pop("model")
        with torch.no_grad():
            model.classifier.weight.mul_(8.0)  # so that it says more than one class
        labeler: Any = labeler_for(model)
        made |= {"train_dataset": made.pop("train"), "pseudo_label_args": pseudo}
        kind: Any = PseudoLabelTrainer
    else:
        model = (
            tiny_generation.gpt2(5)
            if family == "gpt2"
            else head_runs.model_of(family, {"whisper": 0, "t5": 95}[family])
        )
        options = {"language": "fr"} if family == "whisper" else {}
        labeler = generative_labeler_for(model, max_new_tokens=12, temperature=1.0, **options)
        made = {
            "args": head_runs.arguments(folder, **values),
            "train_dataset": head_runs.rows_of(family, 20),
            "unlabeled_dataset": head_runs.rows_of(family, 22, 1, labels=False),
            "pseudo_label_args": pseudo,
            "data_collator": head_runs.collate,
        }
        kind = PseudoLabelTrainer if family == "gpt2" else PseudoLabelSeq2SeqTrainer
    noting = (NotingTargets if family in ("bert", "gpt2") else Noting)(labeler, dropped)
    recorder = tiny.Recorder()

    class Silenced(kind):  # type: ignore[misc]
        def label_micro_batches(self, inputs: Any) -> Any:
            noting.silent = rank == 1 and self.state.global_step == SILENT_STEP
            result = super().label_micro_batches(inputs)
            kept = [b["example_weights"].sum() for b in result if "example_weights" in b and b["weight"]]
            self.__dict__.setdefault("kept", []).append(int(sum(kept)))
            return result

    run = Silenced(model, callbacks=[recorder], labeler=noting, **made)
    run.noting, run.recorder, recorder.trainer = noting, recorder, run
    return run


def seen(made: Any) -> dict[str, Any]:
    return {
        "gradients": made.recorder.gradients,
        "weights": made.recorder.weights,
        "averages": made.recorder.averages,
        "found": made.noting.found,
        "dropped": sorted(made.noting.dropped),
        "kept": made.kept,
        "ledger": made.ledger.to_dict(),
        "logs": [
            {key: value for key, value in log.items() if key.startswith(("pseudo/", "student/", "gradient/"))}
            for log in made.state.log_history
            if "loss" in log
        ],
    }


def silent(folder: Path, silent: bool) -> list[Any]:
    """Alarms of a run of which this process drops every label, or none."""
    made = collapse_runs.trainer(
        folder,
        planted=False,
        pl={"on_collapse": "warn", "collapse_window": 1000.0},
        labeler=collapse_runs.Silent(silent),
        save_strategy="no",
    )
    collapse_watch.LABELLESS_ROWS = 100
    with contextlib.suppress(CollapseError):
        made.train()
    return list(made.collapse.guard.alarms)


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    results: dict[str, Any] = {}
    for family in FAMILIES:
        made = trainer(folder / family, family, rank=rank)
        made.train()
        results[family] = seen(made)
    results["both silent"] = silent(folder / "both", True)
    results["one silent"] = silent(folder / "one", rank == 0)
    torch.save(results, folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
