from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from typer.testing import CliRunner

from hf_ema_scaling.cli import main
from hf_ema_scaling.recipe import ASR_CTC, build_asr_ctc, parse
from hf_ema_scaling.recipe.planning import plan_recipe

CONFIGS = Path(__file__).parents[2] / "recipes" / "configs"
FLAGS = ["--reference_batch_size", "64", "--max_steps", "20000", "--learning_rate", "5e-4", "--ema_momentum", "0.9999"]


def plan(*argv: str) -> tuple[int, str, str]:
    done = CliRunner().invoke(main, ["plan", *argv])
    return done.exit_code, done.stdout, done.stderr


def test_the_plan_of_a_file_is_the_one_its_trainer_runs(config: Path, tmp_path: Path) -> None:
    switched = ["--kappa", "3"]
    trainer = build_asr_ctc(*parse(ASR_CTC, ["--config", str(config), "--output_dir", str(tmp_path), *switched]))
    (planned,) = plan_recipe(config, switched)
    assert planned.recipe.pl_start is not None
    assert planned.to_dict() == trainer.plan.to_dict()
    assert [planned.step(t) for t in range(len(planned))] == [trainer.plan.step(t) for t in range(len(planned))]


def test_a_file_may_state_labelled_and_unlabelled_sizes(tmp_path: Path) -> None:
    config = tmp_path / "sizes.yaml"
    config.write_text(
        "reference_batch_size: 64\nmax_steps: 20000\npl_start: 5000\nunlabeled_ratio: 3\nunlabelled: some/data\n"
        "label_batch_size: 256\nbatch_schedule:\n- {batch_size: 64, until: 5000}\n"
        "- {labelled: 32, unlabelled: 96, until_fraction: 0.5}\n- {labelled: 32, unlabelled: 224}\n"
    )
    (found,) = plan_recipe(config)
    assert found.unlabelled_ratios == ((5000.0, 3.0), (10_000.0, 7.0))
    assert len(found) == 5000 + 2500 + 2500
    code, _, error = plan(str(config), "--unlabelled", "null")
    assert code == 1 and "stage 1 states 32 labelled and 96 unlabelled units, but the run has no" in error


def test_without_unlabelled_data_pl_start_is_no_cut(config: Path) -> None:
    assert plan_recipe(config, ["--unlabelled", "null"])[0].recipe.pl_start is None
    assert plan_recipe(config, ["--unlabelled=null"])[0].recipe.pl_start is None


def test_flags_alone() -> None:
    code, out, _ = plan(*FLAGS, "--kappa", "8", "--small_batch_until", "5000", "--json")
    found = json.loads(out)
    assert code == 0 and found["steps"] == 6875
    assert found["idealised_speedup"] == pytest.approx(20_000 / 6875, rel=1e-12)
    assert found["speedup_without_small_start"] == 8.0
    assert found["stages"][1]["learning_rate"] == pytest.approx(5e-4 * math.sqrt(8), rel=1e-12)
    assert found["stages"][1]["momentum"] == pytest.approx(0.9999**8, rel=1e-14)
    assert plan_recipe(None, [*FLAGS, "--pl_start", "400"])[0].recipe.pl_start == 400.0


def test_a_plan_in_tokens() -> None:
    code, out, _ = plan("--batch_unit", "tokens", *FLAGS, "--kappa", "8")
    assert code == 0 and "batch size (tokens)" in out and "(1.28e+06 tokens)" in out
    table = plan("--batch_unit", "tokens", *FLAGS[:-2], "--ema_half_life", "4000", "--kappas", "1,8")[1]
    header, *rows = table.splitlines()
    assert "batch (tokens)" in header
    assert float(rows[1].split()[3]) == pytest.approx(0.5 ** (8 * 64 / 4000), abs=1e-4)
    assert float(rows[0].split()[4]) == pytest.approx(4000 / 64, abs=1e-2)


def test_what_a_small_start_costs() -> None:
    small = ["--reference_batch_size", "4096", "--max_steps", "480", "--small_batch_until", "60"]
    found = json.loads(plan(*small, "--kappas", "6", "--json")[1])
    assert found[0]["idealised_speedup"] == pytest.approx(480 / 130, rel=1e-12)
    assert found[0]["speedup_without_small_start"] == 6.0
    assert json.loads(plan(*small[:-1], "0", "--kappa", "6", "--json")[1])["idealised_speedup"] == 6.0


def test_several_kappa_in_one_table() -> None:
    code, out, _ = plan(*FLAGS, "--kappas", "1,2,0.5,8")
    header, *rows = [line.split() for line in out.splitlines() if not line.startswith("WARNING")]
    assert code == 0 and header[0] == "kappa"
    assert [row[0] for row in rows] == ["1", "2", "0.5", "8"]
    assert [float(row[3]) for row in rows] == pytest.approx([0.9999**kappa for kappa in (1, 2, 0.5, 8)], abs=5e-5)
    assert [int(row[5]) for row in rows] == [20_000, 10_000, 40_000, 2500]
    assert "WARNING (kappa 2, 0.5, 8)" not in out
    assert "WARNING (kappa 8): kappa is 8 from step 0" in out


def test_a_batch_in_the_file_gives_way_to_the_kappas(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text("reference_batch_size: 64\nmax_steps: 1000\nbatch_size: 512\n")
    assert len(plan_recipe(file)[0]) == 125
    assert [len(found) for found in plan_recipe(file, kappas=(2.0, 4.0))] == [500, 250]


def test_epochs_need_their_length() -> None:
    by_epochs = ["--reference_batch_size", "64", "--num_train_epochs", "3"]
    code, _, error = plan(*by_epochs)
    assert code == 1 and "max_steps counts epochs of the labelled set" in error
    assert json.loads(plan(*by_epochs, "--steps-per-epoch", "100", "--json")[1])["steps"] == 300


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_config_has_a_plan_on_any_machine(file: Path) -> None:
    code, out, error = plan(str(file), "--kappas", "1,2,4,8")
    assert code == 0, error
    assert sum(line.split()[0] in {"1", "2", "4", "8"} for line in out.splitlines()) == 4


def test_mistakes_are_named(tmp_path: Path) -> None:
    code, _, error = plan(str(CONFIGS / "asterisk_en.yaml"), "--kapa", "4")
    assert code == 1 and "did you mean kappa" in error
    (tmp_path / "typo.yaml").write_text("reference_batch_size: 4\nmax_stepps: 3\n")
    code, _, error = plan(str(tmp_path / "typo.yaml"))
    assert code == 1 and "did you mean max_steps" in error
    assert plan(*FLAGS, "--kappas", "0")[0] == 1
