"""What `test_ddp.py` runs on two gloo processes; each process writes what it saw to `<folder>/<rank>.pt`."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import tiny
import torch

SCHEDULE = json.dumps([{"batch_size": 4, "until": 3}, {"batch_size": 8, "until": 8}, {"batch_size": 12}])
STEPS = 7
"""Steps end at 1, 2, 3, 5, 7, 8, 11 (and the run with them)."""


SIZES = json.dumps(
    [
        {"batch_size": 4, "until": 2},
        {"labelled": 4, "unlabelled": 4, "until": 6},
        {"labelled": 3, "unlabelled": 9, "until": 9},
        {"labelled": 4, "unlabelled": 8},
    ]
)
SIZES_END = [1.0, 2.0, 4.0, 6.0, 9.0, 12.0]


def dropped(number: int) -> bool:
    return number % 5 < 2


def seen(made: Any) -> dict[str, Any]:
    recorder = made.recorder
    return {
        "gradients": recorder.gradients,
        "weights": recorder.weights,
        "averages": recorder.averages,
        "buffers": {name: buffer.clone() for name, buffer in made.model.named_buffers() if "running" in name},
        "optimizer": recorder.after,
        "drawn": made.drawn,
        "rounds": made.rounds,
        "noise": (made._noise.last, made._noise.state_dict()),
        "history": [
            {k: v for k, v in entry.items() if not any(x in k for x in ("runtime", "per_second", "train_loss"))}
            for entry in made.state.log_history
        ],
    }


def split(folder: Path, family: str, micro: int, **changes: Any) -> Any:
    model, data = (tiny.bert(), tiny.sentences(40)) if family == "bert" else (tiny.wav2vec2(), tiny.speech(40))
    values = {"max_steps": 3, "reference_batch_size": 16, "adam_epsilon": 1e-3, "per_device_train_batch_size": micro}
    return tiny.trainer(model, tiny.arguments(folder, **(values | changes)), data)


def odd(folder: Path) -> Any:
    """Three items for two processes, one at a time: a place is filled by padding."""
    args = tiny.arguments(folder, reference_batch_size=3, per_device_train_batch_size=1, adam_epsilon=1e-3)
    return tiny.trainer(tiny.bert(), args, tiny.sentences(20))


def semi_supervised(folder: Path, labeler: Any) -> Any:
    return tiny.trainer(
        tiny.wav2vec2(),
        tiny.arguments(
            folder,
            max_steps=4,
            per_device_train_batch_size=2,
            adam_epsilon=1e-3,
            kappa=2.0,
            logging_strategy="steps",
            logging_steps=1,
        ),
        tiny.speech(20),
        unlabeled_dataset=tiny.speech(20, 1, labels=False),
        pseudo_label_args=tiny.pseudo(pl_start=1.0, unlabeled_ratio=1.5, unlabeled_weight=0.7),
        labeler=labeler,
    )


def batch_norm(folder: Path) -> Any:
    """Five items in micro-batches of two: three of them, so one process gets a padding one."""
    args = tiny.arguments(folder, max_steps=4, reference_batch_size=5, per_device_train_batch_size=2, kappa=2.0)
    return tiny.parakeet(), args, tiny.speech(20, features=8)


def resumable(folder: Path, family: str, init: int = 0) -> Any:
    args = tiny.arguments(
        folder,
        max_steps=11,
        batch_schedule=SCHEDULE,
        per_device_train_batch_size=2,
        lr_scheduler_type="cosine",
        max_grad_norm=1.0,
        logging_strategy="steps",
        logging_steps=2,
        eval_strategy="steps",
        eval_steps=6,
        save_strategy="steps",
        save_steps=3,
    )
    if family == "wav2vec2":
        model: Any = tiny.wav2vec2(dropout=0.1, layerdrop=0.2, masking=0.2, seed=init)
        return tiny.trainer(
            model, args, tiny.speech(18), eval_dataset={"a": tiny.speech(5, 5), "b": tiny.speech(4, 6)}
        )
    return tiny.trainer(
        tiny.parakeet(dropout=0.1, seed=init),
        args,
        tiny.speech(18, features=8),
        unlabeled_dataset=tiny.speech(15, 1, features=8, labels=False),
        pseudo_label_args=tiny.pseudo(pl_start=2.0, min_confidence=0.14),
        eval_dataset=tiny.speech(5, 5, features=8),
    )


def sized(folder: Path, *, init: int = 0, dropout: float = 0.1, label_batch_size: int | None = None) -> Any:
    """Labelled and unlabelled sizes of their own: 1 : 1 from step 2, 1 : 3 from 6, 1 : 2 from 9."""
    args = tiny.arguments(
        folder,
        max_steps=12,
        batch_schedule=SIZES,
        per_device_train_batch_size=2,
        adam_epsilon=1e-3,
        save_strategy="steps",
        save_steps=1,
    )
    return tiny.trainer(
        tiny.wav2vec2(dropout=dropout, seed=init),
        args,
        tiny.speech(18),
        unlabeled_dataset=tiny.speech(15, 1, labels=False),
        pseudo_label_args=tiny.pseudo(pl_start=2.0, label_batch_size=label_batch_size),
    )


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    results: dict[str, Any] = {}

    def train(name: str, made: Any, **more: Any) -> None:
        made.train(**more)
        results[name] = seen(made) | {"found": getattr(made, "found", [])}

    for family in ("bert", "wav2vec2"):
        made = split(folder / f"split-{family}", family, 4, save_strategy="steps", save_steps=1, noise_scale_every=1)
        train(f"split-{family}", made)
        results[f"split-{family}"]["evaluated"] = made.evaluate(
            {"a": tiny.sentences(6, 9)} if family == "bert" else {"a": tiny.speech(6, 9)}
        )
    train("odd", odd(folder))
    train("semi_supervised", semi_supervised(folder, tiny.ContentLabeler(dropped)))
    train("one_side", semi_supervised(folder, tiny.ContentLabeler(drop=lambda number: rank == 1)))
    results["batch_norm"] = seen(tiny.at_fixed_weights(*batch_norm(folder)))
    for family in ("wav2vec2", "parakeet"):
        train(f"whole-{family}", resumable(folder / f"whole-{family}", family))
        torch.manual_seed(99 + rank)
        made = resumable(folder / f"resumed-{family}", family, init=5)
        train(f"resumed-{family}", made, resume_from_checkpoint=str(folder / f"whole-{family}" / "checkpoint-5"))
    train("sized-whole", sized(folder / "sized-whole"))
    for stop in (3, 4, 5):
        torch.manual_seed(7 + rank)
        made = sized(folder / f"sized-{stop}", init=5)
        train(f"sized-{stop}", made, resume_from_checkpoint=str(folder / "sized-whole" / f"checkpoint-{stop}"))
    made = sized_alone(folder / "sized-teacher")
    labels_of, rows = made.labels_of, []

    def counted(batch: Any) -> Any:
        rows.append((made.state.global_step, len(batch["positions"])))
        return labels_of(batch)

    made.labels_of = counted
    train("sized-teacher", made)
    results["sized-teacher"]["rows"] = rows
    try:
        split(folder / "static", "bert", 4, ddp_static_graph=True)
        results["static"] = ""
    except ValueError as error:
        results["static"] = str(error)
    # Two continue what one began.
    for name, make in (("split", lambda place: split(place, "wav2vec2", 4)), ("sized", sized_alone)):
        torch.manual_seed(11 + rank)
        checkpoint = str(folder / f"one-{name}" / f"checkpoint-{ONE_STOPS[name]}")
        train(f"continued-{name}", make(folder / f"continued-{name}"), resume_from_checkpoint=checkpoint)
    torch.save(results, folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


ONE_STOPS = {"split": 1, "sized": 3}
"""Optimizer steps of the checkpoints in `one-split` and `one-sized`, which one process writes before two start."""


def sized_alone(folder: Path) -> Any:
    return labelling(sized(folder, dropout=0.0, label_batch_size=3))


def labelling(made: Any) -> Any:
    """The trainer, which notes in `found` the label of every position."""
    labels_of, made.found = made.labels_of, []

    def noted(batch: Any) -> Any:
        labels = labels_of(batch)
        made.found += [(p, list(label.ids)) for p, label in zip(batch["positions"], labels, strict=True)]
        return labels

    made.labels_of = noted
    return made


LONG = 200


def long(folder: Path, family: str) -> Any:
    """Two hundred steps with dropout, and BatchNorm in one of the families; small batches of uneven sizes."""
    values: dict[str, Any] = {
        "max_steps": LONG,
        "reference_batch_size": 5,
        "per_device_train_batch_size": 2,
        "learning_rate": 3e-3,
        "max_grad_norm": 1.0,
        "ema_momentum": 0.9,
    }
    if family == "bert":
        return tiny.trainer(tiny.bert(dropout=0.1), tiny.arguments(folder, **values), tiny.sentences(23))
    return labelling(
        tiny.trainer(
            tiny.parakeet(dropout=0.1),
            tiny.arguments(folder, **values),
            tiny.speech(13, features=8, lengths=(10, 20)),
            unlabeled_dataset=tiny.speech(11, 1, features=8, labels=False, lengths=(10, 20)),
            pseudo_label_args=tiny.pseudo(pl_start=10.0),
        )
    )


def main_long(folder: Path) -> None:
    torch.set_num_threads(1)
    results: dict[str, Any] = {}
    for family in ("bert", "parakeet"):
        made = long(folder / family, family)
        made.train()
        results[family] = {
            "student": {name: value.clone() for name, value in made.model.state_dict().items()},
            "average": tiny.average(made),
            "optimizer": made.recorder.after[-1],
            "start": made.recorder.initial,
            "rounds": made.rounds,
            "updates": made.average.num_updates,
            "found": getattr(made, "found", []),
        }
    torch.save(results, folder / f"{os.environ['RANK']}.pt")
    torch.distributed.destroy_process_group()


class BrokenOnOne(tiny.ContentLabeler):
    """Fails on the second process, in the third step."""

    trainer: Any

    def label(self, teacher: Any, batch: Any) -> Any:
        if os.environ["RANK"] == "1" and self.trainer.state.global_step == 2:
            raise RuntimeError("a labeler that fails")
        return super().label(teacher, batch)


def main_broken(folder: Path) -> None:
    torch.set_num_threads(1)
    labeler = BrokenOnOne()
    labeler.trainer = made = semi_supervised(folder, labeler)
    made.train()


if __name__ == "__main__":
    {"short": main, "long": main_long, "broken": main_broken}[sys.argv[2]](Path(sys.argv[1]))
