"""The demo on a corpus of seconds: its arms run the plan, and its summary says what its logs say."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("espeakng_loader")
pytest.importorskip("matplotlib")

import tiny
from hub.conftest import hub as loopback_hub  # noqa: F401 - a fixture
from hub.loopback import Hub
from safetensors.torch import load_file
from transformers import TrainerCallback
from typer.testing import CliRunner

from hf_ema_scaling import demo
from hf_ema_scaling.cli import main
from hf_ema_scaling.data.synthetic import SyntheticCorpusConfig
from hf_ema_scaling.demo import arms, run
from hf_ema_scaling.hub import push

CORPUS = SyntheticCorpusConfig(
    labelled_minutes=0.3, unlabelled_minutes=0.5, evaluation_minutes=0.2, labelled_voices=3, unlabelled_voices=4
)
STEPS = 20
CONFIG = demo.DemoConfig().of_length(STEPS)
STARTS: dict[str, tuple[int, tiny.Tensors, tiny.Tensors]] = {}


class Starts(TrainerCallback):
    """Notes step, student and average of an arm before its first step."""

    def __init__(self, arm: str, trainer: Any) -> None:
        self.arm, self.trainer = arm, trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        STARTS[self.arm] = state.global_step, tiny.parameters(self.trainer.model), tiny.average(self.trainer)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("demo")
    build = arms.build_trainer

    def observed(job: arms.ArmJob, *rest: Any) -> Any:
        made = build(job, *rest)
        made.add_callback(Starts(job.name, made))
        return made

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(arms, "build_trainer", observed)
        return folder, demo.run_demo(folder, arms=demo.ARMS, config=CONFIG, corpus=CORPUS, kappa=8.0, processes=1)


@pytest.mark.slow
def test_arms_take_the_steps_of_the_plan(runs: tuple[Path, dict[str, Any]]) -> None:
    _, summary = runs
    start = CONFIG.pl_start
    steps = start + -(-(STEPS - start) // 8)
    assert {name: arm["steps"] for name, arm in summary["arms"].items()} == dict.fromkeys(demo.ARMS, steps)


@pytest.mark.slow
def test_summary_has_the_promised_keys_and_finite_numbers(runs: tuple[Path, dict[str, Any]]) -> None:
    folder, summary = runs
    assert set(summary) == {"arms", "gap_recovered", "kappa", "seed", "peak_memory_bytes"}
    for arm in summary["arms"].values():
        assert set(arm) == {"student_wer", "average_wer", "seconds", "steps"}
        assert arm["student_wer"] > 0 and arm["average_wer"] > 0
    assert summary["peak_memory_bytes"] > 100 * 2**20
    written = json.loads((folder / "summary.json").read_text())
    assert {key: written[key] for key in summary} == summary
    assert (folder / "report.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


@pytest.mark.slow
def test_arms_take_large_batches_from_the_labelled_phase_on(runs: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = runs
    start = CONFIG.pl_start
    logs = {arm: json.loads((folder / arm / "ema" / "ema_state.json").read_text())["state"] for arm in demo.ARMS}
    assert {log["borders"][0]["count"] for log in logs.values()} == {start}
    assert {log["borders"][1]["kappa"] for log in logs.values()} == {8.0}


@pytest.mark.slow
def test_arms_start_from_the_weights_and_the_average_of_one_labelled_phase(runs: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = runs
    start = CONFIG.pl_start
    branch = folder / "labelled_phase" / f"checkpoint-{start}"
    student, average = load_file(branch / "model.safetensors"), load_file(branch / "ema" / "model.safetensors")
    assert tiny.difference(student, average) > 1e-3
    for arm in demo.ARMS:
        step, first_student, first_average = STARTS[arm]
        assert step == start
        assert tiny.same_bits(first_student, {name: student[name] for name in first_student}), arm
        assert tiny.same_bits(first_average, {name: average[name] for name in first_average}), arm
    ends = [load_file(folder / arm / "model.safetensors") for arm in demo.ARMS]
    assert all(tiny.difference(student, end) > 1e-3 for end in ends)
    assert min(tiny.difference(ends[i], ends[j]) for i, j in ((0, 1), (0, 2), (1, 2))) > 1e-4


@pytest.mark.slow
def test_json_is_one_object_and_the_ablation_leaves_the_momentum_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (run, arms):
        monkeypatch.setattr(module, "SyntheticCorpusConfig", lambda seed: dataclasses.replace(CORPUS, seed=seed))
    options = ["--arms", "labelled", "--steps", str(STEPS), "--kappa", "8", "--no-scale-ema", "--json"]
    done = CliRunner().invoke(main, ["demo", *options, "--output-dir", str(tmp_path / "run")])
    assert done.exit_code == 0, done.output
    summary = json.loads(done.stdout)
    assert summary["kappa"] == 8.0 and summary["seed"] == 0 and summary["gap_recovered"] is None
    written = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert written["scale_ema"] is False and {key: written[key] for key in summary} == summary
    logs = json.loads((tmp_path / "run" / "labelled" / "trainer_state.json").read_text())["log_history"]
    scaled = [row for row in logs if row.get("ema/kappa") == 8.0]
    assert scaled
    assert [row["ema/momentum"] for row in scaled] == pytest.approx([demo.DemoConfig().ema_momentum] * len(scaled))
    record = json.loads((tmp_path / "run" / "labelled" / "run.json").read_text())
    words = "demo --arms labelled --seed 0 --kappa 8 --no-scale-ema --steps 20"
    assert " ".join(record["command"]) == f"hf-ema-scaling {words}" and "unlabelled" not in record["data"]


@pytest.mark.slow
def test_an_arm_is_pushed_with_a_whole_card(
    runs: tuple[Path, dict[str, Any]],
    loopback_hub: Hub,  # noqa: F811
) -> None:
    folder, summary = runs
    push(folder / "pseudo", "tester/demo")
    files = loopback_hub.files("tester/demo")
    card = files["README.md"].decode()
    assert {"run.json", "scaling_plan.json", "metrics.json", "ledger.json"} <= files.keys()
    assert "| kappa | 1 | 1 | 8 |" in card and "automatic-speech-recognition" in card
    rho = CONFIG.ema_momentum
    assert f"| EMA momentum | {rho} | {rho} | {rho**8:.7g} |" in card and "half-life of 733.798 samples" in card
    scored = summary["arms"]["pseudo"]
    assert f"| evaluation set | WER | {scored['average_wer']:.4f} | {scored['student_wer']:.4f} |" in card
    assert "- unlabelled: the same, 0.5 minutes by other voices" in card
    # No command makes this corpus.
    assert "The command was not recorded." in card and '"speech"' not in card


def test_the_command_names_what_is_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    done = CliRunner().invoke(main, ["demo", "--output-dir", str(tmp_path)])
    assert done.exit_code == 2 and "thesis.tex" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.slow
def test_arms_side_by_side_give_the_figures_of_arms_in_turn(runs: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    folder, alone = runs
    together = demo.run_demo(
        tmp_path, arms=("labelled", "pseudo"), config=CONFIG, corpus=CORPUS, kappa=8.0, processes=2
    )
    for arm, figures in together["arms"].items():
        assert {**figures, "seconds": 0} == {**alone["arms"][arm], "seconds": 0}
        saved = [load_file(path / arm / "ema" / "model.safetensors") for path in (folder, tmp_path)]
        assert tiny.same_bits(*saved), arm


def test_gap_is_the_share_of_the_averages_error() -> None:
    wers = {"labelled": 0.5, "pseudo": 0.3, "topline": 0.1}
    arms = {name: {"student_wer": 1.0, "average_wer": wer} for name, wer in wers.items()}
    assert demo.gap_recovered(arms) == pytest.approx(0.5)
    assert demo.gap_recovered({"labelled": arms["labelled"], "pseudo": arms["pseudo"]}) is None
    assert demo.gap_recovered({name: arms["labelled"] for name in demo.ARMS}) is None


def test_a_folder_that_is_no_demo_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(FileExistsError, match=r"thesis\.tex"):
        demo.run_demo(tmp_path, corpus=CORPUS)
    assert (tmp_path / "thesis.tex").read_text() == "precious"


def test_unknown_arms_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="oracle"):
        demo.run_demo(tmp_path, arms=["oracle"])
