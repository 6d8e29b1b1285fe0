"""What a checkpoint must hold to be resumed, which one is, and what becomes of the others."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers
import transformers.trainer_jit_checkpoint
from transformers import EvalPrediction, TrainerCallback

from hf_ema_scaling.ema import AverageStateError
from hf_ema_scaling.ema.durable import sealed_json
from hf_ema_scaling.training import checkpoints
from hf_ema_scaling.training.checkpoints import (
    IncompleteCheckpointError,
    newest_complete_checkpoint,
    what_is_missing,
)
from hf_ema_scaling.training.commit import JIT_MARK

STEPS = 6


def run(folder: Path, init: int = 0, **changes: Any) -> Any:
    more = {key: changes.pop(key) for key in ("eval_dataset", "compute_metrics", "callbacks") if key in changes}
    values = {"max_steps": STEPS, "save_strategy": "steps", "save_steps": 2, "weight_decay": 0.1}
    args = tiny.arguments(folder, **values | changes)
    return tiny.trainer(tiny.bert(dropout=0.1, seed=init), args, tiny.sentences(30), **more)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    folder = tmp_path_factory.mktemp("whole")
    made = run(folder)
    made.train()
    return made, folder


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    transformers.utils.logging.enable_propagation()
    yield caplog
    transformers.utils.logging.disable_propagation()


def copied(whole: tuple[Any, Path], folder: Path, *steps: int) -> Path:
    for step in steps:
        shutil.copytree(whole[1] / f"checkpoint-{step}", folder / f"checkpoint-{step}")
    return folder / f"checkpoint-{steps[-1]}"


def gone(name: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    return damage


def cut(name: str) -> Callable[[Path], None]:
    return lambda folder: os.truncate(folder / name, (folder / name).stat().st_size // 2)


def flipped(name: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        data = bytearray((folder / name).read_bytes())
        data[len(data) // 2] ^= 1
        (folder / name).write_bytes(data)

    return damage


def another_digit(folder: Path) -> None:
    """As a flipped bit makes of a number: JSON like before."""
    path = folder / "trainer_state.json"
    text = path.read_text()
    assert '"max_steps": 6' in text
    path.write_text(text.replace('"max_steps": 6', '"max_steps": 7'))


def of_first_record(name: str, offset: int, value: int) -> Callable[[Path], None]:
    """Changes a byte of what a zip file's directory says of its first record."""

    def damage(folder: Path) -> None:
        data = bytearray((folder / name).read_bytes())
        data[data.index(b"PK\x01\x02") + offset] ^= value
        (folder / name).write_bytes(data)

    return damage


def encrypted(name: str) -> Callable[[Path], None]:
    return of_first_record(name, 8, 1)


def deflated(name: str) -> Callable[[Path], None]:
    return of_first_record(name, 10, 8)


def marked_as_a_folder(name: str) -> Callable[[Path], None]:
    return of_first_record(name, 38, 0x10)


def other_step(folder: Path) -> None:
    path = folder / "ema" / "ema_state.json"
    record = json.loads(path.read_text())
    record["state"]["global_step"] = 4
    path.write_text(sealed_json(record))


def another_clock(folder: Path) -> None:
    """A flipped bit that changes a digit of the run's state."""
    path = folder / "ema" / "ema_state.json"
    content = path.read_text().replace('"clock": 6.0', '"clock": 4.0')
    assert content != path.read_text()
    path.write_text(content)


