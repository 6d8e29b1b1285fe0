"""`run.json`: the command and its settings, without secrets."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hf_ema_scaling.recipe.record import run_record, write_run_record


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("here.jsonl").write_text("", encoding="utf-8")
    path = tmp_path / "my recipe.yaml"
    path.write_text(
        "labelled: owner/speech:clean:train\nunlabelled: here.jsonl\nevaluation: {dev: here.jsonl, test: a/b:test}\n"
        "model_name_or_path: owner/base\nlearning_rate: 5e-4\nhub_token: hf_in_the_file\nmax_steps: 10\n",
        encoding="utf-8",
    )
    return path


def test_file_and_command_line_together(config: Path) -> None:
    argv = ["r.py", "--config", str(config), "--max_steps", "20", "--unlabelled", "null", "--kappa=2", "--bf16"]
    record = run_record(argv, 1)
    assert record["command"] == ["python", *argv]
    settings = record["settings"]
    assert settings["max_steps"] == "20" and settings["learning_rate"] == 5e-4 and settings["kappa"] == "2"
    assert settings["unlabelled"] is None and settings["bf16"] == "true"
    assert record["data"] == {"labelled": "owner/speech:clean:train", "evaluation": "dev: here.jsonl, test: a/b:test"}
    assert record["hub_datasets"] == ["owner/speech"]
    assert record["base_model"] == "owner/base" and record["base_model_on_hub"]


def test_local_sources_are_not_taken_for_names_on_the_hub(config: Path) -> None:
    Path("folder").mkdir()
    argv = ["r.py", "--config", str(config), "--labelled", "folder:train", "--model_name_or_path", "folder"]
    record = run_record(argv, 1)
    assert record["hub_datasets"] == [] and not record["base_model_on_hub"]


@pytest.mark.parametrize(
    "words",
    [["--hub_token", "hf_secret"], ["--hub_token=hf_secret"], ["--hub-token", "hf_secret"], ["--token=hf_secret"]],
)
def test_secrets_are_left_out(config: Path, tmp_path: Path, words: list[str]) -> None:
    write_run_record(tmp_path, ["r.py", "--config", str(config), *words, "--kappa", "2"], 2)
    text = (tmp_path / "run.json").read_text(encoding="utf-8")
    assert "hf_secret" not in text and "hf_in_the_file" not in text
    record = json.loads(text)
    assert record["command"][:4] == ["accelerate", "launch", "--num_processes", "2"]
    assert record["command"][-2:] == ["--kappa", "2"] and record["settings"]["kappa"] == "2"


def test_other_programs_have_no_settings() -> None:
    record = run_record(["pytest", "-q", "tests"], 1)
    assert record["settings"] == {} and record["data"] == {} and record["base_model"] is None
