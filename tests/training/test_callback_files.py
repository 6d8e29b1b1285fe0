"""What `EMACallback` says of the files that Trainer wrote: whole, damaged, of another save, or changed on purpose."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from stock_runs import Sentences, arguments, bert, callback, clones, same, trainer
from transformers import Trainer, TrainerCallback, TrainerState
from transformers.trainer_jit_checkpoint import JITCheckpointCallback

from hf_ema_scaling.ema import AverageStateError
from hf_ema_scaling.ema.durable import sealed_json

Damage = Callable[[Path], None]
pytestmark = pytest.mark.filterwarnings("ignore:.*`optimizer.step.*:UserWarning")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of six steps with two averages, and its three checkpoints."""
    folder = tmp_path_factory.mktemp("whole")
    settings = {"save_strategy": "steps", "save_steps": 2, "logging_strategy": "steps", "logging_steps": 1}
    trainer(callback(), folder, callback(momentum=0.5, name="fast"), **settings).train()
    return folder


@pytest.fixture
def run(whole: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(whole, tmp_path / "run"))


def resumed(checkpoint: Path, **changes: Any) -> Any:
    """The callback of a run that goes on from a checkpoint to step 6."""
    average = callback(**changes)
    trainer(average, checkpoint.parent).train(resume_from_checkpoint=str(checkpoint))
    return average


def flipped(name: str, share: float = 0.5) -> Damage:
    def damage(checkpoint: Path) -> None:
        data = bytearray((checkpoint / name).read_bytes())
        data[int(share * len(data))] ^= 1
        (checkpoint / name).write_bytes(data)

    return damage


def in_padding(name: str) -> Damage:
    """Between the records of a file that torch.save wrote, where it fills up with Z."""

    def damage(checkpoint: Path) -> None:
        data = bytearray((checkpoint / name).read_bytes())
        data[data.index(b"ZZZZ")] ^= 1
        (checkpoint / name).write_bytes(data)

    return damage


def another_digit(checkpoint: Path) -> None:
    path = checkpoint / "trainer_state.json"
    state = json.loads(path.read_text())
    state["log_history"][0]["loss"] += 1.0
    path.write_text(json.dumps(state))


def gone(name: str) -> Damage:
    return lambda checkpoint: (checkpoint / name).unlink()


DAMAGES = {
    "optimizer": (flipped("optimizer.pt"), r"optimizer\.pt is not readable \(ValueError: wrong CRC-32 of its record"),
    "schedule": (flipped("scheduler.pt"), r"scheduler\.pt is "),
    "padding of the schedule": (in_padding("scheduler.pt"), r"scheduler\.pt is damaged"),
    "random states": (flipped("rng_state.pth"), r"rng_state\.pth is not readable"),
    "student": (flipped("model.safetensors", 0.999), r"model\.safetensors is damaged, or of another step"),
    "an exponent": (flipped("model.safetensors", 1.0 - 1e-9), r"model\.safetensors is damaged, or of another step"),
    "state": (another_digit, r"trainer_state\.json is damaged"),
    "no optimizer": (gone("optimizer.pt"), r"optimizer\.pt is missing"),
    "no random states": (gone("rng_state.pth"), r"rng_state\.pth is missing"),
    "checksums": (flipped("checksums.json"), r"checksums\.json is not readable"),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGES.values(), ids=DAMAGES)
@pytest.mark.parametrize("rebuild", [False, True])
def test_what_is_damaged_of_trainers_files_is_told_and_the_checkpoint_before_is_found(
    run: Path, caplog: pytest.LogCaptureFixture, damage: Damage, message: str, rebuild: bool
) -> None:
    average = callback(on_missing_average="rebuild" if rebuild else "raise")
    newest = run / "checkpoint-6"
    assert average.newest_checkpoint(run) == newest
    damage(newest)
    if rebuild:
        shutil.rmtree(newest / "ema")  # with it all that it says of the student
    transformers.utils.logging.enable_propagation()
    assert average.newest_checkpoint(run) == run / "checkpoint-4"
    transformers.utils.logging.disable_propagation()
    assert "checkpoint-6: " in caplog.text
    with pytest.raises(AverageStateError, match=f"checkpoint-6 cannot be resumed: {message}.*newest_checkpoint"):
        trainer(average, run, max_steps=8).train(resume_from_checkpoint=str(newest))