TRAINERS = [
    (gone("trainer_state.json"), "trainer_state.json is missing: its saving did not finish"),
    (cut("trainer_state.json"), "trainer_state.json is not readable"),
    (gone("model.safetensors"), "model.safetensors is missing"),
    (cut("model.safetensors"), "model.safetensors is not readable"),
    (flipped("model.safetensors"), "model.safetensors is damaged, or of another step than the average: its CRC"),
    (gone("optimizer.pt"), "optimizer.pt is missing (no optimizer state: save_only_model?)"),
    (cut("optimizer.pt"), "optimizer.pt is not readable"),
    (flipped("optimizer.pt"), "optimizer.pt is not readable (ValueError: wrong CRC-32 of its record"),
    (gone("scheduler.pt"), "scheduler.pt is missing"),
    (cut("scheduler.pt"), "scheduler.pt is not readable"),
    (cut("rng_state.pth"), "rng_state.pth is not readable"),
    (gone("rng_state.pth"), "rng_state.pth is missing"),
    (another_digit, "trainer_state.json is damaged, or of another step than the average: its CRC-32"),
    (encrypted("scheduler.pt"), "scheduler.pt is not readable (ValueError: "),
    (marked_as_a_folder("optimizer.pt"), "optimizer.pt is not readable (ValueError: its record optimizer/data.pkl is"),
    (deflated("optimizer.pt"), "optimizer.pt is not readable (ValueError: "),
]
AVERAGES = [
    (gone("ema"), "ema_state.json in its 'ema' folder is missing or damaged"),
    (gone("ema/ema_state.json"), "ema_state.json in its 'ema' folder is missing or damaged"),
    (cut("ema/ema_state.json"), "ema_state.json in its 'ema' folder is missing or damaged"),
    (gone("ema/model.safetensors"), "model.safetensors is missing"),
    (cut("ema/model.safetensors"), "model.safetensors is not readable"),
    (flipped("ema/model.safetensors"), "crc32"),
    (another_clock, "ema_state.json in its 'ema' folder is missing or damaged (its CRC-32 is"),
    (other_step, "is of step 4 and trainer_state.json of step 6"),
]


@pytest.mark.parametrize(("damage", "message"), TRAINERS + AVERAGES)
def test_what_is_missing_is_named_and_the_checkpoint_before_is_taken(
    whole: tuple[Any, Path],
    tmp_path: Path,
    said: pytest.LogCaptureFixture,
    damage: Callable[[Path], None],
    message: str,
) -> None:
    newest = copied(whole, tmp_path, 2, 4, 6)
    assert what_is_missing(newest) == [] and newest_complete_checkpoint(tmp_path) == newest
    assert said.text == ""
    damage(newest)
    assert len(what_is_missing(newest)) == 1 and message in what_is_missing(newest)[0]
    assert newest_complete_checkpoint(tmp_path).name == "checkpoint-4"
    assert "Newer but not complete: checkpoint-6: " in said.text and message in said.text
    average = (damage, message) in AVERAGES
    assert what_is_missing(newest, average=False) == [] if average else what_is_missing(newest, average=False)
    with pytest.raises(AverageStateError if average else IncompleteCheckpointError) as error:
        run(tmp_path, init=7).train(resume_from_checkpoint=str(newest))
    assert message in str(error.value) and str(tmp_path) in str(error.value)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (flipped("pytorch_model_fsdp_0/__1_0.distcp"), "pytorch_model_fsdp_0/__1_0.distcp is damaged"),
        (gone("optimizer_0/.metadata"), "optimizer_0/.metadata is missing"),
        (cut("checksums.json"), "checksums.json is not readable"),
        (gone("rng_state_1.pth"), "rng_state_1.pth is missing"),
    ],
    ids=["flipped", "missing", "json", "process"],
)
def test_shards_that_accelerate_writes_are_verified(
    tmp_path: Path, damage: Callable[[Path], None], message: str
) -> None:
    """They have no checksums of their own. That these are FSDP2's is tested in `tests/distributed`."""
    made = run(tmp_path)
    inner = made._save_rng_state

    def save(folder: str) -> None:
        for name in (*(f"pytorch_model_fsdp_0/__{rank}_0.distcp" for rank in range(2)), "optimizer_0/.metadata"):
            (Path(folder) / name).parent.mkdir(exist_ok=True)
            (Path(folder) / name).write_bytes(name.encode() * made.state.global_step)
        torch.save({}, Path(folder) / "rng_state_1.pth")  # of a second process, which Trainer would not miss
        inner(folder)

    made._save_rng_state = save
    made.train()
    newest = tmp_path / "checkpoint-6"
    written = json.loads((newest / "checksums.json").read_text())
    small = {"rng_state.pth", "rng_state_1.pth", "scheduler.pt", "trainer_state.json"}
    assert len(written["crc32"].keys() - small) == 3 and written["format_version"] == 1
    assert what_is_missing(newest) == []
    damage(newest)
    (found,) = what_is_missing(newest)
    assert message in found and newest_complete_checkpoint(tmp_path).name == "checkpoint-4"


