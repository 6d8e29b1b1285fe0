from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from torch import Tensor
from typer.testing import CliRunner

from hf_ema_scaling.cli import main
from hf_ema_scaling.recipe import ASR_CTC, build_asr_ctc, parse
from hf_ema_scaling.training.self_check import FAILED, PASSED, WARNING, check_split, check_teacher, self_check


def check(*argv: str) -> tuple[int, dict[str, tuple[str, str]]]:
    """Exit code, and result and detail by name of the check."""
    done = CliRunner().invoke(main, ["check", *argv])
    lines = done.stdout.splitlines()
    lines = lines[next(i for i, line in enumerate(lines) if line.split() == ["check", "result", "detail"]) + 1 :]
    return done.exit_code, {name: (result, detail) for name, result, detail in (line.split(None, 2) for line in lines)}


def test_a_sound_recipe_passes(config: Path) -> None:
    code, found = check(str(config), "--max_steps", "8", "--pl_start", "6", "--output_dir", "nowhere/at/all")
    assert code == 0
    assert {name: result for name, (result, _) in found.items()} == dict.fromkeys(
        ("recipe", "data", "labels", "split", "teacher", "plan"), PASSED
    )
    assert found["data"][1].startswith("labelled 8 rows (")
    assert found["labels"][1] == "the labels of 8 of 8 rows fit their frames"
    assert not Path("nowhere").exists()


def test_what_the_plan_warns_of_does_not_fail(config: Path) -> None:
    code, found = check(str(config), "--ema_momentum", "0.99")
    assert code == 0
    assert found["plan"][0] == WARNING and "the teacher still holds 0.99" in found["plan"][1]


def test_labels_all_too_long_for_their_audio_fail(config: Path, tmp_path: Path, manifest: Callable[..., Path]) -> None:
    path = manifest(tmp_path / "long.jsonl", 3, seed=0, text="abc" * 20)
    code, found = check(str(config), "--labelled", str(path), "--unlabelled", "null")
    assert code == 1
    assert found["recipe"][0] == FAILED
    assert f"no row of {path} fits" in found["recipe"][1]


def test_a_recipe_that_cannot_be_built_fails(config: Path) -> None:
    code, found = check(str(config), "--labelled", "./missing.jsonl")
    assert code == 1
    assert list(found) == ["recipe"]
    assert found["recipe"][1].startswith("FileNotFoundError: ./missing.jsonl: no such file")


def test_rows_beyond_the_first_are_not_looked_at(config: Path, tmp_path: Path, manifest: Callable[..., Path]) -> None:
    path = manifest(tmp_path / "three.jsonl", 3, seed=0, text="ab")
    _, found = check(str(config), "--labelled", str(path), "--rows", "2")
    assert found["labels"][1] == "the labels of 2 of 3 rows fit their frames"
    assert "labelled 3 rows (" in found["data"][1] and "the first 2 looked at" in found["data"][1]


def test_a_row_whose_label_does_not_fit_is_dropped(
    config: Path, tmp_path: Path, manifest: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    path = manifest(tmp_path / "mixed.jsonl", 3, seed=0, text="ab")
    path.write_text(path.read_text().replace('"ab"}', '"' + "abc" * 20 + '"}', 1))
    code, found = check(str(config), "--labelled", str(path))
    assert code == 0
    assert found["labels"][1] == "the labels of 2 of 2 rows fit their frames"
    assert f"dropped 1 of 3 rows of {path}: their labels need more frames than there are" in caplog.text


@pytest.fixture
def trainer(config: Path, tmp_path: Path) -> object:
    return build_asr_ctc(*parse(ASR_CTC, ["--config", str(config), "--output_dir", str(tmp_path)]))


def test_a_loss_that_mixes_rows_is_found(trainer: object) -> None:
    assert check_split(trainer)[0] == PASSED
    own = trainer.example_loss

    def mean(model: object, inputs: object, logits: Tensor, labels: Tensor) -> Tensor:
        return own(model, inputs, logits, labels) / len(logits)

    trainer.example_loss = mean
    result, detail = check_split(trainer)
    assert result == FAILED
    # Twice two rows: one row for itself counts as much as two rows together.
    assert "gradients differ by 1.0e+00" in detail


def test_the_checks_leave_the_model_as_it_was(trainer: object) -> None:
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    check_split(trainer)
    check_teacher(trainer)
    assert all(value.equal(before[name]) for name, value in trainer.model.state_dict().items())
    assert all(parameter.grad is None for parameter in trainer.model.parameters())


def test_an_error_is_a_result() -> None:
    def build() -> object:
        raise RuntimeError("no such thing")

    (found,) = self_check(build)
    assert (found.name, found.result, found.detail) == ("recipe", FAILED, "RuntimeError: no such thing")
