"""`run.json`: the command and its settings, without secrets."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from hf_ema_scaling.recipe.config import read_mapping
from hf_ema_scaling.recipe.record import preparation, run_record


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
def test_secrets_are_left_out(config: Path, words: list[str]) -> None:
    record = run_record(["r.py", "--config", str(config), *words, "--max_new_tokens", "8", "--kappa", "2"], 2)
    text = json.dumps(record)
    assert "hf_secret" not in text and "hf_in_the_file" not in text
    assert record["settings"]["max_new_tokens"] == "8" and "--max_new_tokens 8" in " ".join(record["command"])
    assert record["command"][:4] == ["accelerate", "launch", "--num_processes", "2"]
    assert record["command"][-2:] == ["--kappa", "2"] and record["settings"]["kappa"] == "2"


def test_other_programs_have_no_settings() -> None:
    record = run_record(["pytest", "-q", "tests"], 1)
    assert record["settings"] == {} and record["data"] == {} and record["base_model"] is None


CONFIGS = Path(__file__).parents[2] / "recipes" / "configs"


def test_preparation_is_what_the_settings_name() -> None:
    header = (
        "# text\n#   python scripts/prepare_a.py data/a --share 0.5\n#   python scripts/prepare_b.py data/b  # MIT\n"
        "#   python scripts/prepare_c.py data/c\n# see prepare_d.py data/d\n"
    )
    settings = {"labelled": "data/a:train", "evaluation": {"dev": "data/b/dev.jsonl"}, "model_name_or_path": "data/cc"}
    assert preparation(header, settings) == [
        "python scripts/prepare_a.py data/a --share 0.5",
        "python scripts/prepare_b.py data/b",
    ]
    assert preparation(header, {"labelled": "mine.jsonl"}) == []


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_all_local_sources_of_a_recipe_are_prepared(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(CONFIGS.parents[1])
    needed = set(re.findall(r"data/[\w-]+", str(read_mapping(path))))
    made = run_record(["r.py", "--config", str(path)], 1)["preparation"]
    assert {line.split()[2] for line in made} == needed