def test_a_run_goes_back_to_the_newest_complete_checkpoint_and_ends_the_same(
    whole: tuple[Any, Path], tmp_path: Path
) -> None:
    reference, _ = whole
    cut("optimizer.pt")(copied(whole, tmp_path, 2, 4, 6))
    gone("trainer_state.json")(tmp_path / "checkpoint-4")
    made = run(tmp_path, init=7)
    made.train(resume_from_checkpoint=True)
    assert made.drawn == reference.drawn[2:]
    assert tiny.same_bits(tiny.parameters(made.model), tiny.parameters(reference.model))
    assert tiny.same_bits(tiny.average(made), tiny.average(reference))
    # What was incomplete has been written again.
    assert what_is_missing(tmp_path / "checkpoint-4") == what_is_missing(tmp_path / "checkpoint-6") == []


def test_where_none_is_complete_each_is_named(whole: tuple[Any, Path], tmp_path: Path) -> None:
    copied(whole, tmp_path, 2, 4)
    cut("optimizer.pt")(tmp_path / "checkpoint-2")
    gone("ema")(tmp_path / "checkpoint-4")
    with pytest.raises(IncompleteCheckpointError, match=r"checkpoint-4: .*'ema'.*checkpoint-2: optimizer\.pt is"):
        run(tmp_path).train(resume_from_checkpoint=True)
    with pytest.raises(IncompleteCheckpointError, match="there is no such folder"):
        run(tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))
    with pytest.raises(ValueError, match="there is no checkpoint to resume from"):
        newest_complete_checkpoint(tmp_path / "nothing")


def test_a_folder_in_the_place_of_a_file_is_written_anew(whole: tuple[Any, Path], tmp_path: Path) -> None:
    reference, _ = whole
    copied(whole, tmp_path, 2, 4)
    for name in ("trainer_state.json", "optimizer.pt"):
        gone(name)(tmp_path / "checkpoint-4")
        (tmp_path / "checkpoint-4" / name).mkdir()
    made = run(tmp_path, init=7)
    made.train(resume_from_checkpoint=True)
    assert tiny.same_bits(tiny.average(made), tiny.average(reference))
    assert what_is_missing(tmp_path / "checkpoint-4") == []


@pytest.mark.parametrize("metric", ["loss", "ema_loss"])
@pytest.mark.parametrize("name", ["model.safetensors", "ema/model.safetensors", "ema/ema_state.json"])
def test_a_damaged_best_model_is_not_loaded_and_the_last_not_deleted(tmp_path: Path, metric: str, name: str) -> None:
    class Damages(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == STEPS - 1:
                best.append(Path(str(state.best_model_checkpoint)))
                flipped(name)(best[0])

    best: list[Path] = []
    more = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True, "save_total_limit": 1}
    settings = {"metric_for_best_model": metric, "greater_is_better": metric == "loss", "learning_rate": 1e-2}
    made = run(tmp_path, **more, **settings, eval_dataset=tiny.sentences(6), callbacks=[Damages()])
    with pytest.raises((IncompleteCheckpointError, AverageStateError)) as said:
        made.train()
    assert str(best[0]) in str(said.value) and name.split("/")[-1] in str(said.value) + "model.safetensors"
    assert made.state.global_step == STEPS and (tmp_path / f"checkpoint-{STEPS}").is_dir()
    assert best[0].name != f"checkpoint-{STEPS}"


# ---- An average that is lost


@pytest.mark.parametrize(
    "damage",
    [gone("ema"), gone("ema/model.safetensors"), flipped("ema/model.safetensors"), cut("ema/ema_state.json")],
    ids=["folder", "weights", "bits", "json"],
)
def test_a_lost_average_is_rebuilt_from_the_student_on_request(
    whole: tuple[Any, Path], tmp_path: Path, said: pytest.LogCaptureFixture, damage: Callable[[Path], None]
) -> None:
    reference, _ = whole
    damage(copied(whole, tmp_path, 2, 4))
    made = run(tmp_path, init=7, on_missing_average="rebuild")
    made.train(resume_from_checkpoint=True)
    assert "The average is rebuilt from the student's weights" in said.text
    assert tiny.same_bits(tiny.parameters(made.model), tiny.parameters(reference.model))
    assert made.average.num_updates == 2
    start, first, last = (reference.recorder.weights[step] for step in (3, 4, 5))
    expected = {
        name: 0.9 * (0.9 * start[name].double() + 0.1 * first[name].double()) + 0.1 * last[name].double()
        for name in start
    }
    average = {name: tiny.average(made)[name] for name in start}
    assert tiny.difference(expected, average) < 1e-6
    assert tiny.difference({name: tiny.average(reference)[name] for name in start}, average) > 1e-4
    assert what_is_missing(tmp_path / "checkpoint-6") == []


