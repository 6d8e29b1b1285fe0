"""Runs that no recipe started have whole cards: an own program with our trainers, and one with `EMACallback`."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import stock_runs
import tiny
import torch
from hub.conftest import speech_trainer
from hub.loopback import Hub
from transformers import TrainerCallback

from hf_ema_scaling.ema.storage import STATE_NAME
from hf_ema_scaling.hub import push
from hf_ema_scaling.training.run_record import command_line, own_record, told, without_secrets

NAME = "tester/own"
COMMAND = ["train.py", "--rows", "12", "--hub_token", "hf_secret"]


@pytest.fixture(autouse=True)
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """This process is `python train.py ...`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", COMMAND)
    monkeypatch.setitem(sys.modules, "__main__", ModuleType("__main__"))


def card(hub: Hub) -> str:
    return hub.files(NAME)["README.md"].decode()


def row(text: str, label: str) -> list[str]:
    """Cells of the first row of a table with this label."""
    line = next(line for line in text.splitlines() if line.startswith(f"| {label} |"))
    return [cell.strip() for cell in line.strip("|").split("|")][1:]


def reproduced(text: str) -> str:
    return " ".join(text.partition("## How to reproduce it")[2].replace("\\\n", " ").split())


@pytest.mark.parametrize("order", ["save last", "save first"])
def test_own_program_with_our_trainer(hub: Hub, order: str) -> None:
    """The order of `Trainer`'s examples, `save_model` before `evaluate`, loses no metrics."""
    made = speech_trainer(Path("run"))
    made.train()
    if order == "save first":
        made.save_model()
    scored = made.evaluate()
    if order == "save last":
        made.save_model()
    push("run", NAME)
    text = card(hub)
    assert row(text, "kappa") == ["1", "1", "2"] and row(text, "batch size (samples)") == ["4", "4", "8"]
    rho = made.args.ema_momentum
    assert row(text, "EMA momentum") == [f"{value:.7g}" for value in (rho, rho, rho**2)]
    half_life = made.plan.reference_values()["half_life_units"]
    assert f"rho = {rho:g} per reference step" in text and f"half-life of {half_life:.6g} samples" in text
    assert row(text, "evaluation set") == ["loss", f"{scored['eval_ema_loss']:.4f}", f"{scored['eval_loss']:.4f}"]
    assert "python train.py --rows 12 --hub_token ..." in reproduced(text) and "hf_secret" not in text
    assert "- labelled: 12 rows" in text and "- evaluation: 3 rows" in text
    assert f"After {made.state.global_step} optimizer steps" in text


def test_a_folder_of_ones_own_has_all_records(hub: Hub) -> None:
    args = tiny.arguments(Path("run"), max_steps=4)
    unlabelled = {"unlabeled_dataset": tiny.speech(12, 1, labels=False, features=8)}
    more = {"pseudo_label_args": tiny.pseudo(pl_start=2), **unlabelled}
    made = tiny.trainer(tiny.parakeet(), args, tiny.speech(12, features=8), **more)
    made.train()
    made.save_model("final")
    push("final", NAME)
    files = hub.files(NAME)
    assert {"scaling_plan.json", "metrics.json", "run.json", "ledger.json"} <= files.keys()
    assert json.loads(files["run.json"])["data"]["unlabelled"] == "12 rows"
    assert "## Pseudo-labels" in card(hub) and "Pseudo-labels start at reference step 2" in card(hub)


def test_a_run_that_was_killed_has_a_plan(hub: Hub) -> None:
    """A checkpoint takes plan and command from the folder that it lies in, though the run had no end."""

    class Killed(Exception):
        pass

    made = speech_trainer(Path("run"), save_strategy="steps", save_steps=2)

    make_step = made.training_step

    def step(*given: Any, **named: Any) -> Any:
        if made.state.global_step == 2:
            raise Killed
        return make_step(*given, **named)

    made.training_step = step
    with pytest.raises(Killed):
        made.train()
    push("run/checkpoint-2", NAME)
    assert row(card(hub), "kappa") == ["1", "1", "2"] and "python train.py --rows 12" in reproduced(card(hub))


