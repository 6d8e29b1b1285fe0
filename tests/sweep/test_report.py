from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path

import pytest

from hf_ema_scaling.sweep.distances import Comparison
from hf_ema_scaling.sweep.report import chosen_metric, judged_distances, markdown, summary, write_csv

Make = Callable[..., Comparison]


@pytest.fixture
def sweep(comparison: Make) -> list[Comparison]:
    runs = [
        comparison(arm, kappa, seed, scale * (1 + seed), 2 * scale)
        for seed in (0, 1)
        for arm, kappa, scale in (
            *(("rule", 1, 0.0), ("rule", 2, 0.1), ("rule", 8, 0.2), ("spread", 1, 0.15), ("dropout", 1, 0.01)),
            *(("unscaled", 2, 0.3), ("unscaled", 8, 0.6), ("none", 8, 0.7)),
        )
    ]
    broken = next(run for run in runs if (run.arm, run.kappa, run.seed) == ("rule", 2, 1))
    broken.distances["loss"] = {"average": 0.35, "student": 0.2}
    return runs


def test_figures_in_the_table(sweep: list[Comparison]) -> None:
    lines = [" ".join(line.replace("|", " ").split()) for line in markdown(sweep, "loss", "Made up").splitlines()]
    assert lines[0] == "# Made up"
    # Student, then average, of weights and of loss; mean over the seeds, smallest and largest.
    unscaled = "1.2000 (1.2000 to 1.2000) 0.9000 (0.6000 to 1.2000)"
    assert f"unscaled 8 {unscaled} {unscaled}" in lines
    assert "rule 1 0 0 0 0" in lines
    assert "rule 1 1.0000 (1.0000 to 1.0000) 0.5000 (0.5000 to 0.5000)" in lines
    assert "8 3.00 (3.00 to 3.00) 3.00 (3.00 to 3.00)" in lines
    within = "2 the rule's average is within the spread"
    assert f"{within} loss true (0.1000, 0.1500) **false** (0.3500, 0.3000) **false** 0 of 2" in lines
    assert f"{within} weights true (0.1000, 0.1500) true (0.2000, 0.3000) true 0 of 2" in lines
    assert "1 of 12 do not hold:" in lines
    chance = "0.0200 (0.0200 to 0.0200) 0.0150 (0.0100 to 0.0200)"
    assert f"dropout 1 {chance} {chance}" in lines
    assert "- kappa 2: kappa is large" in lines  # what the plan warned of
    assert "- kappa 2: no gradient noise scale in the log (noise_scale_every)" in lines


def test_noise_that_explains_a_bound(sweep: list[Comparison]) -> None:
    for run in sweep:
        rows = [{"reference_step": 8.0, "scale": scale, "largest_kappa": scale / 16} for scale in (16.0, 24.0, 40.0)]
        run.run.result["noise"].extend(rows)
    text = markdown(sweep, "loss", "")
    assert "- kappa 2: gradient noise scale 24 units (median), largest useful kappa 1.5, which it exceeds" in text


def test_conditions_are_told_where_all_bounds_hold(sweep: list[Comparison]) -> None:
    text = markdown([run for run in sweep if run.seed == 0], "loss", "")
    assert "Every bound holds for every seed." in text and "do not hold" not in text
    assert text.count("kappa is large") == 3  # of the rule's runs, at kappa 1, 2 and 8


def test_csv_has_one_row_per_run(sweep: list[Comparison], tmp_path: Path) -> None:
    write_csv(sweep, tmp_path / "sweep.csv")
    with (tmp_path / "sweep.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["seed"], row["arm"], row["kappa"]) for row in rows[:7]] == [
        *(("0", "rule", "1"), ("0", "rule", "2"), ("0", "rule", "8"), ("0", "unscaled", "2")),
        *(("0", "unscaled", "8"), ("0", "none", "8"), ("0", "spread", "1")),
    ]
    assert float(rows[4]["distance/loss/average"]) == 0.6 and float(rows[4]["distance/loss/student"]) == 1.2
    assert (float(rows[4]["end/loss/average"]), float(rows[4]["end/loss/student"])) == (0.5, 1.0)


def test_json_knows_no_nan(sweep: list[Comparison]) -> None:
    sweep[-1].distances["loss"]["average"] = float("nan")
    found = summary(sweep, "loss")
    assert [row["distance/loss/average"] for row in found["runs"] if row["arm"] == "none"] == [0.7, None]
    assert found["factors"]["weights"]["8"] == {"0": pytest.approx(3.0), "1": pytest.approx(3.0)}


def test_metrics_by_their_names_in_the_log() -> None:
    names = ["clean_wer", "clean_loss", "noisy_loss"]
    assert {chosen_metric(f"{prefix}clean_wer", names) for prefix in ("", "eval_", "eval_ema_")} == {"clean_wer"}
    assert chosen_metric(None, names) == "clean_loss" and chosen_metric(None, ["accuracy"]) == "accuracy"
    for metric, known in (("eval_wer", names), (None, [])):
        with pytest.raises(ValueError, match="was not measured"):
            chosen_metric(metric, known)
    assert judged_distances("clean_wer", names) == ["weights", "clean_loss", "clean_wer"]
    assert judged_distances("accuracy", ["accuracy"]) == ["weights", "accuracy"]
