"""What a run left in its folder."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from hf_ema_scaling.ema.adapter_storage import ADAPTER_FOLDER, ADAPTER_WEIGHTS, BUFFERS
from hf_ema_scaling.ema.exact import EXACT_NAME
from hf_ema_scaling.ema.folders import EMA_FOLDER
from hf_ema_scaling.ema.storage import STATE_NAME, check_average

PLAN_NAME, METRICS_NAME, LEDGER_NAME, RECORD_NAME = "scaling_plan.json", "metrics.json", "ledger.json", "run.json"
WEIGHTS = re.compile(r"(model|adapter_model)(-\d{5}-of-\d{5})?\.safetensors")
_WITH_WEIGHTS = re.compile(r"(config|generation_config|adapter_config|(adapter_)?model\.safetensors\.index)\.json")
OF_SENTENCE_TRANSFORMERS = "modules.json"
_OF_AVERAGE = (STATE_NAME, EXACT_NAME, BUFFERS)


class RunFolderError(ValueError):
    """A folder cannot be pushed; the message names the file and the way out."""


@dataclass(frozen=True)
class RunFolder:
    """A finished run on disk.

    Args:
        folder: with the student, the average in `ema/`, and where there are such `metrics.json`, `scaling_plan.json`,
            `ledger.json`, `run.json` and figures.
        plan: what `ScalingPlan.to_dict` said; empty if it was not written.
        metrics: values by name.
        ledger: what became of pseudo-labels.
        record: how the run was started.
        config: of the model, or of its adapters.
    """

    folder: Path
    plan: Mapping[str, Any]
    metrics: Mapping[str, Any]
    ledger: Mapping[str, Any]
    record: Mapping[str, Any]
    config: Mapping[str, Any]

    @property
    def average(self) -> Path:
        """Folder of the average."""
        return self.folder / EMA_FOLDER

    @property
    def adapters(self) -> bool:
        """Whether the weights are PEFT adapters."""
        return (self.folder / "adapter_config.json").is_file()

    def figures(self) -> list[str]:
        """PNG files in the folder, in `figures/` and beside a report (`report_figures/`), relative to the folder."""
        places = ("*.png", "figures/**/*.png", "*_figures/*.png")
        found = {path for place in places for path in self.folder.glob(place) if path.is_file()}
        return sorted(path.relative_to(self.folder).as_posix() for path in found)

    def average_files(self) -> dict[str, str]:
        """Files of the average's folder, relative to it, and where each belongs beside the model that it is part of.

        These are the same but for adapters, which PEFT looks for in the folder itself.
        """
        found = sorted(p.relative_to(self.average).as_posix() for p in self.average.rglob("*") if p.is_file())
        return {name: name.removeprefix(f"{ADAPTER_FOLDER}/") for name in found}

    def student_files(self) -> list[str]:
        """Files of the student, relative to the folder: as of the average, without what belongs to an average."""
        # What a processor writes is known from the average's folder alone: this one holds other things too.
        names = self.average_files().values()
        processor = {name for name in names if not _is_model_file(name) and name not in _OF_AVERAGE}
        present = {name for name in processor if (self.folder / name).is_file()}
        return sorted(present | {p.name for p in self.folder.iterdir() if p.is_file() and _is_model_file(p.name)})

    def parameters(self) -> int:
        """Numbers in the student's weights; tied weights once."""
        total = 0
        for name in filter(WEIGHTS.fullmatch, self.student_files()):
            with safe_open(self.folder / name, framework="np") as stored:
                for key in stored.keys():  # noqa: SIM118 - no mapping
                    size = 1
                    for length in stored.get_slice(key).get_shape():
                        size *= length
                    total += size
        return total


def read_run(folder: str | Path) -> RunFolder:
    """Reads and verifies a run.

    A checkpoint takes plan and record from the run that it lies in, and its metrics from its own log.

    Args:
        folder: `output_dir` of a run, or one of its checkpoints.

    Raises:
        RunFolderError: without student or average, with a file that cannot be read, or of sentence-transformers.
        AverageStateError: with a damaged average.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise RunFolderError(f"there is no folder {folder}: give the output_dir of a run")
    if not any(WEIGHTS.fullmatch(path.name) for path in folder.iterdir()):
        raise RunFolderError(
            f"{folder} holds no model.safetensors: give the output_dir of a run that has ended, or one of its "
            "checkpoints"
        )
    if (folder / OF_SENTENCE_TRANSFORMERS).is_file():
        raise RunFolderError(
            f"{folder} holds a model of sentence-transformers ({OF_SENTENCE_TRANSFORMERS}), with folders of another "
            "layout than those that can be pushed here: write the average by EMACallback.export('average') and "
            "push it as that library does, for example by SentenceTransformer('average').push_to_hub('OWNER/NAME')"
        )
    if not (folder / EMA_FOLDER / STATE_NAME).is_file():
        raise RunFolderError(
            f"{folder} holds no {EMA_FOLDER}/{STATE_NAME}, so no average to push: train with EMATrainer or "
            "EMACallback first, or give one of the run's checkpoints"
        )
    if several := sorted(p.parent.name for p in (folder / EMA_FOLDER / ADAPTER_FOLDER).glob(f"*/{ADAPTER_WEIGHTS}")):
        raise RunFolderError(
            f"{folder} holds several adapters ({', '.join(several)}), and a repository has one at its root: push each "
            f"by itself from {EMA_FOLDER}/{ADAPTER_FOLDER}/ with `hf upload`"
        )
    check_average(folder / EMA_FOLDER)
    checkpoint = folder.resolve().name.startswith(f"{PREFIX_CHECKPOINT_DIR}-")
    parent = folder.resolve().parent if checkpoint else folder
    run = RunFolder(
        folder,
        plan=read_json(folder / PLAN_NAME) or read_json(parent / PLAN_NAME),
        metrics=_of_log(read_json(folder / TRAINER_STATE_NAME)) if checkpoint else read_json(folder / METRICS_NAME),
        ledger=read_json(folder / LEDGER_NAME),
        record=read_json(folder / RECORD_NAME) or read_json(parent / RECORD_NAME),
        config=read_json(folder / "adapter_config.json") or read_json(folder / "config.json"),
    )
    try:
        run.parameters()
    except (SafetensorError, OSError) as error:
        raise RunFolderError(f"the student's weights in {folder} cannot be read: {error}") from error
    return run


def _of_log(state: Mapping[str, Any]) -> dict[str, Any]:
    """What a checkpoint's own weights scored: its last evaluation may be of an earlier step."""
    step = state.get("global_step")
    entries = [entry for entry in state.get("log_history", []) if entry.get("step") == step]
    found = [(key, value) for entry in entries for key, value in entry.items() if key.startswith("eval_")]
    # JSON knows neither NaN nor infinity, which Trainer writes all the same.
    scored = {key: value for key, value in found if not isinstance(value, float) or math.isfinite(value)}
    return {**scored, "optimizer_steps": step} if state else {}


def read_json(path: Path) -> dict[str, Any]:
    """The mapping in a file; empty if there is no file.

    Raises:
        RunFolderError: it holds anything else.
    """
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunFolderError(f"{path} cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise RunFolderError(f"{path} must hold a JSON object, got {type(found).__name__}")
    return found


def _is_model_file(name: str) -> bool:
    return bool(WEIGHTS.fullmatch(name) or _WITH_WEIGHTS.fullmatch(name))
