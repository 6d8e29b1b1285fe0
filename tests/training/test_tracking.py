"""Trackers get every metric of a run, one number per key, by names that say what they are."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from transformers.integrations import integration_utils

from hf_ema_scaling.training.tracking import scalar_logs


def test_plain_logs_are_the_same_object() -> None:
    logs = {"loss": 1.0, "steps": 3, "on": True, "what": "text", "nan": math.nan}
    assert scalar_logs(logs) is logs


def test_everything_else_becomes_numbers_or_goes() -> None:
    logs = {
        "histogram": [0.25, 0.75],
        "array": np.array([[1, 2], [3, 4]]),
        "tensor": torch.tensor([0.5, 1.5]),
        "scalar": torch.tensor(2.0),
        "one": np.array([7]),
        "float64": np.float64(0.1),
        "nested": {"a": (1, {"b": torch.tensor([True])}), "none": None},
        "none": None,
        "object": object(),
        "empty": [],
        "text": "kept",
        "nan": np.float32("nan"),
    }
    found = scalar_logs(logs)
    assert math.isnan(found.pop("nan"))
    assert found == {
        "histogram/0": 0.25,
        "histogram/1": 0.75,
        "array/0/0": 1,
        "array/0/1": 2,
        "array/1/0": 3,
        "array/1/1": 4,
        "tensor/0": 0.5,
        "tensor/1": 1.5,
        "scalar": 2.0,
        "one": 7,
        "float64": 0.1,
        "nested/a/0": 1,
        "nested/a/1/b": True,
        "text": "kept",
    }
    assert {type(value) for value in found.values()} <= {int, float, str, bool}


class Writer:
    """As TensorBoard's: what it is given."""

    def __init__(self, log_dir: str | None = None) -> None:
        self.scalars: dict[str, list[tuple[int, float]]] = {}
        self.texts: dict[str, str] = {}

    def add_scalar(self, key: str, value: float, step: int) -> None:
        self.scalars.setdefault(key, []).append((step, value))

    def add_text(self, key: str, value: str, step: int = 0) -> None:
        self.texts[key] = value

    def flush(self) -> None:
        pass

    close = flush


class Config(dict[str, Any]):
    def update(self, other: dict[str, Any], allow_val_change: bool = False) -> None:  # type: ignore[override]
        super().update(json.loads(json.dumps(other, default=str)))


class Logger(types.ModuleType):
    """A module with as much of wandb and trackio as Trainer's callbacks call."""

    __version__ = "0.30.0"

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.logged: list[dict[str, Any]] = []
        self.config = Config()
        self.summary: dict[str, Any] = {}
        self.run: Any = None
        space = types.SimpleNamespace(get=lambda: None)
        self.context_vars = types.SimpleNamespace(current_space_id=space, current_project=space)

    def init(self, **_: Any) -> None:
        self.run = types.SimpleNamespace(summary=self.summary, id="1", name="run", _label=lambda **_: None)

    def log(self, values: dict[str, Any]) -> None:
        self.logged.append(json.loads(json.dumps(values)))

    def define_metric(self, *_: Any, **__: Any) -> None:
        pass

    watch = finish = define_metric


def metrics(_: Any) -> dict[str, Any]:
    return {"score": 0.5, "histogram": [0.25, 0.75], "unknown": None}


def train(folder: Path, callback: Any) -> Any:
    """Twelve reference steps with pseudo-labels from the fourth, a log every other one, two evaluations."""
    args = tiny.arguments(folder, max_steps=12, kappa=2.0, per_device_train_batch_size=4, logging_strategy="steps",
                          logging_steps=2, eval_strategy="steps", eval_steps=8, noise_scale_every=2)  # fmt: skip
    trainer = tiny.trainer(
        tiny.wav2vec2(), args, tiny.speech(16), eval_dataset=tiny.speech(4, seed=1), compute_metrics=metrics,
        unlabeled_dataset=tiny.speech(16, seed=2, labels=False), labeler=tiny.ContentLabeler(), callbacks=[callback],
        pseudo_label_args=tiny.pseudo(pl_start=4),
    )  # fmt: skip
    trainer.train()
    return trainer


OURS = ("ema/momentum", "ema/kappa", "ema/distance", "batch/units", "clip/rate", "pseudo/kept", "pseudo/confidence",
        "pseudo/dropped_confidence", "pl/weight", "clock/reference_step")  # fmt: skip


