"""Hyper-parameter search by the trainers: each trial is the run of a new trainer with the trial's arguments."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import transformers
from transformers import hyperparameter_search
from transformers.integrations import integration_utils
from transformers.trainer_utils import BestRun, HPSearchBackend

from hf_ema_scaling.data.collator import CTCCollator

TRIALS: list[dict[str, Any]] = [
    {"optim": "sgd", "learning_rate": 3e-3, "ema_momentum": 0.8, "kappa": 1.0},
    {"optim": "adamw_torch", "learning_rate": 1e-2, "ema_momentum": 0.9, "kappa": 2.0, "noise_scale_every": 1},
]
VOLATILE = ("runtime", "per_second", "train_loss")


class Trial(dict[str, Any]):
    number = 0
    params: dict[str, Any]


class Search(hyperparameter_search.OptunaBackend):
    """Trials as the optuna backend runs them, without optuna."""

    trials: list[dict[str, Any]] = TRIALS

    @staticmethod
    def is_available() -> bool:
        return True

    def run(self, trainer: Any, n_trials: int, direction: str, **_: Any) -> BestRun:
        scores = []
        trainer.found = []
        for number in range(n_trials):
            trial = Trial()
            trial.number, trial.params = number, self.trials[number]
            trainer.objective = None
            trainer.train(resume_from_checkpoint=None, trial=trial)
            trainer.found.append(outcome(trainer))
            scores.append(trainer.objective)
        best = min(range(n_trials), key=scores.__getitem__)
        return BestRun(str(best), scores[best], self.trials[best])


@pytest.fixture(autouse=True)
def _searching(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(hyperparameter_search.ALL_HYPERPARAMETER_SEARCH_BACKENDS, HPSearchBackend.OPTUNA, Search)
    monkeypatch.setattr(integration_utils, "is_optuna_available", lambda: True)
    optuna = SimpleNamespace(trial=SimpleNamespace(BaseTrial=Trial), TrialPruned=KeyboardInterrupt)
    monkeypatch.setitem(sys.modules, "optuna", optuna)


def outcome(made: Any) -> list[Any]:
    logs = [
        {key: value for key, value in entry.items() if not any(word in key for word in VOLATILE)}
        for entry in made.state.log_history
    ]
    return [tiny.parameters(made.model), tiny.average(made), logs, made.plan.rule.__class__.__name__]


def made(folder: Path, kind: str, **changes: Any) -> Any:
    values = {
        "max_steps": 6,
        "eval_strategy": "steps",
        "eval_steps": 3,
        "logging_strategy": "steps",
        "logging_steps": 2,
        "save_strategy": "steps",
        "save_steps": 6,
    }
    args = tiny.arguments(folder, **values | changes)
    if kind == "supervised":
        more: dict[str, Any] = {"eval_dataset": tiny.sentences(8, 1), "model_init": lambda: tiny.bert(dropout=0.1)}
        return tiny.trainer(None, args, tiny.sentences(30), **more)  # type: ignore[arg-type]
    more = {
        "unlabeled_dataset": tiny.speech(12, 1, labels=False),
        # Dropout that changes in each trial's own student.
        "pseudo_label_args": tiny.pseudo(pl_start=2.0, unlabeled_ratio=1.0, pl_dropout=0.3),
        "eval_dataset": tiny.speech(4, 5),
        "data_collator": CTCCollator(),
        "model_init": lambda: tiny.wav2vec2(dropout=0.1),
    }
    return tiny.trainer(None, args, tiny.speech(12), **more)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["supervised", "pseudo"])
def test_a_trial_is_the_run_of_a_new_trainer(tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture) -> None:
    searched = made(tmp_path / "search", kind)
    transformers.utils.logging.enable_propagation()
    with caplog.at_level(logging.WARNING):
        best = searched.hyperparameter_search(
            hp_space=lambda trial: trial.params, n_trials=2, backend="optuna", direction="minimize",
            compute_objective=lambda metrics: metrics["eval_ema_loss"],
        )  # fmt: skip
    transformers.utils.logging.disable_propagation()
    assert "the average is rebuilt" not in caplog.text
    losses = []
    for number, changes in enumerate(TRIALS):
        alone = made(tmp_path / str(number), kind, **changes)
        alone.train()
        assert tiny.same_bits(searched.found[number], outcome(alone))
        losses.append([e["eval_ema_loss"] for e in alone.state.log_history if "eval_ema_loss" in e][-1])
        (folder,) = (tmp_path / "search" / f"run-{number}").iterdir()
        assert tiny.same_bits(
            type(alone.model).from_pretrained(folder / "ema").state_dict(),
            type(alone.model).from_pretrained(tmp_path / str(number) / folder.name / "ema").state_dict(),
        )
    assert best.objective == min(losses) and losses[0] != losses[1]
    assert not tiny.same_bits(searched.found[0][1], searched.found[1][1])


def test_a_trial_does_not_roll_back(tmp_path: Path) -> None:
    searched = made(tmp_path, "pseudo", save_steps=2)
    searched.pseudo_label_args.on_collapse = "rollback"
    with pytest.raises(NotImplementedError, match=r"on_collapse=rollback in a hyper-parameter search.* Use stop or"):
        searched.hyperparameter_search(hp_space=lambda trial: trial.params, n_trials=1, backend="optuna")


def test_values_that_contradict_each_other_are_refused_in_a_trial_as_well(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for changes, message in (
        ({"kappa": 2.0}, "at most one of kappa, batch_size, batch_schedule"),
        ({"max_skipped_steps": -3}, "max_skipped_steps counts steps"),
    ):
        monkeypatch.setattr(Search, "trials", [changes])
        searched = made(tmp_path, "supervised", batch_size=8.0)
        with pytest.raises(ValueError, match=message):
            searched.hyperparameter_search(hp_space=lambda trial: trial.params, n_trials=1, backend="optuna")
