"""`hf-ema-scaling push` and the script for cards."""

from __future__ import annotations

from pathlib import Path

import pytest
from hub.conftest import content, speech_trainer
from hub.loopback import Fault, Hub
from typer.testing import CliRunner

from hf_ema_scaling.cli import main
from hf_ema_scaling.hub import CardDetails, render_model_card

NAME = "tester/model"
DETAILS = ["--language", "en", "--license", "mit", "--dataset", "a/b", "--tag", "asr", "--limits", "None known."]


def test_push(hub: Hub, run: Path) -> None:
    result = CliRunner().invoke(main, ["push", str(run), "--repo_id", NAME, "--private", "--hub-weights", "student"])
    assert result.exit_code == 0, result.output
    repository = hub.repositories["model", NAME]
    assert f"{hub.url}/{NAME} is at {repository.branches['main']}" in result.output and repository.private
    assert hub.files(NAME)["model.safetensors"] == (run / "model.safetensors").read_bytes()


@pytest.mark.parametrize("words", [[], ["--no-figures"]])
def test_push_draws_figures(hub: Hub, tmp_path: Path, words: list[str]) -> None:
    pytest.importorskip("matplotlib")
    folder = tmp_path / "run"
    made = speech_trainer(folder, eval_strategy="steps", eval_steps=2, logging_strategy="steps", logging_steps=1)
    made.train()
    made.save_model()
    made.save_state()
    before = content(folder)
    result = CliRunner().invoke(main, ["push", str(folder), "--repo_id", NAME, *words])
    assert result.exit_code == 0, result.output
    files = hub.files(NAME)
    drawn = {name: data for name, data in files.items() if name.endswith(".png")}
    assert drawn.keys() == (set() if words else {f"figures/{name}.png" for name in ("average", "metrics", "training")})
    assert all(data[:8] == b"\x89PNG\r\n\x1a\n" and len(data) > 5000 for data in drawn.values())
    card = files["README.md"].decode()
    assert [name for name in drawn if f"]({name})" not in card] == [] and content(folder) == before


def test_push_without_matplotlib_says_so(
    hub: Hub, run: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *rest: None)
    result = CliRunner().invoke(main, ["push", str(run), "--repo_id", NAME])
    assert result.exit_code == 0 and "model.safetensors" in hub.files(NAME)
    assert 'plots need matplotlib: pip install "hf-ema-scaling[report]"' in caplog.text


def test_push_labels(hub: Hub, labels: Path) -> None:
    result = CliRunner().invoke(main, ["push", str(labels), "--repo_id", "tester/labels", *DETAILS])
    assert result.exit_code == 0, result.output
    assert "labelling.json" in hub.files("tester/labels", "dataset")


def test_dry_run_sends_nothing(hub: Hub, run: Path, tmp_path: Path) -> None:
    before = content(run)
    details = CardDetails(language=("en",), license="mit", datasets=("a/b",), tags=("asr",), limits="None known.")
    expected = render_model_card(run, repo_id=NAME, details=details)
    result = CliRunner().invoke(main, ["push", str(run), "--repo_id", NAME, "--dry_run", *DETAILS])
    assert result.exit_code == 0 and result.stdout == f"{expected}\n"
    folder = Path(result.stderr.strip().rpartition(": ")[2])
    assert (folder / "README.md").read_text(encoding="utf-8") == expected
    assert (folder / "student" / "model.safetensors").read_bytes() == (run / "model.safetensors").read_bytes()
    card = tmp_path / "cards" / "README.md"
    command = ["push", str(run), "--repo_id", NAME, "--dry-run", "--card", str(card), *DETAILS]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 0 and result.stdout == "" and card.read_text(encoding="utf-8") == expected
    assert hub.requests == [] and content(run) == before


def test_failures_are_told_without_a_traceback(hub: Hub, run: Path) -> None:
    hub.faults = [Fault("POST", "/api/repos/create", 401)]
    words = ["push", str(run), "--repo_id", NAME, "--revision", "it's", "--public"]
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 1 and "the Hub refused the token" in result.stderr
    again = f"""hf-ema-scaling push {run} --repo_id {NAME} --public --revision 'it'"'"'s'\n"""
    assert result.stderr.endswith(f"To push it again: {again}")
    result = CliRunner().invoke(main, ["push", str(run / "ema"), "--repo_id", NAME])
    assert result.exit_code == 1 and "no average to push" in result.stderr


@pytest.mark.parametrize(
    ("words", "told"),
    [([], "OWNER/NAME on the Hub"), (["--card", "x.md"], "goes with"), (["--license", "MIT License"], "lower case")],
)
def test_wrong_words(hub: Hub, run: Path, words: list[str], told: str) -> None:
    result = CliRunner().invoke(main, ["push", str(run), *words])
    assert result.exit_code != 0 and told in " ".join(result.output.split()) and hub.requests == []