def test_a_second_train_rebuilds_too(whole: tuple[Any, Path], tmp_path: Path) -> None:
    """An average that the trainer has is not the checkpoint's."""
    gone("ema/model.safetensors")(copied(whole, tmp_path, 6))
    made = run(tmp_path, on_missing_average="rebuild", save_strategy="no")
    made.train()
    before = tiny.average(made)
    made.train(resume_from_checkpoint=True)
    student = tiny.parameters(made.model)
    assert tiny.same_bits({name: tiny.average(made)[name] for name in student}, student)
    assert not tiny.same_bits(before, tiny.average(made))


def test_a_sound_average_is_not_rebuilt(whole: tuple[Any, Path], tmp_path: Path) -> None:
    reference, _ = whole
    copied(whole, tmp_path, 4)
    made = run(tmp_path, init=7, on_missing_average="rebuild")
    made.train(resume_from_checkpoint=True)
    assert tiny.same_bits(tiny.average(made), tiny.average(reference)) and made.average.num_updates == STEPS


def test_other_answers_to_a_lost_average_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="on_missing_average must be one of raise, rebuild, got 'ignore'"):
        run(tmp_path, on_missing_average="ignore")


# ---- Writing


def test_the_commit_comes_after_everything_is_on_the_disk_and_before_anything_is_deleted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[tuple[str, str]] = []
    names: dict[int, str] = {}

    def spy(module: Any, name: str, describe: Callable[..., str]) -> None:
        real = getattr(module, name)

        def spied(*arguments: Any, **more: Any) -> Any:
            result = real(*arguments, **more)
            if name == "open":
                names[result] = describe(*arguments)
            else:
                done.append((name, describe(*arguments)))
            return result

        monkeypatch.setattr(module, name, spied)

    spy(os, "open", lambda path, *_: str(path))
    spy(os, "fsync", lambda descriptor: names[descriptor])
    spy(os, "replace", lambda _, target: str(target))
    spy(shutil, "rmtree", lambda path, *_: str(path))
    run(tmp_path, save_total_limit=1).train()
    checkpoint = tmp_path / "checkpoint-6"
    commit = done.index(("replace", str(checkpoint / "trainer_state.json")))
    flushed = {path for name, path in done[:commit] if name == "fsync"}
    written = {str(path) for path in [checkpoint, *checkpoint.rglob("*")]} - {str(checkpoint / "trainer_state.json")}
    assert written | {str(checkpoint / ".trainer_state.json.partial")} <= flushed
    assert ("fsync", str(checkpoint)) in done[commit:]
    deleted = done.index(("rmtree", str(tmp_path / "checkpoint-4")))
    assert done.index(("fsync", str(tmp_path)), commit) < deleted
    # The average's folder gets its name when all of it is there.
    named = done.index(("replace", str(checkpoint / "ema")))
    before = {path for name, path in done[:named] if name == "fsync"}
    assert {str(checkpoint / ".ema.partial" / name) for name in ("model.safetensors", "ema_state.json")} <= before


