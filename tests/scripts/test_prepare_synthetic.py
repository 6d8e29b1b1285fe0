from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import typer
from datasets import load_from_disk
from typer.testing import CliRunner

from hf_ema_scaling.recipe import load_speech

pytest.importorskip("espeakng_loader")
LENGTHS = ("--labelled-minutes", "0.1", "--unlabelled-minutes", "0.2", "--evaluation-minutes", "0.1")


def load() -> ModuleType:
    path = Path(__file__).parents[2] / "scripts" / "prepare_synthetic.py"
    spec = importlib.util.spec_from_file_location("prepare_synthetic", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


script = load()
app = typer.Typer()
app.command()(script.main)


def samples(row: dict[str, dict[str, list[int]]]) -> np.ndarray:
    return np.array(row["audio"]["array"], dtype=np.float64) / 32767


def test_the_splits_are_sources_of_a_recipe(tmp_path: Path) -> None:
    output = tmp_path / "data" / "synthetic"
    done = CliRunner().invoke(app, [str(output), *LENGTHS, "--more-noise", "0.2", "--seed", "3"])
    assert done.exit_code == 0, done.output
    clean, noisy = (load_speech(f"{output}:{name}") for name in ("evaluation", "evaluation_noisy"))
    assert clean["text"] == noisy["text"] and len(clean) == len(noisy) > 1
    added = np.concatenate([samples(b) - samples(a) for a, b in zip(clean, noisy, strict=True)])
    assert added.std() == pytest.approx(0.2, rel=0.02) and abs(added.mean()) < 0.005
    # Every utterance has noise of its own.
    first, second = (samples(noisy[row])[:4000] - samples(clean[row])[:4000] for row in (0, 1))
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.1
    assert load_speech(f"{output}:labelled").column_names == ["audio", "text"]
    unlabelled = load_speech(f"{output}:unlabelled", text_column=None)
    assert unlabelled.column_names == ["audio"]
    assert "text" not in load_from_disk(str(output))["unlabelled"].column_names
    stated = json.loads((output / "config.json").read_text())
    assert (stated["seed"], stated["more_noise"], stated["labelled_minutes"]) == (3, 0.2, 0.1)
    assert [path.name for path in output.parent.iterdir()] == ["synthetic"]


def test_a_folder_in_use_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep")
    done = CliRunner().invoke(app, [str(tmp_path), *LENGTHS])
    assert done.exit_code == 1 and "is not empty" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