def test_two_averages_share_the_checksums_and_both_are_resumed(run: Path) -> None:
    record = json.loads((run / "checkpoint-4" / "checksums.json").read_text())
    small = {"scheduler.pt", "rng_state.pth", "trainer_state.json"}
    assert record["crc32"].keys() == small | {"model.safetensors"} and record["present"] == ["optimizer.pt"]
    again = [callback(), callback(momentum=0.5, name="fast")]
    trainer(again[0], run, again[1]).train(resume_from_checkpoint=str(run / "checkpoint-4"))
    for average, folder in zip(again, ("ema", "ema-fast"), strict=True):
        saved = load_file(run / "checkpoint-6" / folder / "model.safetensors")
        assert all(torch.equal(saved[name], tensor) for name, tensor in clones(average).items() if name in saved)


def test_a_state_that_was_changed_on_purpose_is_resumed_once_its_checksums_are_deleted(
    run: Path, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoint = run / "checkpoint-4"
    another_digit(checkpoint)
    with pytest.raises(AverageStateError, match=r"delete checksums\.json to resume all the same"):
        resumed(checkpoint)
    (checkpoint / "checksums.json").unlink()
    assert resumed(checkpoint).average.num_updates == 6


@pytest.mark.parametrize("kept", [True, False])
def test_a_student_that_was_changed_on_purpose_is_resumed_by_the_way_that_the_error_names(
    run: Path, kept: bool
) -> None:
    checkpoint = run / "checkpoint-4"
    weights = load_file(checkpoint / "model.safetensors")
    if kept:  # written anew by another program, with the same values
        save_file(weights, checkpoint / "model.safetensors", metadata={"format": "pt", "by": "a converter"})
    else:
        save_file({n: 2 * t for n, t in weights.items()}, checkpoint / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(AverageStateError, match=r"delete checksums\.json to resume all the same"):
        resumed(checkpoint)
    (checkpoint / "checksums.json").unlink()
    if kept:
        assert resumed(checkpoint).average.num_updates == 6
        return
    with pytest.raises(AverageStateError, match="its distance to the student was"):
        resumed(checkpoint)
    shutil.rmtree(checkpoint / "ema")
    with pytest.warns(UserWarning, match="is rebuilt from the student's weights of step 4"):
        assert resumed(checkpoint, on_missing_average="rebuild").average.num_updates == 2


def older(checkpoint: Path) -> None:
    """As the version before `checksums.json` wrote it."""
    (checkpoint / "checksums.json").unlink()
    for path in checkpoint.glob("ema*/ema_state.json"):
        record = json.loads(path.read_text())
        del record["state"]["checksums"], record["own_crc32"]
        path.write_text(json.dumps(record))


def test_a_checkpoint_of_an_older_version_is_resumed_and_its_student_verified(run: Path) -> None:
    whole = resumed(run / "checkpoint-4")
    older(run / "checkpoint-4")
    assert callback().newest_checkpoint(run) == run / "checkpoint-6"
    assert same(clones(resumed(run / "checkpoint-4")), clones(whole))
    flipped("model.safetensors", 0.999)(run / "checkpoint-4")
    with pytest.raises(AverageStateError, match=r"model\.safetensors is damaged, or of another step than the average"):
        resumed(run / "checkpoint-4")
    shutil.rmtree(run / "checkpoint-6")
    assert callback().newest_checkpoint(run) == run / "checkpoint-2"


def test_the_average_of_another_save_is_told(run: Path) -> None:
    """Trainer wrote into a checkpoint that was there, and was killed before the average was written anew."""
    other = run.parent / "other"
    trainer(callback(), other, save_strategy="steps", save_steps=6, learning_rate=0.05).train()
    for name in ("model.safetensors", "checksums.json", "optimizer.pt", "scheduler.pt", "rng_state.pth"):
        shutil.copy(other / "checkpoint-6" / name, run / "checkpoint-6" / name)
    shutil.copy(other / "checkpoint-6" / "trainer_state.json", run / "checkpoint-6" / "trainer_state.json")
    assert callback().newest_checkpoint(run) == run / "checkpoint-4"
    with pytest.raises(AverageStateError, match=r"model\.safetensors is of another save than the average"):
        trainer(callback(), run, max_steps=8).train(resume_from_checkpoint=str(run / "checkpoint-6"))


def test_a_checkpoint_without_optimizer_and_a_link_to_one_are_resumed_as_trainer_does(tmp_path: Path) -> None:
    trainer(callback(), tmp_path, save_strategy="steps", save_steps=2, save_only_model=True).train()
    record = json.loads((tmp_path / "checkpoint-4" / "checksums.json").read_text())
    assert record["crc32"].keys() == {"model.safetensors", "trainer_state.json"} and record["present"] == []
    (tmp_path / "best").symlink_to(tmp_path / "checkpoint-4")
    for place in ("checkpoint-4", "best"):
        average = callback()
        trainer(average, tmp_path).train(resume_from_checkpoint=str(tmp_path / place))
        assert average.average.num_updates == 6


def test_checksums_are_there_before_the_average_and_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    renamed: list[str] = []
    real = os.replace

    def note(source: Any, target: Any) -> None:
        assert Path(source).parent != tmp_path / "checkpoint-2" or Path(source).name.endswith(".partial")
        renamed.append(Path(target).name)
        real(source, target)

    monkeypatch.setattr(os, "replace", note)
    trainer(callback(), tmp_path, save_strategy="steps", save_steps=2, max_steps=2).train()
    assert [name for name in renamed if name in ("checksums.json", "ema")] == ["checksums.json", "ema"]
    assert not list((tmp_path / "checkpoint-2").glob(".*"))


def test_weights_in_folders_of_modules_are_verified(tmp_path: Path) -> None:
    """As sentence-transformers keeps those of its dense layers."""
    average = callback()
    made = trainer(average, tmp_path, save_strategy="steps", save_steps=2, max_steps=2)
    inner = made._save

    def save(folder: str, **more: Any) -> None:
        inner(folder, **more)
        (Path(folder) / "2_Dense").mkdir()
        save_file({"weight": torch.ones(3)}, Path(folder) / "2_Dense" / "model.safetensors")

    made._save = save  # type: ignore[method-assign, assignment]
    made.train()
    flipped("2_Dense/model.safetensors", 0.99)(tmp_path / "checkpoint-2")
    with pytest.raises(AverageStateError, match=r"2_Dense/model\.safetensors is damaged"):
        trainer(callback(), tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


@pytest.mark.parametrize("field", ["momentum", "units_seen", "reference_batch_size"])
def test_a_digit_of_the_record_is_not_believed(run: Path, field: str) -> None:
    checkpoint = run / "checkpoint-4"
    path = checkpoint / "ema" / "ema_state.json"
    record = json.loads(path.read_text())
    changed = record | {"state": record["state"] | {field: record["state"][field] + 0.0625}}
    path.write_text(json.dumps(changed))
    with pytest.raises(AverageStateError, match=r"ema_state\.json is not as it was written.*rebuild"):
        resumed(checkpoint)
    shutil.rmtree(run / "checkpoint-6")
    assert callback().newest_checkpoint(run) == run / "checkpoint-2"
    path.write_text(sealed_json(changed))
    with pytest.warns(UserWarning, match=field) if field != "units_seen" else contextlib.nullcontext():
        assert resumed(checkpoint).average.num_updates == 6


# What Trainer loads by itself, and what it writes into twice


def with_best(folder: Path, damage: Damage, average: Any) -> Trainer:
    """A run whose best checkpoint, that of step 2, is damaged before its end."""

    class Damages(TrainerCallback):
        def on_step_begin(self, args: Any, state: TrainerState, *_: Any, **__: Any) -> None:
            if state.global_step == 5:
                damage(Path(str(state.best_model_checkpoint)))

    changes: dict[str, Any] = {
        "save_strategy": "steps", "eval_strategy": "steps", "save_steps": 2, "eval_steps": 2, "learning_rate": 0.3,
        "load_best_model_at_end": True, "save_total_limit": 1,
    }  # fmt: skip
    return Trainer(
        bert(), arguments(folder, **changes), train_dataset=Sentences(), eval_dataset=Sentences(10),
        callbacks=[average, Damages()],
    )  # fmt: skip


@pytest.mark.filterwarnings("ignore:save_total_limit=1")
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (flipped("model.safetensors", 0.999), r"checkpoint-2, cannot be loaded: model\.safetensors is damaged"),
        (gone("model.safetensors"), r"checkpoint-2, cannot be loaded: model\.safetensors is missing"),
        (shutil.rmtree, "checkpoint-2, cannot be loaded: there is no such folder"),
    ],
    ids=["flipped", "missing", "gone"],
)
def test_a_damaged_best_model_is_not_loaded_and_the_last_not_deleted(
    tmp_path: Path, damage: Damage, message: str
) -> None:
    average = callback()
    made = with_best(tmp_path, damage, average)
    with pytest.raises(AverageStateError, match=message):
        made.train()
    assert average.average.num_updates == made.state.global_step == 6
    assert (tmp_path / "checkpoint-6" / "ema").is_dir()


@pytest.mark.filterwarnings("ignore:save_total_limit=1")
def test_a_whole_best_model_is_loaded(tmp_path: Path) -> None:
    made = with_best(tmp_path, lambda _: None, callback())
    made.train()
    assert made.state.best_global_step == 2 and made.evaluate()["eval_loss"] == made.state.best_metric


def test_the_newest_with_the_averages_of_all_callbacks(run: Path) -> None:
    shutil.rmtree(run / "checkpoint-6" / "ema-fast")  # a kill between the two
    slow, fast = callback(), callback(momentum=0.5, name="fast")
    assert slow.newest_checkpoint(run) == run / "checkpoint-6"
    assert slow.newest_checkpoint(run, fast) == fast.newest_checkpoint(run, slow) == run / "checkpoint-4"
    rebuilding = callback(momentum=0.5, name="fast", on_missing_average="rebuild")
    assert slow.newest_checkpoint(run, rebuilding) == run / "checkpoint-6"
    with pytest.raises(AverageStateError, match=r"no saved average at .*or resume from a checkpoint that"):
        trainer(slow, run, fast, max_steps=8).train(resume_from_checkpoint=str(run / "checkpoint-6"))


def test_a_folder_that_may_not_be_read_is_passed_over(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Path.iterdir

    def refused(folder: Path) -> Iterator[Path]:
        if folder == run / "checkpoint-6":
            raise PermissionError(13, "Permission denied", str(folder))
        return real(folder)

    monkeypatch.setattr(Path, "iterdir", refused)
    assert callback().newest_checkpoint(run) == run / "checkpoint-4"


@pytest.mark.filterwarnings("ignore:save_total_limit=1")
def test_checkpoints_of_an_earlier_run_that_take_the_place_of_new_ones_are_named(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-9").mkdir()
    os.utime(tmp_path / "checkpoint-9", (2**33, 2**33))  # the newest by its number and by its time
    made = trainer(callback(), tmp_path, save_strategy="steps", save_steps=2, save_total_limit=1)
    with pytest.raises(FileNotFoundError, match="has deleted at once: checkpoint-9 of an earlier run lie there"):
        made.train()


class Asks(TrainerCallback):
    """Asks for a checkpoint, as SIGTERM does, in two events of step 4."""

    manager: Any = None

    def on_optimizer_step(self, args: Any, state: TrainerState, *_: Any, **__: Any) -> None:
        if state.global_step == 3:
            self.manager.is_checkpoint_requested = True

    def on_step_end(self, args: Any, state: TrainerState, *_: Any, **__: Any) -> None:
        if state.global_step == 4:
            torch.rand(1)  # so that the second finds other random states
            self.manager.is_checkpoint_requested = True


def test_a_second_request_in_the_same_step_leaves_a_checkpoint_that_is_whole(tmp_path: Path) -> None:
    average, asks = callback(), Asks()
    made = trainer(average, tmp_path, asks, per_device_train_batch_size=16, enable_jit_checkpoint=True)
    jit: Any = next(c for c in made.callback_handler.callbacks if isinstance(c, JITCheckpointCallback))
    asks.manager, saved = jit.jit_manager, list[int]()
    execute = asks.manager.execute_jit_checkpoint

    def noted() -> None:
        execute()
        saved.append(made.state.global_step)

    asks.manager.execute_jit_checkpoint = noted
    made.train()
    assert saved == [4, 4] and average.newest_checkpoint(tmp_path) == tmp_path / "checkpoint-4"
    again = callback()
    trainer(again, tmp_path, per_device_train_batch_size=16).train(
        resume_from_checkpoint=str(tmp_path / "checkpoint-4")
    )
    assert again.average.num_updates == 6
