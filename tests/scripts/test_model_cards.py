"""The cards in `model_cards/`, and the script that makes them."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
from huggingface_hub import ModelCard

pytest.importorskip("matplotlib")

from hub.conftest import speech_trainer

from hf_ema_scaling.hub import CardDetails
from hf_ema_scaling.hub.model_card import TAGS
from hf_ema_scaling.recipe.record import run_record
from hf_ema_scaling.training.records import write_json

CARDS = Path(__file__).parents[2] / "model_cards"
FIGURES = {"metrics": ("eval_loss",)}
LARGEST = 200_000
"""Bytes of a figure in the repository."""
MADE = sorted(path.parent.name for path in CARDS.glob("*/README.md"))


def load() -> ModuleType:
    path = Path(__file__).parents[2] / "scripts" / "model_cards.py"
    spec = importlib.util.spec_from_file_location("model_cards", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Where data classes look up their annotations.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


script = load()


def test_every_card_is_known_and_listed() -> None:
    listed = re.findall(r"\| \[([\w-]+)\]\(\1/README\.md\) \|", (CARDS / "README.md").read_text(encoding="utf-8"))
    assert sorted(listed) == MADE and set(MADE) <= script.MODELS.keys()


@pytest.mark.parametrize("name", MADE)
def test_cards_are_whole(name: str) -> None:
    card = ModelCard.load(CARDS / name / "README.md")
    assert set(TAGS) <= set(card.data.tags) and card.data.license and card.data.model_name == name
    results = {(found.dataset_name, found.metric_name): found.metric_value for found in card.data.eval_results}
    assert {weights for _, metric in results for weights in re.findall(r"\((\w+)\)$", metric)} == {
        "average",
        "student",
    }
    for value in results.values():
        assert f"{value:.4f}" in card.text
    figures = re.findall(r"!\[[^]]*\]\(([^)]+)\)", card.text)
    assert figures and {f"figures/{path.name}" for path in (CARDS / name / "figures").iterdir()} == set(figures)
    assert all((CARDS / name / figure).stat().st_size <= LARGEST for figure in figures)
    assert not script._MACHINE.search(card.content), script._MACHINE.search(card.content)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "runs" / "tiny"
    made = speech_trainer(folder, eval_strategy="steps", eval_steps=2)
    made.train()
    made.evaluate()
    made.save_model()
    made.save_state()
    return folder


def test_a_card_is_made_of_a_run(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_json(run, "run.json", run_record(["recipes/asr_ctc.py", "--output_dir", "runs/tiny"], 1))
    details = CardDetails(title="tiny", license="mit")
    monkeypatch.setitem(script.MODELS, "tiny", script.Card("runs/tiny", details, FIGURES))
    (run / "old.png").write_bytes(b"not to be shown")
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    cards = tmp_path / "cards"
    folder = script.make("tiny", tmp_path, cards)
    assert sorted(p.relative_to(cards).as_posix() for p in cards.rglob("*") if p.is_file()) == [
        *("tiny/README.md", "tiny/figures/metrics.png")
    ]
    text = (folder / "README.md").read_text(encoding="utf-8")
    assert "python recipes/asr_ctc.py --output_dir runs/tiny" in " ".join(text.replace("\\\n", " ").split())
    assert "](figures/metrics.png)" in text
    assert "old.png" not in text
    assert before == {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    monkeypatch.setitem(script.MODELS, "tiny", script.Card("runs/tiny", details, {"metrics": ("eval_wer",)}))
    with pytest.raises(ValueError, match=r"there is no chart of eval_wer, but of eval_loss"):
        script.make("tiny", tmp_path, cards)


def test_paths_of_a_machine_are_refused(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_json(run, "run.json", run_record(["recipes/asr_ctc.py", "--labelled", "/home/ann/a.jsonl"], 1))
    monkeypatch.setitem(
        script.MODELS,
        "tiny",
        script.Card("runs/tiny", CardDetails(title="tiny"), FIGURES),
    )
    with pytest.raises(ValueError, match=r"tiny: the card would name /home/ann/a.jsonl: run the recipe with relative"):
        script.make("tiny", tmp_path, tmp_path / "cards")
    assert not (tmp_path / "cards").exists()


@pytest.mark.parametrize("name", MADE)
def test_cards_say_how_to_prepare_what_their_run_needs(name: str) -> None:
    """Every local folder that a card names is made by a command on it."""
    text = (CARDS / name / "README.md").read_text(encoding="utf-8")
    needed = set(re.findall(r"\bdata/[\w-]+", text.partition("## Training data")[2].partition("## Figures")[0]))
    reproduced = text.partition("## How to reproduce it")[2]
    assert needed <= set(re.findall(r"^python scripts/prepare_\w+\.py (data/[\w-]+)", reproduced, re.M))