def test_stock_trainer_with_the_callback(hub: Hub) -> None:
    average = stock_runs.callback(reference_batch_size=2)
    options = {"save_strategy": "steps", "save_steps": 6, "warmup_steps": 2, "weight_decay": 0.01}
    with pytest.warns(UserWarning, match="scales only the momentum"):
        made = stock_runs.trainer(average, Path("run"), **options)
        made.eval_dataset = stock_runs.Sentences(8)
        made.train()
    push("run/checkpoint-6", NAME)
    text = card(hub)
    assert row(text, "kappa") == ["1", "2"] and row(text, "batch size (samples)") == ["2", "4"]
    assert row(text, "optimizer steps") == ["12", "6"]
    assert row(text, "EMA momentum") == ["0.9", "0.81"]
    assert row(text, "peak learning rate") == ["0.01", "0.01"] and row(text, "weight decay") == ["0.01", "0.01"]
    assert row(text, "betas") == ["0.9, 0.999"] * 2
    assert "nothing scales the\noptimizer" in text and "EMACallback scaled the momentum alone" in text
    assert "half-life of 13.1576 samples" in text  # 2 ln 2 / -ln 0.9
    assert "python train.py --rows 12" in reproduced(text) and "- training: 64 rows" in text
    student = made.evaluate()["eval_loss"]
    with average.averaged_weights():
        of_average = made.evaluate(metric_key_prefix="eval_ema")["eval_ema_loss"]
    assert student != of_average
    made.save_model()
    average.export("run/ema")
    push("run", NAME)
    assert row(card(hub), "evaluation set") == ["loss", f"{of_average:.4f}", f"{student:.4f}"]
    state = json.loads(Path("run/ema", STATE_NAME).read_text())
    assert state["state"]["global_step"] == json.loads(hub.files(NAME)["metrics.json"])["optimizer_steps"] == 6


def test_an_evaluation_along_the_run_is_the_students_still(tmp_path: Path) -> None:
    average = stock_runs.callback()
    made = stock_runs.trainer(average, tmp_path / "run", eval_strategy="no")
    made.eval_dataset, made.args.eval_strategy, made.args.eval_steps = stock_runs.Sentences(8), "steps", 3
    made.train()
    student = [row["eval_loss"] for row in made.state.log_history if "eval_loss" in row]
    with average.averaged_weights():
        made.evaluate(metric_key_prefix="eval_ema")
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert len(student) == 2 and metrics["eval_loss"] == student[1] != metrics["eval_ema_loss"]


def test_scores_of_the_average_are_not_told_as_the_students(tmp_path: Path) -> None:
    """Evaluated in the block with Trainer's own prefix they are the average's; of other weights they are nobody's."""
    average, slow = stock_runs.callback(), stock_runs.callback(momentum=0.99, name="slow")
    made = stock_runs.trainer(average, tmp_path / "run", slow)
    made.eval_dataset = stock_runs.Sentences(8)
    made.train()
    student = made.evaluate()["eval_loss"]
    scored = []
    for callback in (average, slow):
        with callback.averaged_weights():
            scored.append(made.evaluate()["eval_loss"])
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert (metrics["eval_loss"], metrics["eval_ema_loss"]) == (student, scored[0])
    assert len({student, *scored}) == 3


def test_nor_are_they_where_they_were_measured_along_the_run(tmp_path: Path) -> None:
    class Evaluates(TrainerCallback):
        def on_step_end(self, _: Any, state: Any, *__: Any, **___: Any) -> None:
            if state.global_step == state.max_steps:
                self.student = made.evaluate()["eval_loss"]
                with callback.averaged_weights():
                    self.average = made.evaluate()["eval_loss"]

    callback, evaluates = stock_runs.callback(), Evaluates()
    made = stock_runs.trainer(callback, tmp_path, evaluates)
    made.eval_dataset = stock_runs.Sentences(8)
    made.train()
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert evaluates.student != evaluates.average
    assert metrics["eval_loss"] == evaluates.student and metrics["eval_ema_loss"] == evaluates.average


