"""What `test_label_cache.py` runs on two gloo processes; each process writes what it saw to `<folder>/<rank>.pt`."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import tiny
import torch
from torch import Tensor

from hf_ema_scaling.labels import PseudoLabel


class StepLabeler:
    """Labels that say in which optimizer step they were made and of what, so that an old one is not like a new one."""

    trainer: Any

    def __init__(self) -> None:
        self.rows: list[tuple[int, int]] = []

    def label(self, teacher: Callable[..., Any], batch: Mapping[str, Tensor]) -> list[PseudoLabel]:
        step = self.trainer.state.global_step
        self.rows.append((step, len(batch["input_values"])))
        labels = []
        for row in batch["input_values"]:
            content = int(abs(float(row[0])) * 1000)
            # Sums of such confidences are exact, in any order.
            ids = tuple(1 + (number // 7**place) % 7 for number in (step, content) for place in range(3))
            reason = "confidence" if content % 5 == 0 else None
            labels.append(PseudoLabel(ids[: 4 + content % 3], content / 2**13, reason))
        return labels


def cached(folder: Path, **changes: Any) -> Any:
    """Six unlabelled items in eight; one in three leaves the pool, which is two reference steps long."""
    labeler = StepLabeler()
    values = {"max_steps": 14, "reference_batch_size": 8, "kappa": 2.0, "adam_epsilon": 1e-3, "learning_rate": 3e-3}
    made = tiny.trainer(
        tiny.wav2vec2(),
        tiny.arguments(
            folder,
            **(values | {"per_device_train_batch_size": 3, "save_strategy": "steps", "save_steps": 1} | changes),
            logging_strategy="steps",
            logging_steps=2,
        ),
        tiny.speech(20),
        unlabeled_dataset=tiny.speech(20, 1, labels=False),
        pseudo_label_args=tiny.pseudo(
            pl_start=2.0, unlabeled_ratio=3.0, cache_steps=2.0, cache_refresh=0.3, pl_ramp=5.0
        ),
        labeler=labeler,
    )
    labeler.trainer = made
    return made


def seen(made: Any) -> dict[str, Any]:
    cache = made.cached_labels.cache
    return {
        "gradients": made.recorder.gradients,
        "averages": made.recorder.averages,
        "drawn": made.drawn,
        "rows": made.labeler.rows,
        "cache": [cache.get(slot, int(row)).ids for slot, row in enumerate(cache.rows) if row >= 0],
        "history": [
            {key: value for key, value in entry.items() if key.startswith(("cache/", "pseudo/", "pl/"))}
            for entry in made.state.log_history
        ],
    }


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    whole = cached(folder / "whole")
    whole.train()
    resumed = cached(folder / "resumed")
    resumed.train(resume_from_checkpoint=str(folder / "whole" / "checkpoint-5"))
    torch.save({"whole": seen(whole), "resumed": seen(resumed)}, folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