def test_what_an_earlier_attempt_left_is_deleted_before_saving(tmp_path: Path) -> None:
    stale = tmp_path / "checkpoint-2"
    (stale / "ema" / "old").mkdir(parents=True)
    for name in ("trainer_state.json", "rng_state_3.pth", "ema/old/file", JIT_MARK):
        (stale / name).write_text("{}")

    class Look(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            assert (stale / "rng_state_3.pth").exists() == (state.global_step < 2)

    run(tmp_path, callbacks=[Look()], max_steps=3).train()
    assert what_is_missing(stale) == []
    assert {"rng_state_3.pth", "old", JIT_MARK} & {path.name for path in stale.rglob("*")} == {JIT_MARK}


@pytest.mark.parametrize("limit", [1, 2])
def test_an_incomplete_checkpoint_takes_no_complete_ones_place(
    whole: tuple[Any, Path], tmp_path: Path, limit: int
) -> None:
    """Trainer keeps what has the highest number, or the latest date: a torn one of an earlier life, perhaps."""
    copied(whole, tmp_path, 2, 6)
    cut("optimizer.pt")(tmp_path / "checkpoint-6")  # later than what is saved, and committed
    future = time.time() + 1000
    os.utime(tmp_path / "checkpoint-6", (future, future))
    made = run(tmp_path, init=7, max_steps=5, save_total_limit=limit)
    (tmp_path / "checkpoint-3").mkdir()  # earlier, and not
    made.train(resume_from_checkpoint=True)
    kept = ["checkpoint-4", "checkpoint-5"][-limit:]
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == kept
    assert all(what_is_missing(tmp_path / name) == [] for name in kept)


def test_of_checkpoints_that_are_models_only_none_is_deleted_as_incomplete(
    whole: tuple[Any, Path], tmp_path: Path
) -> None:
    gone("optimizer.pt")(copied(whole, tmp_path, 6))
    run(tmp_path, max_steps=5, save_total_limit=4, save_only_model=True).train()
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == [
        f"checkpoint-{step}" for step in (2, 4, 5, 6)
    ]


def test_without_a_limit_nothing_is_deleted(whole: tuple[Any, Path], tmp_path: Path) -> None:
    cut("optimizer.pt")(copied(whole, tmp_path, 2, 6))
    run(tmp_path, init=7, max_steps=5).train(resume_from_checkpoint=True)
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {
        f"checkpoint-{step}" for step in (2, 4, 5, 6)
    }


def test_an_error_while_saving_leaves_no_part_and_says_what_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = run(tmp_path, save_total_limit=1)
    real = torch.save

    def full(thing: Any, path: Any, *more: Any, **others: Any) -> None:
        if "checkpoint-4/optimizer" in str(path):
            raise OSError(28, "No space left on device")
        real(thing, path, *more, **others)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space left") as error:
        made.train()
    note = error.value.__notes__[0]
    assert f"{tmp_path / 'checkpoint-4'} was not saved and its parts were deleted; " in note and " GB are free" in note
    assert "checkpoint-2 is complete: train(resume_from_checkpoint=True) continues from it." in note
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["checkpoint-2"]
    assert "save_to_json" not in vars(made.state)


def test_an_error_after_the_commit_leaves_the_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(**_: Any) -> None:
        raise ConnectionError("the Hub is away")

    monkeypatch.setattr(transformers.trainer, "rotate_checkpoints", broken)
    with pytest.raises(ConnectionError) as error:
        run(tmp_path).train()
    assert not hasattr(error.value, "__notes__") and what_is_missing(tmp_path / "checkpoint-2") == []


# ---- Errors elsewhere


def test_an_error_in_an_evaluation_loses_nothing_that_was_trained(whole: tuple[Any, Path], tmp_path: Path) -> None:
    """Not even in the pass over the average, while the model holds its weights."""
    reference, _ = whole
    calls = []

    def metrics(prediction: EvalPrediction) -> dict[str, float]:
        calls.append(prediction)
        if len(calls) == 2:
            raise ArithmeticError("no such metric")
        return {}

    made = run(
        tmp_path, eval_dataset=tiny.sentences(4, 5), compute_metrics=metrics, eval_strategy="steps", eval_steps=5
    )
    with pytest.raises(ArithmeticError):
        made.train()
    assert tiny.same_bits(tiny.parameters(made.model), reference.recorder.weights[4])
    average = reference.recorder.averages[4]
    assert tiny.same_bits(tiny.average(made), average)
    made.save_model(str(tmp_path / "rescued"))
    rescued = type(made.model).from_pretrained(tmp_path / "rescued" / "ema")
    assert tiny.same_bits(tiny.parameters(rescued), {name: average[name] for name in tiny.parameters(rescued)})
    assert newest_complete_checkpoint(tmp_path).name == "checkpoint-4"


def test_ctrl_c_leaves_complete_checkpoints_and_the_same_trainer_goes_on(
    whole: tuple[Any, Path], tmp_path: Path
) -> None:
    reference, _ = whole

    class Interrupt(TrainerCallback):
        used = False

        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 4 and not self.used:
                self.used = True
                raise KeyboardInterrupt

    made = run(tmp_path, callbacks=[Interrupt()])
    with pytest.raises(KeyboardInterrupt):
        made.train()
    made.train(resume_from_checkpoint=True)
    assert tiny.same_bits(tiny.parameters(made.model), tiny.parameters(reference.model))
    assert tiny.same_bits(tiny.average(made), tiny.average(reference))


def test_the_module_finds_what_trainer_writes() -> None:
    """Names that Trainer does not export for others to rely on."""
    assert (checkpoints.TRAINER_STATE_NAME, checkpoints.OPTIMIZER_NAME) == ("trainer_state.json", "optimizer.pt")
    source = Path(transformers.trainer_jit_checkpoint.__file__).read_text(encoding="utf-8")
    assert f'"{JIT_MARK}"' in source