def test_the_callback_leaves_files_of_others(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "metrics.json").write_text('{"mine": 1}')
    (folder / "run.json").write_text("[1]")
    logging.getLogger("transformers").propagate = True
    made = stock_runs.trainer(stock_runs.callback(), folder)
    made.train()
    assert (folder / "metrics.json").read_text() == '{"mine": 1}' and (folder / "run.json").read_text() == "[1]"
    assert caplog.text.count("as it is: another program wrote it") == 2
    plan = json.loads((folder / "scaling_plan.json").read_text())
    assert [stage["kappa"] for stage in plan["stages"]] == [1.0]
    stock_runs.trainer(stock_runs.callback(reference_batch_size=8), folder).train()
    plan = json.loads((folder / "scaling_plan.json").read_text())
    assert [stage["kappa"] for stage in plan["stages"]] == [0.5]


def test_of_several_averages_that_without_a_name_has_the_records(tmp_path: Path) -> None:
    slow = stock_runs.callback(momentum=0.99, name="slow")
    stock_runs.trainer(slow, tmp_path / "slow").train()
    assert not (tmp_path / "slow" / "scaling_plan.json").exists()
    stock_runs.trainer(stock_runs.callback(), tmp_path / "both", slow).train()
    plan = json.loads((tmp_path / "both" / "scaling_plan.json").read_text())
    assert plan["recipe"]["ema_momentum"] == stock_runs.RHO


def test_an_optimizer_without_a_rule_is_no_error(tmp_path: Path) -> None:
    made = stock_runs.trainer(stock_runs.callback(), tmp_path / "run")
    made.optimizer = torch.optim.Adamax(made.model.parameters(), lr=0.02)
    made.train()
    plan = json.loads((tmp_path / "run" / "scaling_plan.json").read_text())
    assert plan["reference"]["learning_rate"] == 0.02 and plan["reference"]["betas"] is None
    assert plan["recipe"]["optimizer"] == "Adamax"


# ---- The command, the data


@pytest.mark.parametrize(
    ("argv", "processes", "expected"),
    [
        (["train.py", "--a", "1"], 1, "python train.py --a 1"),
        (["train.py"], 4, "accelerate launch --num_processes 4 train.py"),
        (["/usr/bin/own-program", "run"], 1, "own-program run"),
        (["-c", "1"], 1, None),
        ([""], 1, None),
        (["/lib/ipykernel_launcher.py", "-f", "kernel-1.json"], 1, None),
    ],
)
def test_command_line(argv: list[str], processes: int, expected: str | None) -> None:
    words = command_line(argv, processes)
    assert (None if words is None else " ".join(words)) == expected


def test_command_line_of_a_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    main = ModuleType("__main__")
    main.__spec__ = type("Spec", (), {"name": "package.train.__main__"})()
    monkeypatch.setitem(sys.modules, "__main__", main)
    assert command_line(["/where/package/train/__main__.py", "-v"], 1) == ["python", "-m", "package.train", "-v"]
    monkeypatch.setitem(sys.modules, "__main__", ModuleType("__main__"))
    assert command_line([str(tmp_path / "in" / "train.py")], 1) == ["python", "in/train.py"]
    assert command_line(["/elsewhere/train.py"], 1) == ["python", "train.py"]


def test_secrets_of_a_command_are_left_out() -> None:
    key = "hf_" + "Q" * 34
    words = [
        "--api-key",
        "k",
        "--hf_token=t",
        "--tokenizer",
        "bert",
        "--max_new_tokens",
        "8",
        "--x",
        key,
        "-t",
        key,
    ]
    shown = "--api-key ... --hf_token=... --tokenizer bert --max_new_tokens 8 --x ... -t ..."
    assert " ".join(without_secrets(words)) == shown


def test_data_sets_in_words() -> None:
    rows = tiny.sentences(1200)
    assert told(rows) == "1,200 rows"
    rows.info.dataset_name, rows.info.config_name = "glue", "sst2"
    assert told({"dev": rows, "test": tiny.sentences(3)}) == "dev: glue, sst2, 1,200 rows; test: 3 rows"
    rows.info.download_checksums = {"hf://datasets/nyu-mll/glue@abc/sst2/train.parquet": {}}
    record = own_record({"labelled": rows, "unlabelled": None}, "/models/bert", 1)
    assert record["hub_datasets"] == ["nyu-mll/glue"] and record["base_model"] == "bert"
    assert record["data"] == {"labelled": "nyu-mll/glue, sst2, 1,200 rows"}
    assert told(stock_runs.Streamed()) == "a stream"
