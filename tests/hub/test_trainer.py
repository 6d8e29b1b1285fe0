"""Pushes by the trainers: at the end, with checkpoints, and after the best model was loaded."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from hub.conftest import content, speech_trainer
from hub.loopback import Fault, Hub
from safetensors.torch import load
from transformers import TrainerCallback

from hf_ema_scaling.hub import CardDetails, PushError, push
from hf_ema_scaling.report import draw_figures
from hf_ema_scaling.training.records import logged_metrics

NAME = "tester/run"
PLAIN = {"kappa": None, "small_batch_until": None}
"""One optimizer step per reference step."""


def stored(files: dict[str, bytes], folder: str = "") -> dict[str, torch.Tensor]:
    return load(files[f"{folder}model.safetensors"])


def holds(files: dict[str, bytes], folder: str, weights: dict[str, torch.Tensor]) -> bool:
    """Whether the weights in a folder of the repository are these, bit for bit."""
    found = stored(files, folder)
    return all(torch.equal(found[name], tensor) for name, tensor in weights.items())


def test_push_to_hub_is_what_the_command_pushes(hub: Hub, tmp_path: Path) -> None:
    made = speech_trainer(tmp_path / "run", hub_model_id=NAME)
    made.train()
    made.evaluate()
    details = CardDetails(language=("en",))
    commit = made.push_to_hub(details=details, private=True)
    files = hub.files(NAME)
    assert holds(files, "", tiny.average(made)) and holds(files, "student/", tiny.parameters(made.model))
    assert hub.repositories["model", NAME].private and hub.titles(NAME) == ["End of training"]
    assert json.loads(files["metrics.json"])["eval_ema_loss"] == made.state.log_history[-1]["eval_ema_loss"]
    figures = {name for name in files if name.startswith("figures/")}
    assert "figures/metrics.png" in figures
    assert all(f"]({name})" in files["README.md"].decode() for name in figures)
    again = push(tmp_path / "run", NAME, details=details, draw=draw_figures)
    assert again.oid == commit.oid and hub.files(NAME) == files


def test_student_at_the_root(hub: Hub, tmp_path: Path) -> None:
    made = speech_trainer(tmp_path / "run", hub_model_id=NAME, hub_weights="student")
    made.train()
    made.push_to_hub()
    files = hub.files(NAME)
    assert holds(files, "", tiny.parameters(made.model)) and holds(files, "ema/", tiny.average(made))


@pytest.mark.parametrize("metric", ["eval_loss", "eval_ema_loss"])
def test_after_load_best_both_are_in_their_places(hub: Hub, tmp_path: Path, metric: str) -> None:
    """By a metric of the average, `trainer.model` then holds the average."""
    made = speech_trainer(
        tmp_path / "run",
        hub_model_id=NAME,
        max_steps=6,
        learning_rate=0.3,
        **PLAIN,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model=metric,
    )
    made.train()
    best = made.state.best_global_step
    made.push_to_hub()
    files = hub.files(NAME)
    folder = tmp_path / "run" / f"checkpoint-{best}"
    assert files["student/model.safetensors"] == (folder / "model.safetensors").read_bytes()
    assert files["model.safetensors"] == (folder / "ema" / "model.safetensors").read_bytes()
    scored = next(entry for entry in made.state.log_history if entry["step"] == best and metric in entry)
    assert json.loads(files["metrics.json"])[metric] == scored[metric] == made.state.best_metric


@pytest.mark.parametrize("hub_weights", ["ema", "student"])
@pytest.mark.parametrize(
    ("strategy", "folders"),
    [
        ("end", []),
        ("every_save", [""]),
        ("checkpoint", ["", "last-checkpoint/"]),
        ("all_checkpoints", ["", "checkpoint-2/", "checkpoint-4/"]),
    ],
)
def test_checkpoints_are_pushed_with_their_average(
    hub: Hub, tmp_path: Path, strategy: str, folders: list[str], hub_weights: str
) -> None:
    values = {"save_strategy": "steps", "save_steps": 2, "save_total_limit": 1} | PLAIN
    made = speech_trainer(
        tmp_path / "run",
        push_to_hub=True,
        hub_model_id=NAME,
        hub_strategy=strategy,
        hub_always_push=True,
        hub_weights=hub_weights,
        **values,
    )
    made.train()
    files = hub.files(NAME)
    if not folders:
        assert files == {}
        return
    below = "student/" if hub_weights == "ema" else "ema/"
    average, student = ("", below) if hub_weights == "ema" else (below, "")
    assert holds(files, average, made.recorder.averages[3]) and holds(files, student, made.recorder.weights[3])
    assert f"{average}ema_state.json" in files and f"{student}ema_state.json" not in files
    assert {f"{folder}model.safetensors" for folder in (*folders, below)} | {
        f"{folder}ema/model.safetensors" for folder in folders[1:]
    } | ({"ema/model.safetensors"} if below == "ema/" else set()) == {
        name for name in files if name.endswith("/model.safetensors") or name == "model.safetensors"
    }
    for folder in folders[1:]:
        step = 2 if folder == "checkpoint-2/" else 4
        # The student at a checkpoint's root and the average in ema/, whatever hub_weights says: it can be resumed.
        assert holds(files, folder, made.recorder.weights[step - 1])
        assert holds(files, f"{folder}ema/", made.recorder.averages[step - 1])
        assert f"{folder}optimizer.pt" in files and f"{folder}trainer_state.json" in files
    titles = [f"Training in progress, step {step}{part}" for step in (2, 4) for part in ("", ", checkpoint")]
    assert hub.titles(NAME) == [title for title in titles if len(folders) > 1 or "checkpoint" not in title]
    assert not list((tmp_path / "run").glob(".push-*"))


def test_a_checkpoint_that_is_deleted_before_it_is_pushed_is_pushed_whole(hub: Hub, tmp_path: Path) -> None:
    values = {"save_strategy": "steps", "save_steps": 2, "save_total_limit": 1, "hub_strategy": "all_checkpoints"}
    folder = tmp_path / "run"
    made = speech_trainer(folder, push_to_hub=True, hub_model_id=NAME, hub_always_push=True, **values, **PLAIN)

    class Answer(TrainerCallback):
        """From the second checkpoint on the Hub answers: by then the first is deleted."""

        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 4:
                assert not (folder / "checkpoint-2").exists()
                hub.lock.release()

    made.add_callback(Answer())
    hub.lock.acquire()
    made.train()
    files = hub.files(NAME)
    assert holds(files, "checkpoint-2/", made.recorder.weights[1])
    assert holds(files, "checkpoint-2/ema/", made.recorder.averages[1]) and "checkpoint-2/optimizer.pt" in files
    assert len(hub.titles(NAME)) == 4


def test_a_checkpoint_that_cannot_be_pushed_does_not_end_the_run(
    hub: Hub, tmp_path: Path, waits: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    made = speech_trainer(
        tmp_path / "run",
        push_to_hub=True,
        hub_model_id=NAME,
        hub_strategy="every_save",
        hub_always_push=True,
        save_strategy="steps",
        save_steps=2,
        **PLAIN,
    )
    hub.faults = [Fault("POST", "/commit/", 403)]
    logging.getLogger("transformers").propagate = True
    with caplog.at_level(logging.WARNING):
        made.train()
    assert hub.titles(NAME) == ["Training in progress, step 4"]
    told = [record.getMessage() for record in caplog.records if "was not pushed" in record.getMessage()]
    assert len(told) == 1 and "403" in told[0]
    assert told[0].endswith(f"hf-ema-scaling push {tmp_path / 'run' / 'checkpoint-2'} --repo_id {NAME}")


def test_saved_before_pushed(hub: Hub, tmp_path: Path) -> None:
    """`save_model` at the end: student, average and records are on the disk when the push fails."""
    made = speech_trainer(tmp_path / "run", push_to_hub=True, hub_model_id=NAME)
    made.train()
    hub.faults = [Fault("POST", "/commit/", 401)]
    with pytest.raises(PushError, match="hf-ema-scaling push"):
        made.save_model()
    before = content(tmp_path / "run")
    push(tmp_path / "run", NAME)
    files = hub.files(NAME)
    assert holds(files, "", tiny.average(made)) and holds(files, "student/", tiny.parameters(made.model))
    assert content(tmp_path / "run") == before and "scaling_plan.json" in files


def test_without_waiting(hub: Hub, tmp_path: Path) -> None:
    """What is trained and saved after the call is not in what is pushed."""
    made = speech_trainer(tmp_path / "run", hub_model_id=NAME)
    made.train()
    average = tiny.average(made)
    with hub.lock:  # nothing is answered meanwhile
        future = made.push_to_hub(blocking=False)
        with torch.no_grad():
            for tensor in made.average.tensors().values():
                tensor.zero_()
        made.save_model()
    future.result(timeout=60)
    assert holds(hub.files(NAME), "", average)


def test_arguments_of_the_stock_card(hub: Hub, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    made = speech_trainer(tmp_path / "run", hub_model_id=NAME)
    made.train()
    logging.getLogger("transformers").propagate = True
    card: dict[str, Any] = {"language": "en", "license": "mit", "tags": ["asr"], "dataset_tags": "a/b", "tasks": "x"}
    made.push_to_hub(**card, finetuned_from="a/base", model_name="Named")
    text = hub.files(NAME)["README.md"].decode()
    for told in ("- en\n", "license: mit\n", "- asr\n", "base_model: a/base\n", "datasets:\n- a/b\n", "\n# Named\n"):
        assert told in text, told
    assert "The model card has no use for tasks" in caplog.text


def test_adapters(hub: Hub, tmp_path: Path) -> None:
    adapted = pytest.importorskip("adapted")
    args = tiny.arguments(tmp_path / "run", hub_model_id=NAME)
    made = tiny.trainer(adapted.lora_bert(), args, tiny.sentences(16))
    made.train()
    made.push_to_hub()
    files, run = hub.files(NAME), tmp_path / "run"
    average, student = (folder / "adapter_model.safetensors" for folder in (run / "ema" / "adapter", run))
    assert files["adapter_model.safetensors"] == average.read_bytes()
    assert files["student/adapter_model.safetensors"] == student.read_bytes() != average.read_bytes()
    assert files["adapter_config.json"] and files["student/adapter_config.json"] and "ema_state.json" in files
    assert not [name for name in files if name.startswith("adapter/") or name == "training_args.bin"]
    card = files["README.md"].decode()
    assert "library_name: peft\n" in card and "parameters of adapters" in card
    assert f'PeftModel.from_pretrained(base, "{NAME}", subfolder="student")' in card


def test_nothing_was_trained(hub: Hub, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"there is no average to push: call train\(\) first"):
        speech_trainer(tmp_path / "run", hub_model_id=NAME).push_to_hub()
    assert hub.requests == []


def test_metrics_are_those_of_the_weights(tmp_path: Path) -> None:
    made = speech_trainer(tmp_path / "run", **PLAIN)
    made.train()
    made.state.log_history.insert(0, {"eval_loss": 1.0, "step": 3})
    metrics = logged_metrics(made.state, 4)
    assert "eval_loss" not in metrics  # step 3 of 4
    assert metrics["optimizer_steps"] == metrics["reference_steps"] == 4 and "train_loss" in metrics
    expected = {key: value for key, value in made.evaluate().items() if key.startswith("eval_")}
    assert expected.items() <= logged_metrics(made.state, 4).items()
    made.state.best_global_step = 3
    assert logged_metrics(made.state, 4, best=True)["eval_loss"] == expected["eval_loss"]  # measured after training
    made.state.log_history.pop()
    assert logged_metrics(made.state, 4, best=True)["eval_loss"] == 1.0


def test_hub_weights_are_one_of_two(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="hub_weights must be one of ema, student, got 'best'"):
        tiny.arguments(tmp_path, hub_weights="best")
