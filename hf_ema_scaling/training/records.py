"""What a run writes down of itself: `scaling_plan.json`, `run.json` and `metrics.json`."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging

from hf_ema_scaling.hub.run_folder import LEDGER_NAME, METRICS_NAME, PLAN_NAME, RECORD_NAME
from hf_ema_scaling.training.run_record import own_record
from hf_ema_scaling.training.tracking import scalar_logs

if TYPE_CHECKING:
    from hf_ema_scaling.training.saved_run import SavedRun

logger = logging.get_logger(__name__)


class KeepRecords(TrainerCallback):
    """Writes a trainer's records into `output_dir`: plan and start as training begins, metrics as they come.

    So a run that was killed has a plan, and its checkpoints too; and an evaluation after training is in `metrics.json`
    whether it comes before or after `save_model`.
    """

    def __init__(self, trainer: SavedRun) -> None:
        self.trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The plan, and how the run was started."""
        if args.should_save:
            self._kept(write_start)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The metrics of the weights at the end."""
        if args.should_save:
            self._kept(write_records)

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Those of an evaluation after training."""
        if args.should_save and not self.trainer.is_in_train and self.trainer.average is not None:
            self._kept(write_records)

    def _kept(self, write: Callable[[SavedRun], None]) -> None:
        try:
            write(self.trainer)
        except OSError as error:  # a full disk: no reason to lose a run
            logger.warning(f"Plan and metrics of the run are not written, and its model card will lack them: {error}")


def write_records(
    trainer: SavedRun, metrics: Mapping[str, float] | None = None, folder: str | Path | None = None
) -> None:
    """`scaling_plan.json`, `run.json` and `metrics.json`, in another folder also the ledger; on the main process.

    Args:
        trainer: the trainer.
        metrics: values by name; None for those in the trainer's log that are of the weights it holds.
        folder: where to; None for `output_dir`.
    """
    write_start(trainer, folder)
    if metrics is None:
        best = trainer.args.load_best_model_at_end
        metrics = logged_metrics(trainer.state, trainer.plan.recipe.max_steps, best=best)
    write_json(_place(trainer, folder), METRICS_NAME, finite(metrics))
    ledger = Path(str(trainer.args.output_dir)) / LEDGER_NAME
    if ledger.is_file() and not (other := _place(trainer, folder) / LEDGER_NAME).exists():
        shutil.copy2(ledger, other)


def write_start(trainer: SavedRun, folder: str | Path | None = None) -> None:
    """`scaling_plan.json` and `run.json`, which are known before the first step; arguments as for `write_records`."""
    write_json(_place(trainer, folder), PLAN_NAME, trainer.plan.to_dict())
    record = trainer.run_record
    if record is None:
        unlabelled, _ = trainer.unlabelled_data()
        data = {"labelled": trainer.train_dataset, "unlabelled": unlabelled, "evaluation": trainer.eval_dataset}
        record = own_record(data, name_of(trainer.model), trainer.accelerator.num_processes)
    write_json(_place(trainer, folder), RECORD_NAME, record)


def logged_metrics(
    state: TrainerState,
    reference_steps: float,
    *,
    best: bool = False,
    history: Sequence[Mapping[str, Any]] | None = None,
) -> dict[str, float]:
    """The last evaluation of the weights that a trainer holds, what `train()` returned, and the steps done.

    Args:
        state: of the trainer.
        reference_steps: length of the run.
        best: whether the best model is loaded at the end.
        history: log to take them from; None for that of `state`.
    """
    history = state.log_history if history is None else history
    ended = max((place for place, entry in enumerate(history) if "train_runtime" in entry), default=-1)
    step = (state.best_global_step if best else None) or state.global_step
    # Of the same weights: those along the run at their step, and then those after it.
    found = [entry for place, entry in enumerate(history) if 0 <= ended < place or entry.get("step") == step]
    scored = {key: value for entry in found for key, value in entry.items() if key.startswith("eval_")}
    trained = {} if ended < 0 else {k: v for k, v in history[ended].items() if k not in ("step", "epoch")}
    return {**trained, "optimizer_steps": state.global_step, "reference_steps": reference_steps, **scored}


def finite(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Metrics as JSON knows them, which has neither NaN nor infinity."""
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in scalar_logs(dict(metrics)).items()
    }


def name_of(model: Any) -> str | None:
    """Name or folder that a model was loaded from; None for one that starts from its configuration."""
    return getattr(getattr(model, "config", None), "_name_or_path", None) or None


def write_json(folder: str | Path, name: str, content: Mapping[str, Any]) -> None:
    """Writes a file of the run; a kill leaves the old one or the new one."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / f".{name}.part"
    part.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    os.replace(part, folder / name)


def _place(trainer: SavedRun, folder: str | Path | None) -> Path:
    return Path(folder or str(trainer.args.output_dir))
