from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from hf_ema_scaling.recipe.registry import RECIPES, RecipeKind
from hf_ema_scaling.sweep.jobs import lay_out_sweep
from hf_ema_scaling.training.arguments import EMATrainingArguments


def test_the_runs_of_a_sweep(recipe: dict[str, Any], tmp_path: Path) -> None:
    jobs = lay_out_sweep(recipe, [0.5, 2, 4], [0, 3], tmp_path)
    for seed in (0, 3):
        mine = [job for job in jobs if job.seed == seed]
        assert sorted((job.arm, job.kappa) for job in mine) == [
            ("dropout", 1.0),
            ("none", 4.0),
            ("phase", 1.0),
            *(("rule", kappa) for kappa in (0.5, 1.0, 2.0, 4.0)),
            *(("spread", 1.0), ("spread", 1.0)),
            *(("unscaled", kappa) for kappa in (0.5, 2.0, 4.0)),
        ]
        by_name = {(job.arm, job.kappa): job for job in mine}
        phase = by_name["phase", 1.0]
        for job in mine:
            assert job.start == 4 and job.settings["small_batch_until"] == 4 and job.settings["kappa"] == job.kappa
            assert job.settings["init_seed"] == seed
            assert job.settings["seed"] == job.settings["data_seed"] == seed + 1000 * job.repeat
            assert job.branch is (None if job is phase else phase)
            assert job.forks is (job.arm in ("spread", "dropout"))
        assert sorted(job.repeat for job in mine) == [0] * (len(mine) - 2) + [1, 2]
        assert by_name["unscaled", 4.0].settings["scale_ema"] is False
        assert "scaling_rule" not in by_name["unscaled", 4.0].settings
        assert by_name["none", 4.0].settings["scaling_rule"] == "none"
    assert len({job.folder for job in jobs}) == len({job.fingerprint for job in jobs}) == len(jobs)


def test_the_recipe_of_a_run_can_be_run_alone(recipe: dict[str, Any], tmp_path: Path) -> None:
    job = lay_out_sweep(recipe | {"batch_schedule": [{"batch_size": 4}], "kappa": None}, [2], [0], tmp_path)[-1]
    written = yaml.safe_load(job.write_recipe().read_text())
    assert written == job.settings
    assert "batch_schedule" not in written and "output_dir" not in written


def test_a_fingerprint_is_of_all_that_figures_depend_on(
    recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fingerprints(folder: str, **changes: Any) -> list[str]:
        return [job.fingerprint for job in lay_out_sweep(recipe | changes, [2], [0], tmp_path / folder)]

    assert fingerprints("a") == fingerprints("b", output_dir="elsewhere")
    # Also of runs that only branch from what changed.
    assert not set(fingerprints("a")) & set(fingerprints("a", learning_rate=1e-3))
    before = fingerprints("a")
    monkeypatch.setattr("hf_ema_scaling.sweep.jobs.version", lambda name: "0.0")
    assert not set(before) & set(fingerprints("a"))


def test_without_a_phase_nothing_is_shared(recipe: dict[str, Any], tmp_path: Path) -> None:
    jobs = lay_out_sweep(recipe | {"small_batch_until": 0}, [2], [0], tmp_path)
    assert not {"phase", "dropout"} & {job.arm for job in jobs} and {job.branch for job in jobs} == {None}
    assert not any(job.forks for job in jobs)
    assert sorted(job.settings["seed"] for job in jobs)[-2:] == [1000, 2000]


@pytest.mark.parametrize(
    ("changes", "kappas", "reason"),
    [
        ({"eval_steps": 3}, [2], r"kappa 2 and 1 would be evaluated at 10 and 9.*eval_steps \(3\)"),
        ({"small_batch_until": 3}, [4], "evaluated at 7 and 4"),
        ({"max_steps": -1}, [2], "needs max_steps"),
        ({}, [1], "one of them other than 1"),
        ({}, [0, 2], "must be above 0"),
        ({"recipe": "tinny"}, [2], "did you mean tiny"),
        ({"learning_rates": 1}, [2], "no argument is called 'learning_rates'"),
    ],
)
def test_what_cannot_be_compared_is_refused(
    recipe: dict[str, Any], tmp_path: Path, changes: dict[str, Any], kappas: list[float], reason: str
) -> None:
    with pytest.raises(ValueError, match=reason):
        lay_out_sweep(recipe | changes, kappas, [0], tmp_path)


def test_seeds_and_an_initialisation_are_needed(
    recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for seeds in ([], [-1]):
        with pytest.raises(ValueError, match="at least one seed"):
            lay_out_sweep(recipe, [2], seeds, tmp_path)
    monkeypatch.setitem(RECIPES, "bare", RecipeKind((EMATrainingArguments,), RECIPES["tiny"].build))
    with pytest.raises(ValueError, match="'bare' has no init_seed"):
        lay_out_sweep(recipe | {"recipe": "bare"}, [2], [0], tmp_path)
