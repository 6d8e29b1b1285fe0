from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_ema_scaling.recipe.registry import kind_of
from hf_ema_scaling.sweep import compare, lay_out_sweep, run_sweep
from hf_ema_scaling.sweep import run as module
from hf_ema_scaling.sweep.jobs import SweepJob
from hf_ema_scaling.sweep.report import chosen_metric, summary, write_report
from hf_ema_scaling.sweep.trajectory import Trajectory, flat_weights
from hf_ema_scaling.training.flow import StopAt


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, float]]:
    """Arm and kappa of every run that is trained."""
    seen: list[tuple[str, float]] = []
    run_job = module.run_job

    def counted(job: SweepJob) -> str:
        seen.append((job.arm, job.kappa))
        return run_job(job)

    monkeypatch.setattr(module, "run_job", counted)
    return seen


def sweep(recipe: dict[str, Any], folder: Path, **changes: Any) -> list[SweepJob]:
    return lay_out_sweep(recipe | changes, [4], [0], folder)


def test_a_sweep_trains_once_and_reports(
    recipe: dict[str, Any], tmp_path: Path, trained: list[tuple[str, float]]
) -> None:
    jobs = sweep(recipe, tmp_path)
    assert run_sweep(jobs, processes=1) == 8
    assert sorted(trained) == [
        *(("dropout", 1.0), ("none", 4.0), ("phase", 1.0), ("rule", 1.0), ("rule", 4.0)),
        *(("spread", 1.0), ("spread", 1.0), ("unscaled", 4.0)),
    ]
    comparisons = compare(jobs)
    by_name = {(run.arm, run.kappa): run for run in comparisons}
    assert len(comparisons) == len(by_name) + 1  # two spread runs
    for run in comparisons:
        assert run.run.clock.tolist() == [8.0, 12.0]
    # 4 steps of the phase and 8 of its own, or 2 of four reference batches.
    steps = {name: run.run.result["optimizer_steps"] for name, run in by_name.items()}
    assert steps["rule", 1.0] == steps["spread", 1.0] == 12 and steps["rule", 4.0] == steps["none", 4.0] == 6
    assert by_name["rule", 1.0].distances["weights"] == {"student": 0.0, "average": 0.0}
    # Without feedback from the average the student is the same whether or not the momentum is scaled.
    rule, unscaled = by_name["rule", 4.0].distances["weights"], by_name["unscaled", 4.0].distances["weights"]
    assert rule["student"] == unscaled["student"] > 0 and unscaled["average"] > rule["average"] > 0
    assert by_name["none", 4.0].distances["weights"]["student"] not in (rule["student"], 0.0)
    # All part from one point, and no two alike: other data parts farther than other dropout masks alone.
    starts = [run.run.weights(0)["student"] for run in comparisons]
    assert all(torch.equal(start, starts[0]) for start in starts)
    spreads = [run.distances["weights"]["average"] for run in comparisons if run.arm == "spread"]
    dropout = by_name["dropout", 1.0].distances["weights"]["average"]
    assert len(set(spreads)) == 2 and min(spreads) > dropout > 0
    assert not list(tmp_path.glob("**/fork-*"))
    text = write_report(comparisons, tmp_path / "report", metric="clean_accuracy", title="Tiny")
    found = summary(comparisons, chosen_metric("eval_ema_clean_accuracy", comparisons[0].run.names()))
    assert {each["distance"] for each in found["bounds"]} == {"weights", "clean_loss", "clean_accuracy"}
    factor = found["factors"]["weights"]["4"]["0"]
    assert factor == pytest.approx(unscaled["average"] / rule["average"]) and f"{factor:.2f}" in text
    assert len((tmp_path / "report" / "sweep.csv").read_text().splitlines()) == 1 + len(comparisons)
    assert (tmp_path / "report" / "sweep.png").read_bytes()[:4] == b"\x89PNG"

    trained.clear()
    assert run_sweep(jobs, processes=1) == 0 and trained == []
    # What an interrupted run leaves is no result; a run that is taken away is the only one to run again.
    path = by_name["rule", 4.0].run.folder
    before = path.joinpath("result.json").read_text()
    path.joinpath("result.json").unlink()
    assert run_sweep(jobs, processes=1) == 1 and trained == [("rule", 4.0)]
    then, now = json.loads(before), json.loads(path.joinpath("result.json").read_text())
    assert then["metrics"]["eval_ema_clean_loss"] == now["metrics"]["eval_ema_clean_loss"]
    # More kappas train only what is new.
    trained.clear()
    run_sweep(lay_out_sweep(recipe, [2, 4], [0], tmp_path), processes=1)
    assert sorted(trained) == [("rule", 2.0), ("unscaled", 2.0)]


