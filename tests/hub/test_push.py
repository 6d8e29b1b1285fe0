"""What a push puts where, against the client of `huggingface_hub` itself."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hub.conftest import content, speech_trainer
from hub.loopback import Hub
from safetensors.torch import load

from hf_ema_scaling.ema.storage import STATE_NAME
from hf_ema_scaling.hub import CardDetails, PushError, push, stage
from hf_ema_scaling.hub.run_folder import RunFolderError

NAME = "tester/model"


def weights(files: dict[str, bytes], folder: str = "") -> dict[str, torch.Tensor]:
    return load(files[f"{folder}model.safetensors"])


@pytest.mark.parametrize(("hub_weights", "subfolder"), [("ema", "student"), ("student", "ema")])
def test_layout(hub: Hub, run: Path, hub_weights: str, subfolder: str) -> None:
    before = content(run)
    commit = push(run, NAME, hub_weights=hub_weights)
    files = hub.files(NAME)
    student, average = (run / "model.safetensors").read_bytes(), (run / "ema" / "model.safetensors").read_bytes()
    assert student != average
    root, below = (average, student) if hub_weights == "ema" else (student, average)
    assert files["model.safetensors"] == root and files[f"{subfolder}/model.safetensors"] == below
    of_average = "" if hub_weights == "ema" else "ema/"
    assert [name for name in files if name.endswith(STATE_NAME)] == [of_average + STATE_NAME]
    processor = {"vocab.json", "tokenizer_config.json", "processor_config.json"}
    model = {"config.json", "generation_config.json", "model.safetensors", *processor}
    own = {"README.md", "curve.png", "metrics.json", "scaling_plan.json", of_average + STATE_NAME}
    assert set(files) == model | {f"{subfolder}/{name}" for name in model} | own
    assert files["scaling_plan.json"] == (run / "scaling_plan.json").read_bytes()
    assert files["metrics.json"] == (run / "metrics.json").read_bytes()
    assert hub.titles(NAME) == [f"Model, {hub_weights} at the root"]
    assert commit.oid == hub.repositories["model", NAME].branches["main"]
    assert content(run) == before


def test_the_same_push_makes_no_commit(hub: Hub, run: Path) -> None:
    first = push(run, NAME)
    sent = len(hub.requests)
    second = push(run, NAME)
    assert second.oid == first.oid and len(hub.titles(NAME)) == 1
    assert not [path for method, path in hub.requests[sent:] if "/commit/" in path]


def test_the_other_layout_leaves_nothing_of_the_first(hub: Hub, run: Path, tmp_path: Path) -> None:
    push(run, NAME)
    strangers = {"notes.txt": b"mine", "last-checkpoint/model.safetensors": b"to resume", "images/a.png": b"picture"}
    repository = hub.repositories["model", NAME]
    tree = dict(repository.commits[repository.branches["main"]])
    repository.commit(tree | {name: hub.add(data) for name, data in strangers.items()}, "by hand", "main")
    push(run, NAME, hub_weights="student")
    files = hub.files(NAME)
    assert not [name for name in files if name.startswith("student/")]
    assert STATE_NAME not in files and f"ema/{STATE_NAME}" in files
    assert {name: files[name] for name in strangers} == strangers
    fresh = stage(run, tmp_path / "fresh", repo_id=NAME, hub_weights="student").parent
    assert set(files) - strangers.keys() == {name for name, digest in content(fresh).items() if digest}


def test_branch_and_privacy(hub: Hub, run: Path) -> None:
    push(run, NAME, revision="trial", private=True)
    assert hub.files(NAME) == {} and "model.safetensors" in hub.files(NAME, revision="trial")
    assert hub.repositories["model", NAME].private
    push(run, "tester/open", private=False)
    with pytest.raises(PushError, match=r"there already and is public.*--repo_id tester/open --private"):
        push(run, "tester/open", private=True)


def test_a_name_alone_is_the_owners(hub: Hub, run: Path) -> None:
    push(run, "model")
    assert f'from_pretrained("{NAME}")' in hub.files(NAME)["README.md"].decode()


def test_a_checkpoint_is_pushed_with_the_plan_of_its_run(hub: Hub, tmp_path: Path) -> None:
    made = speech_trainer(tmp_path / "run", save_strategy="steps", save_steps=2, eval_strategy="steps", eval_steps=2)
    made.train()
    state = tmp_path / "run" / "checkpoint-2" / "trainer_state.json"
    state.write_text(state.read_text().replace('"log_history": [', '"log_history": [{"eval_x": NaN, "step": 2},'))
    plan = json.dumps(made.plan.to_dict())
    (tmp_path / "run" / "scaling_plan.json").write_text(plan, encoding="utf-8")
    push(tmp_path / "run" / "checkpoint-2", NAME)
    files = hub.files(NAME)
    scored = [entry for entry in made.state.log_history if entry["step"] == 2 and "eval_loss" in entry]
    assert json.loads(files["metrics.json"])["eval_loss"] == scored[0]["eval_loss"]
    assert b"NaN" not in files["metrics.json"]
    assert json.loads(files["scaling_plan.json"]) == json.loads(plan)
    assert not [name for name in files if "optimizer" in name or "trainer_state" in name]


@pytest.mark.parametrize(
    ("missing", "told"),
    [
        ("model.safetensors", "holds no model.safetensors"),
        ("ema/ema_state.json", "no average to push"),
        ("", "there is no folder"),
    ],
)
def test_folders_that_are_no_run(run: Path, missing: str, told: str, tmp_path: Path) -> None:
    if missing:
        (run / missing).unlink()
    with pytest.raises(RunFolderError, match=told):
        stage(run if missing else run / "elsewhere", tmp_path / "staged")


def test_several_adapters_are_refused(run: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        (run / "ema" / "adapter" / name).mkdir(parents=True)
        (run / "ema" / "adapter" / name / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(RunFolderError, match=r"several adapters \(a, b\)"):
        stage(run, tmp_path / "staged")


def test_damage_is_found_before_anything_is_sent(hub: Hub, run: Path) -> None:
    path = run / "ema" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(RuntimeError, match="is damaged: tensor"):
        push(run, NAME)
    path = run / "model.safetensors"
    (run / "ema" / "model.safetensors").write_bytes(path.read_bytes()[:-8])
    with pytest.raises(RuntimeError, match="is damaged"):
        push(run, NAME)
    (run / "metrics.json").write_text("[", encoding="utf-8")
    assert hub.requests == []


def test_links_or_copies(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError("no links here")

    stage(run, tmp_path / "linked")
    monkeypatch.setattr("os.symlink", refuse)
    stage(run, tmp_path / "copied")
    assert (tmp_path / "linked" / "model.safetensors").is_symlink()
    assert not (tmp_path / "copied" / "model.safetensors").is_symlink()
    assert content(tmp_path / "linked") == content(tmp_path / "copied")


def test_details_of_the_card(hub: Hub, run: Path) -> None:
    details = CardDetails(language=("en",), license="cc-by-sa-3.0", datasets=("tester/data",), base_model="a/b")
    push(run, NAME, details=details)
    card = hub.files(NAME)["README.md"].decode()
    assert "license: cc-by-sa-3.0" in card and "base_model: a/b" in card


def drawing(*names: str, fails: Exception | None = None) -> Any:
    """Draws figures of these names, then raises."""

    def draw(folder: Path, target: Path) -> list[str]:
        target.mkdir(parents=True)
        for name in names:
            (target / name).write_bytes(f"new {name} of {folder.name}".encode())
        if fails is not None:
            raise fails
        return list(names)

    return draw


def test_figures_are_drawn_for_the_push(hub: Hub, run: Path) -> None:
    """Those of an earlier report give way; others of the folder stay; nothing is drawn into the folder."""
    for name in ("report_figures/metrics.png", "report_figures/other.png", "figures/metrics.png", "figures/mine.png"):
        (run / name).parent.mkdir(exist_ok=True)
        (run / name).write_bytes(b"old")
    before = content(run)
    push(run, NAME, draw=drawing("metrics.png", "training.png"))
    files = hub.files(NAME)
    assert {name: data for name, data in files.items() if name.endswith(".png")} == {
        "curve.png": (run / "curve.png").read_bytes(),
        "figures/metrics.png": b"new metrics.png of run",
        "figures/training.png": b"new training.png of run",
        "figures/mine.png": b"old",
        "report_figures/other.png": b"old",
    }
    shown = re.findall(r"!\[[^]]*\]\(([^)]+)\)", files["README.md"].decode())
    assert shown[:2] == ["figures/metrics.png", "figures/training.png"] and set(shown) == {
        name for name in files if name.endswith(".png")
    }
    assert content(run) == before


def test_a_figure_is_not_worth_a_push(hub: Hub, run: Path, caplog: pytest.LogCaptureFixture) -> None:
    push(run, NAME, draw=drawing("metrics.png", fails=ValueError("no such font")))
    files = hub.files(NAME)
    assert "model.safetensors" in files and not [name for name in files if name.startswith("figures/")]
    assert "metrics.png" not in files["README.md"].decode() and "](curve.png)" in files["README.md"].decode()
    assert f"No figures are drawn of {run}: no such font" in caplog.text
