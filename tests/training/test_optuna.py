"""Hyper-parameter search by optuna itself, with a trial that it prunes in the middle (extra `integrations`).

`test_search.py` and `test_callback_runs.py` hold the same with a stand-in for optuna.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file
from transformers import Trainer, TrainingArguments

from hf_ema_scaling import EMACallback
from hf_ema_scaling.data.collator import CTCCollator

optuna = pytest.importorskip("optuna")
PRUNED = 1


class SecondTrial(optuna.pruners.BasePruner):  # type: ignore[misc,name-defined]
    """Prunes the second trial at its first evaluation."""

    def prune(self, study: Any, trial: Any) -> bool:
        return bool(trial.number == PRUNED)


def searched(trainer: Any, space: Callable[[Any], dict[str, Any]], metric: str) -> tuple[Any, list[dict[str, Any]]]:
    """The best of three trials, and the values of each."""
    chosen: list[dict[str, Any]] = []

    def noted(trial: Any) -> dict[str, Any]:
        chosen.append(space(trial))
        return chosen[-1]

    best = trainer.hyperparameter_search(
        hp_space=noted, n_trials=3, backend="optuna", direction="minimize", pruner=SecondTrial(),
        sampler=optuna.samplers.RandomSampler(seed=0), compute_objective=lambda metrics: metrics[metric],
    )  # fmt: skip
    return best, chosen


def check(folder: Path, alone: Callable[[Path, dict[str, Any]], Any], best: Any, chosen: list[dict[str, Any]]) -> None:
    """Every trial that ran to its end is the run of a new trainer with its values, files included."""
    assert len(chosen) == 3 and best.run_id in ("0", "2") and best.hyperparameters == chosen[int(best.run_id)]
    averages = []
    for number in (0, 2):
        trainer = alone(folder / f"alone-{number}", chosen[number])
        trainer.train()
        *_, last = sorted((folder / "search" / f"run-{number}").glob("checkpoint-*/ema"))
        found = load_file(last / "model.safetensors")
        assert tiny.same_bits(
            found, load_file(folder / f"alone-{number}" / last.parent.name / "ema/model.safetensors")
        )
        student = load_file(last.parent / "model.safetensors")
        assert any(not torch.equal(found[name], student[name]) for name in found)
        averages.append(found)
    assert not tiny.same_bits(*averages)
    assert not list((folder / "search" / f"run-{PRUNED}").glob("checkpoint-*"))


def test_the_callback(tmp_path: Path) -> None:
    def made(folder: Path, values: dict[str, Any]) -> Trainer:
        args: dict[str, Any] = {"max_steps": 4, "eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps"}
        args |= {"save_steps": 4, "report_to": [], "use_cpu": True, "disable_tqdm": True, **values}
        return Trainer(
            args=TrainingArguments(folder, **args), train_dataset=tiny.sentences(30), data_collator=tiny.pad_sentences,
            eval_dataset=tiny.sentences(8, 1), callbacks=[EMACallback(momentum=0.8, reference_batch_size=4)],
            model_init=lambda: tiny.bert(),
        )  # fmt: skip

    def space(trial: Any) -> dict[str, Any]:
        return {
            "learning_rate": trial.suggest_float("learning_rate", 1e-2, 5e-2, log=True),
            "per_device_train_batch_size": trial.suggest_categorical("per_device_train_batch_size", [2, 4, 8]),
        }

    best, chosen = searched(made(tmp_path / "search", {}), space, "eval_loss")
    check(tmp_path, made, best, chosen)


def test_pseudo_labelling(tmp_path: Path) -> None:
    def made(folder: Path, values: dict[str, Any]) -> Any:
        args: dict[str, Any] = {"max_steps": 6, "eval_strategy": "steps", "eval_steps": 3, "save_strategy": "steps"}
        return tiny.trainer(
            None, tiny.arguments(folder, **args, save_steps=6, **values), tiny.speech(12),  # type: ignore[arg-type]
            unlabeled_dataset=tiny.speech(12, 1, labels=False), eval_dataset=tiny.speech(4, 5),
            pseudo_label_args=tiny.pseudo(pl_start=2.0, unlabeled_ratio=1.0), data_collator=CTCCollator(),
            model_init=lambda: tiny.wav2vec2(),
        )  # fmt: skip

    def space(trial: Any) -> dict[str, Any]:
        return {
            "learning_rate": trial.suggest_float("learning_rate", 1e-3, 1e-2, log=True),
            "kappa": trial.suggest_categorical("kappa", [1.0, 2.0]),
            "ema_momentum": trial.suggest_float("ema_momentum", 0.8, 0.95),
        }

    best, chosen = searched(made(tmp_path / "search", {}), space, "eval_ema_loss")
    check(tmp_path, made, best, chosen)