def test_batches_in_tokens_pass_the_start_by_a_part_of_an_item(recipe: dict[str, Any], tmp_path: Path) -> None:
    in_tokens = {"batch_unit": "tokens", "reference_batch_size": 201, "unequal": True, "rows": 300}
    jobs = sweep(recipe, tmp_path, per_device_train_batch_size=64, **in_tokens)
    run_sweep(jobs, processes=1)
    for found in compare(jobs):
        assert found.run.clock.tolist() == pytest.approx([8, 12], abs=0.05)
        # The start, two evaluations, and nothing else.
        assert len(list(found.run.folder.glob("weights-*"))) == 3
        assert found.distances["weights"]["student"] < 20 and (found.run.clock != [8, 12]).any()


def test_another_configuration_is_refused(
    recipe: dict[str, Any], tmp_path: Path, trained: list[tuple[str, float]]
) -> None:
    run_sweep(sweep(recipe, tmp_path)[:1], processes=1)
    trained.clear()
    with pytest.raises(FileExistsError, match=r"settings.learning_rate: 0.01 then, 0.001 now"):
        run_sweep(sweep(recipe, tmp_path, learning_rate=1e-3), processes=1)
    assert trained == []


@pytest.mark.parametrize("kappa", [1.0, 4.0])
def test_branching_gives_the_bits_of_a_run_of_one_piece(recipe: dict[str, Any], tmp_path: Path, kappa: float) -> None:
    jobs = [job for job in sweep(recipe, tmp_path) if job.arm == "phase" or (job.arm, job.kappa) == ("rule", kappa)]
    run_sweep(jobs, processes=1)
    run = Trajectory.read(jobs[-1].folder)
    through = module.build(SweepJob("rule", kappa, 0, 4, jobs[-1].settings, tmp_path / "through"))
    through.train()
    assert torch.equal(run.weights(2)["student"], flat_weights(through.model))
    with through.average.swapped(through.model):
        assert torch.equal(run.weights(2)["average"], flat_weights(through.model))
    assert not torch.equal(run.weights(2)["student"], run.weights(1)["student"])
    last = [row for row in through.state.log_history if "eval_ema_noisy_loss" in row][-1]
    assert run.metric("noisy_loss", "average")[-1] == last["eval_ema_noisy_loss"]


def test_without_a_phase_the_spread_shares_the_initialisation_only(recipe: dict[str, Any], tmp_path: Path) -> None:
    jobs = [job for job in sweep(recipe, tmp_path, small_batch_until=0) if job.kappa == 1]
    rule, *spreads = (module.build(job) for job in jobs)
    drawn = [[draw.index for draw in made.sampler.draws(0, 0)] for made in (rule, *spreads)]
    assert len(spreads) == 2 and drawn[0] != drawn[1] != drawn[2] != drawn[0]
    assert all(torch.equal(flat_weights(rule.model), flat_weights(made.model)) for made in spreads)
    other = module.build(SweepJob("rule", 1.0, 0, 0, jobs[0].settings | {"init_seed": 1}, tmp_path / "other"))
    assert not torch.equal(flat_weights(rule.model), flat_weights(other.model))