def renamed(key: str) -> str:
    return "eval/" + key.removeprefix("eval_") if key.startswith("eval_") else "train/" + key


def expected(trainer: Any) -> dict[str, list[tuple[int, float]]]:
    """All numbers of the log by the names that trackers show."""
    found: dict[str, list[tuple[int, float]]] = {}
    for row in trainer.state.log_history:
        for key, value in row.items():
            if key != "step":
                found.setdefault(renamed(key), []).append((row["step"], value))
    assert {renamed(key) for key in OURS} <= found.keys()
    names = ("score", "histogram/0", "histogram/1", "loss")
    assert all(f"eval/{side}{name}" in found for side in ("", "ema_") for name in names)
    assert not [key for key in found if "unknown" in key]
    assert {type(value) for points in found.values() for _, value in points} <= {int, float}
    return found


def test_tensorboard_gets_every_metric(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if importlib.util.find_spec("tensorboard") is None:
        monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
        fake: Any = types.ModuleType("tensorboardX")
        fake.SummaryWriter = Writer
        monkeypatch.setitem(sys.modules, "tensorboardX", fake)
        monkeypatch.setattr(integration_utils, "is_tensorboard_available", lambda: True)
    writer = Writer()
    trainer = train(tmp_path, integration_utils.TensorBoardCallback(writer))
    wanted = expected(trainer)
    assert writer.scalars == wanted
    assert set(writer.texts) == {"args", "model_config"}
    assert json.loads(writer.texts["args"])["kappa"] == 2.0
    assert wanted["train/ema/kappa"][0] == (2, 1.0) and wanted["train/ema/kappa"][-1][1] == 2.0


def test_tensorboard_reads_back_what_was_logged(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    trainer = train(tmp_path, integration_utils.TensorBoardCallback(SummaryWriter(str(tmp_path / "events"))))
    events = EventAccumulator(str(tmp_path / "events")).Reload()
    for key, points in expected(trainer).items():
        found = [(event.step, event.value) for event in events.Scalars(key)]
        assert found == [(step, pytest.approx(value, rel=1e-6)) for step, value in points]


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_other_trackers_get_every_metric(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = Logger(name)
    monkeypatch.setitem(sys.modules, name, module)
    errors: Any = types.ModuleType("wandb.sdk.lib.config_util")
    errors.ConfigError = KeyError
    for part in ("wandb.sdk", "wandb.sdk.lib", errors.__name__):
        monkeypatch.setitem(sys.modules, part, errors)
    monkeypatch.setattr(integration_utils, f"is_{name}_available", lambda: True)
    monkeypatch.setenv("WANDB_WATCH", "false")
    kind = {"wandb": integration_utils.WandbCallback, "trackio": integration_utils.TrackioCallback}[name]
    trainer = train(tmp_path, kind())
    found: dict[str, list[tuple[int, float]]] = {}
    for values in module.logged:
        step = values.pop("train/global_step")
        for key, value in values.items():
            found.setdefault(key, []).append((step, value))
    # Trainer's totals at the end are no curves there.
    totals = {renamed(key) for key in ("train_runtime", "train_samples_per_second", "train_steps_per_second",
                                       "total_flos", "train_loss")}  # fmt: skip
    assert found == {key: points for key, points in expected(trainer).items() if key not in totals}
    assert module.config["kappa"] == 2.0 and module.config["ema_momentum"] == 0.9


def test_a_log_of_other_things_does_not_break_a_run(tmp_path: Path) -> None:
    class Talkative(tiny.RecordedEMATrainer):
        def training_logs(self) -> dict[str, Any]:
            return {**super().training_logs(), "confidence": torch.tensor([0.25, 0.75]), "x/nothing": None, "x/s": "a"}

    args = tiny.arguments(tmp_path, logging_strategy="steps", logging_steps=1)
    trainer = Talkative(tiny.bert(), args, train_dataset=tiny.sentences(16))
    trainer.train()
    trainer.save_state()
    row = json.loads((tmp_path / "trainer_state.json").read_text(encoding="utf-8"))["log_history"][0]
    assert (row["confidence/0"], row["confidence/1"], row["x/s"]) == (0.25, 0.75, "a")
    assert "confidence" not in row and "x/nothing" not in row and row["ema/momentum"] == pytest.approx(0.9)