def test_other_dropout_masks_change_nothing_without_dropout(recipe: dict[str, Any], tmp_path: Path) -> None:
    jobs = [
        job
        for job in sweep(recipe, tmp_path, dropout=0.0)
        if job.arm in ("phase", "dropout") or (job.arm, job.kappa) == ("rule", 1.0)
    ]
    run_sweep(jobs, processes=1)
    (found,) = (run for run in compare(jobs) if run.arm == "dropout")
    assert set(found.distances["weights"].values()) == set(found.distances["clean_loss"].values()) == {0.0}


def test_runs_on_other_data_are_not_compared(recipe: dict[str, Any], tmp_path: Path) -> None:
    jobs = [job for job in sweep(recipe, tmp_path) if job.arm in ("phase", "rule")]
    run_sweep(jobs, processes=1)
    path = jobs[-1].folder / "result.json"
    result = json.loads(path.read_text())
    assert result["data"]["labelled_items"] == 24
    result["data"]["labelled_items"] = 25
    path.write_text(json.dumps(result))
    with pytest.raises(ValueError, match=r"labelled_items: 24 there, 25 here"):
        compare(jobs)


@pytest.mark.parametrize("processes", [1, 2])
def test_runs_wait_for_their_phase_and_a_failed_one_stops_no_others(
    recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, processes: int
) -> None:
    done: list[SweepJob] = []

    def pretend(job: SweepJob) -> str:
        assert job.branch is None or job.branch in done
        if (job.arm, job.seed) in (("phase", 1), ("unscaled", 0)):
            raise ValueError("no luck")
        job.folder.mkdir(parents=True)
        (job.folder / "result.json").write_text(json.dumps({"fingerprint": job.fingerprint}))
        done.append(job)
        return "done"

    monkeypatch.setattr(module, "ProcessPoolExecutor", lambda workers, mp_context: ThreadPoolExecutor(workers))
    monkeypatch.setattr(module, "run_job", pretend)
    jobs = lay_out_sweep(recipe, [4], [0, 1], tmp_path)
    with pytest.raises(RuntimeError, match=r"9 of 16 runs failed") as failure:
        run_sweep(jobs, processes=processes)
    lines = str(failure.value).splitlines()
    assert "  seed 0, unscaled, kappa 4: ValueError: no luck" in lines
    assert "  seed 1, rule, kappa 4: RuntimeError: seed 1, phase failed" in lines
    finished = [(job.seed, job.arm) for job in jobs if module.is_finished(job)]
    arms = ("dropout", "none", "phase", "rule", "rule", "spread", "spread")
    assert sorted(finished) == [(0, arm) for arm in arms]
    assert len(done) == len(finished)


def test_scaling_rules_may_change_where_all_agree(recipe: dict[str, Any], tmp_path: Path) -> None:
    """A checkpoint at the reference batch can be resumed without scaling; one at another batch cannot."""
    for kappa in (1.0, 2.0):
        settings = sweep(recipe, tmp_path)[0].settings | {"kappa": kappa, "small_batch_until": 0}
        made = module.build(SweepJob("phase", kappa, 0, 4, settings, tmp_path / f"kappa{kappa}"))
        stop = StopAt(4)
        stop.trainer = made
        made.add_callback(stop)
        made.train()
        changed = settings | {"scaling_rule": "none"}
        resumed = module.build(SweepJob("none", kappa, 0, 4, changed, tmp_path / f"resumed{kappa}"))
        checkpoint = str(tmp_path / f"kappa{kappa}" / f"checkpoint-{round(4 / kappa)}")
        if kappa == 1:
            resumed.train(resume_from_checkpoint=checkpoint)
            assert resumed.state.global_step == 12
        else:
            with pytest.raises(ValueError, match="scaling_rule: adamw then, none now"):
                resumed.train(resume_from_checkpoint=checkpoint)


def test_kinds_are_known_by_the_settings(recipe: dict[str, Any]) -> None:
    assert kind_of(recipe).build is kind_of({"recipe": "tiny"}).build
    assert kind_of({}).build is kind_of({"recipe": "asr_ctc"}).build
