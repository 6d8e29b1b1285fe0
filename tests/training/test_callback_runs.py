"""`EMACallback` in runs that are not one plain `train()`."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import pickle
import shutil
import signal
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from stock_runs import RHO, Recorder, Sentences, arguments, bert, callback, clones, same, trainer
from torch import Tensor
from transformers import BertForSequenceClassification, Trainer, TrainerCallback, TrainerState, hyperparameter_search
from transformers.integrations import integration_utils
from transformers.trainer_jit_checkpoint import JITCheckpointCallback
from transformers.trainer_utils import BestRun, HPSearchBackend

from hf_ema_scaling.ema import AverageStateError
from hf_ema_scaling.training import callback_checkpoints
from hf_ema_scaling.training.callback import EMACallback
from hf_ema_scaling.training.checkpoints import what_is_missing

pytestmark = pytest.mark.filterwarnings(
    "ignore:EMACallback scales only the momentum", "ignore:.*`optimizer.step.*:UserWarning"
)

Tensors = dict[str, Tensor]


class Begin(TrainerCallback):
    """The student, and the average as the run starts with it, at each `on_train_begin`."""

    def __init__(self, average: EMACallback) -> None:
        self.average = average
        self.students: list[Tensors] = []
        self.averages: list[Tensors] = []
        self.updates: list[int] = []

    def on_train_begin(self, *_: Any, model: Any, **__: Any) -> None:
        self.students.append({name: p.detach().clone() for name, p in model.named_parameters()})
        self.averages.append(clones(self.average))
        self.updates.append(self.average.average.num_updates)


def follows(start: Tensors, recorder: Recorder, kappa: float, momentum: float = RHO) -> bool:
    """Whether each recorded average is the closed form from `start` over the recorded student's weights."""
    expected = {name: start[name].double() for name in recorder.student[0]}
    for student, shadow in zip(recorder.student, recorder.average, strict=True):
        for name in expected:
            expected[name] = momentum**kappa * expected[name] + (1 - momentum**kappa) * student[name].double()
            if not (shadow[name] - expected[name]).abs().max() < 1e-6:
                return False
    return True


# Several averages


def test_two_averages_move_save_resume_teach_and_export_on_their_own(tmp_path: Path) -> None:
    slow, fast = callback(), callback(momentum=0.5, name="fast")
    records, begin = [Recorder(slow), Recorder(fast)], Begin(slow)
    run = trainer(slow, tmp_path, fast, begin, *records, save_strategy="steps", save_steps=3, max_steps=6)
    run.train()
    assert follows(begin.students[0], records[0], 1.0, RHO)
    assert follows(begin.students[0], records[1], 1.0, 0.5)
    checkpoint = tmp_path / "checkpoint-3"
    assert sorted(path.name for path in checkpoint.glob("ema*")) == ["ema", "ema-fast"]
    for record, folder in zip(records, ("ema", "ema-fast"), strict=True):
        saved = BertForSequenceClassification.from_pretrained(checkpoint / folder)
        assert same(dict(saved.named_parameters()), {n: record.average[2][n] for n, _ in saved.named_parameters()})

    again = [callback(), callback(momentum=0.5, name="fast")]
    resumed = Trainer(bert(), arguments(tmp_path), train_dataset=Sentences(), callbacks=again)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    for old, new in zip((slow, fast), again, strict=True):
        assert same(clones(old), clones(new)) and new.average.num_updates == 6
    assert not same(clones(slow), clones(fast))

    batch = Sentences().ids[:3]
    assert slow.teacher is not fast.teacher
    for average, folder in ((slow, "slow"), (fast, "fast")):
        average.export(tmp_path / folder)
        exported = BertForSequenceClassification.from_pretrained(tmp_path / folder).eval()
        assert average.average.equals(exported)
        with torch.no_grad():
            assert torch.equal(average.teacher(input_ids=batch).logits, exported(input_ids=batch).logits)


@pytest.mark.parametrize("name", [None, "fast"])
def test_two_averages_in_one_folder_are_refused(tmp_path: Path, name: str | None) -> None:
    first, second = callback(name=name), callback(momentum=0.5, name=name)
    with pytest.raises(ValueError) as caught:
        trainer(first, tmp_path, second).train()
    for said in (repr(first), repr(second), "momentum=0.9", "momentum=0.5", repr(first.folder), "name="):
        assert said in str(caught.value)


def test_one_callback_in_a_run_twice_is_refused(tmp_path: Path) -> None:
    """Trainer only logs a warning, and the average would move twice per step."""
    average = callback()
    run = trainer(average, tmp_path)
    run.add_callback(average)
    with pytest.raises(ValueError, match=r"reference_batch_size=4\) is twice in this Trainer's callbacks"):
        run.train()
    run.pop_callback(average)
    run.train()
    assert (average.average.num_updates, average.clock) == (6, 6.0)


def test_callbacks_of_other_runs_do_not_clash(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        average = callback()
        run = trainer(average, tmp_path / folder, max_steps=1)
        run.train()
        run.train()
        assert average.average.num_updates == 2
        assert pickle.loads(pickle.dumps(average)).average.num_updates == 2  # as Ray does with a trainer


def test_the_missing_average_names_those_that_are_there(tmp_path: Path) -> None:
    trainer(callback(name="slow"), tmp_path, save_strategy="steps", save_steps=3, max_steps=3).train()
    with pytest.raises(AverageStateError, match=r"Other averages there, each belonging to a name=: ema-slow"):
        trainer(callback(), tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


@pytest.mark.parametrize("name", ["", "a/b", "..", "-x", "a b"])
def test_names_are_parts_of_a_file_name(name: str) -> None:
    with pytest.raises(ValueError, match="name must be"):
        callback(name=name)


# A new attempt with a smaller batch


class OutOfMemory(TrainerCallback):
    """Runs out of memory once, before optimizer step `step` (from 0) is taken."""

    def __init__(self, step: int) -> None:
        self.step: int | None = step

    def on_pre_optimizer_step(self, _: Any, state: TrainerState, *__: Any, **___: Any) -> None:
        if state.global_step == self.step:
            self.step = None
            raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")


@pytest.mark.parametrize("step", [0, 2])
def test_a_new_attempt_restarts_the_average_with_the_new_batch(tmp_path: Path, step: int) -> None:
    average = callback(ema_start=2)
    begin, recorder = Begin(average), Recorder(average)
    run = trainer(
        average, tmp_path, begin, OutOfMemory(step), recorder, per_device_train_batch_size=8, auto_find_batch_size=True
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run.train()
    said = [str(warning.message) for warning in caught]
    assert sum("starts again with 7 samples" in text for text in said) == (step > 0)
    # An attempt without a step says nothing: ten of them may come before one that fits.
    spoken = [text.split("kappa=")[1].split()[0] for text in said if "kappa=" in text]
    assert spoken == (["2", "1.75"] if step else ["1.75"])
    assert (average.kappa, average.clock) == (7 / 4, 6 * 7 / 4)
    assert average.average.num_updates == run.state.global_step == 6
    assert begin.updates == [0, 0]
    assert same(begin.averages[1] | begin.students[1], begin.averages[1])
    assert same(begin.students[0], begin.students[1]) == (step == 0)
    recorder.student, recorder.average = recorder.student[step:], recorder.average[step:]
    # The first two steps begin before reference step 2, so the average is the student until then.
    assert all(torch.equal(recorder.average[1][name], student) for name, student in recorder.student[1].items())
    start = recorder.average[1]
    recorder.student, recorder.average = recorder.student[2:], recorder.average[2:]
    assert follows(start, recorder, 7 / 4)


def test_the_teacher_outlives_a_new_attempt(tmp_path: Path) -> None:
    class Asks(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            teachers.append(average.teacher)

    teachers: list[Any] = []
    average = callback()
    run = trainer(average, tmp_path, Asks(), OutOfMemory(1), per_device_train_batch_size=8, auto_find_batch_size=True)
    with pytest.warns(UserWarning, match="restarts from the model"):
        run.train()
    assert teachers[0] is teachers[1]
    assert same(clones(average), {n: t for n, t in teachers[0].module.state_dict().items() if n in clones(average)})


def test_a_new_attempt_at_a_resumed_run_resumes_the_average_again(tmp_path: Path) -> None:
    settings = {"per_device_train_batch_size": 8, "auto_find_batch_size": True}
    trainer(callback(), tmp_path, save_strategy="steps", save_steps=3, **settings).train()
    average = callback()
    begin = Begin(average)
    run = trainer(average, tmp_path, begin, OutOfMemory(5), **settings)
    run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert same(begin.averages[0], begin.averages[1])
    assert not same(begin.students[0], begin.students[1])
    assert begin.updates == [3, 3] and average.average.num_updates == 6
    assert average.clock == 3 * 2 + 3 * 7 / 4


def test_a_run_that_was_broken_off_continues_its_average(tmp_path: Path) -> None:
    class Interrupt(TrainerCallback):
        stop = True

        def on_step_end(self, _: Any, state: TrainerState, *__: Any, **___: Any) -> None:
            if self.stop and state.global_step == 2:
                self.stop = False
                raise KeyboardInterrupt

    average = callback()
    run = trainer(average, tmp_path, Interrupt(), auto_find_batch_size=True)
    with pytest.raises(KeyboardInterrupt):
        run.train()
    run.train()
    assert average.average.num_updates == 2 + 6


# Hyper-parameter search


class Trial(dict[str, Any]):
    number = 0
    params: dict[str, Any]


class Search(hyperparameter_search.OptunaBackend):
    """Two trials as the optuna backend runs them, without optuna."""

    @staticmethod
    def is_available() -> bool:
        return True

    def run(self, trainer: Any, n_trials: int, direction: str, **_: Any) -> BestRun:
        for number in range(n_trials):
            trial = Trial()
            trial.number, trial.params = number, {"per_device_train_batch_size": [4, 8][number]}
            trainer.objective = None
            trainer.train(resume_from_checkpoint=None, trial=trial)
        return BestRun("0", 0.0, {})


@pytest.mark.parametrize("named", [False, True])
def test_trials_have_averages_of_their_own(tmp_path: Path, monkeypatch: Any, named: bool) -> None:
    monkeypatch.setitem(hyperparameter_search.ALL_HYPERPARAMETER_SEARCH_BACKENDS, HPSearchBackend.OPTUNA, Search)
    monkeypatch.setattr(integration_utils, "is_optuna_available", lambda: True)
    monkeypatch.setitem(sys.modules, "optuna", SimpleNamespace(trial=SimpleNamespace(BaseTrial=Trial)))
    average = callback()
    begin, recorder = Begin(average), Recorder(average)
    run = Trainer(
        args=arguments(tmp_path, max_steps=4, save_strategy="steps", save_steps=2, save_total_limit=1),
        train_dataset=Sentences(),
        callbacks=[average, begin, recorder],
        model_init=bert,
    )
    # An earlier run's checkpoint of the same step, where a callback might look first.
    (tmp_path / "checkpoint-4").mkdir()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "EMACallback: the model")
        run.hyperparameter_search(
            hp_space=lambda trial: trial.params,
            n_trials=2,
            backend="optuna",
            hp_name=(lambda trial: f"batch/{trial.params['per_device_train_batch_size']}") if named else None,
        )
    folders = ["batch/4", "batch/8"] if named else ["run-0", "run-1"]
    assert begin.updates == [0, 0]
    for trial, folder in enumerate(folders):
        assert [path.name for path in (tmp_path / folder).iterdir()] == ["checkpoint-4"]
        saved = BertForSequenceClassification.from_pretrained(tmp_path / folder / "checkpoint-4" / "ema")
        expected = recorder.average[4 * trial + 3]
        assert all(torch.equal(p, expected[name]) for name, p in saved.named_parameters())
    assert not (tmp_path / "checkpoint-4" / "ema").exists()
    assert average.kappa == 2.0
    recorder.student, recorder.average = recorder.student[4:], recorder.average[4:]
    assert follows(begin.students[1], recorder, 2.0)


def test_a_trial_whose_folder_is_gone_is_an_error(tmp_path: Path) -> None:
    average = callback()
    args = arguments(tmp_path)
    state = TrainerState(global_step=2, is_hyper_param_search=True, trial_params={"learning_rate": 1.0})
    other = TrainerState(global_step=2, is_hyper_param_search=True, trial_params={"learning_rate": 2.0})
    for folder in ("run-0", "run-1"):
        (tmp_path / folder / "checkpoint-2").mkdir(parents=True)
    other.save_to_json(str(tmp_path / "run-0" / "checkpoint-2" / "trainer_state.json"))
    with pytest.raises(FileNotFoundError, match=r"trial \{'learning_rate': 1.0\} with checkpoint-2"):
        average.on_save(args, state, Any, model=bert())  # type: ignore[arg-type]


# Just-in-time checkpoints


class Request(TrainerCallback):
    """Asks for a checkpoint as SIGTERM does, from within one event of one step."""

    def __init__(self, event: str, step: int) -> None:
        self.step = step
        self.manager: Any = None
        setattr(self, event, self._ask)

    def _ask(self, _: Any, state: TrainerState, *__: Any, **___: Any) -> None:
        if state.global_step == self.step:
            self.manager.is_checkpoint_requested = True


@pytest.mark.parametrize(
    ("event", "step", "saved_in", "saved_at", "strategy"),
    [
        ("on_optimizer_step", 2, "on_step_end", 3, "no"),
        ("on_optimizer_step", 2, "on_step_end", 3, "steps"),
        ("on_step_end", 3, "on_step_begin", 3, "no"),
        ("on_step_begin", 3, "on_pre_optimizer_step", 3, "no"),
        ("on_step_end", 4, "on_epoch_end", 4, "no"),
        ("on_step_end", 4, "on_epoch_end", 4, "steps"),
        ("on_substep_end", 3, "on_pre_optimizer_step", 3, "no"),
        ("on_substep_end", 2, "on_pre_optimizer_step", 2, "steps"),
    ],
)
def test_a_just_in_time_checkpoint_has_the_average(
    tmp_path: Path, event: str, step: int, saved_in: str, saved_at: int, strategy: str
) -> None:
    settings = {"max_steps": 6, "per_device_train_batch_size": 16, "save_strategy": strategy, "save_steps": 1}
    if event == "on_substep_end":  # in the midst of a step's batches
        settings |= {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 2}
    whole = callback(reference_batch_size=16)
    complete = Recorder(whole)
    trainer(whole, tmp_path / "whole", complete, **settings).train()

    average, request = callback(reference_batch_size=16), Request(event, step)
    run = trainer(average, tmp_path, request, enable_jit_checkpoint=True, **settings)
    jit = next(c for c in run.callback_handler.callbacks if isinstance(c, JITCheckpointCallback))
    assert jit.jit_manager is not None
    request.manager = jit.jit_manager
    events: list[str] = []
    execute = jit.jit_manager.execute_jit_checkpoint

    def noted() -> None:
        events.append(sys._getframe(1).f_code.co_name)
        execute()

    jit.jit_manager.execute_jit_checkpoint = noted  # type: ignore[method-assign]
    run.train()
    assert events == [saved_in]
    checkpoint = tmp_path / f"checkpoint-{saved_at}"
    assert (checkpoint / "optimizer.pt").is_file()
    saved = BertForSequenceClassification.from_pretrained(checkpoint / "ema")
    assert all(torch.equal(p, complete.average[saved_at - 1][name]) for name, p in saved.named_parameters())
    student = BertForSequenceClassification.from_pretrained(checkpoint)
    assert all(torch.equal(p, complete.student[saved_at - 1][name]) for name, p in student.named_parameters())
    claimed = json.loads((checkpoint / "ema" / "ema_state.json").read_text(encoding="utf-8"))
    assert (claimed["num_updates"], claimed["state"]["global_step"]) == (saved_at, saved_at)
    # Also where the checkpoint was there already, and now has other random states.
    assert what_is_missing(checkpoint, average=False) == []

    resumed = callback(reference_batch_size=16)
    trainer(resumed, tmp_path, **settings).train(resume_from_checkpoint=str(checkpoint))
    assert (resumed.average.num_updates, resumed.clock) == (6, 6.0)
    # Where the checkpoint comes after the forward pass of the next step, so does its random state.
    assert same(clones(resumed), clones(whole)) == (saved_in != "on_pre_optimizer_step")


@pytest.mark.skipif(not hasattr(signal, "sigwaitinfo"), reason="needs sigwaitinfo")
def test_a_just_in_time_checkpoint_comes_also_where_the_workers_are_told(tmp_path: Path) -> None:
    """As they are by a scheduler that sends SIGTERM to every process there is."""
    average, told = callback(), []
    more = {"enable_jit_checkpoint": True, "dataloader_num_workers": 1, "dataloader_prefetch_factor": 1}

    class ToAll(TrainerCallback):
        def on_optimizer_step(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
            if state.global_step == 2:
                told.extend(str(worker.pid) for worker in multiprocessing.active_children())
                subprocess.run(["kill", "-TERM", *told], check=True)
                jit.jit_manager.is_checkpoint_requested = True  # which Trainer does some seconds after the signal

    run = trainer(average, tmp_path, ToAll(), **more)
    jit: Any = next(c for c in run.callback_handler.callbacks if isinstance(c, JITCheckpointCallback))
    run.train()
    assert len(told) == 1 and average.global_step == 3
    assert average.newest_checkpoint(tmp_path) == tmp_path / "checkpoint-3"


@pytest.mark.skipif(not hasattr(signal, "sigwaitinfo"), reason="needs sigwaitinfo")
@pytest.mark.parametrize("lasting", [False, True])
def test_so_it_does_where_the_workers_of_an_evaluation_are(tmp_path: Path, lasting: bool) -> None:
    average, told = callback(), list[int]()
    more = {
        "enable_jit_checkpoint": True,
        "dataloader_num_workers": 1,
        "dataloader_persistent_workers": lasting,
        "per_device_eval_batch_size": 1,
        "eval_strategy": "steps",
        "eval_steps": 2,
    }

    class InEvaluation(TrainerCallback):
        def on_prediction_step(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
            if state.global_step == 2 and not told:
                told.extend(worker.pid for worker in multiprocessing.active_children() if worker.pid)
                subprocess.run(["kill", "-TERM", *map(str, told)], check=True)
                jit.jit_manager.is_checkpoint_requested = True

    run = Trainer(
        bert(), arguments(tmp_path, **more), train_dataset=Sentences(), eval_dataset=Sentences(24),
        callbacks=[average, InEvaluation()],
    )  # fmt: skip
    jit: Any = next(c for c in run.callback_handler.callbacks if isinstance(c, JITCheckpointCallback))
    if lasting:
        run.evaluate()  # its workers stay
    run.train()
    assert len(told) == 2 and run.state.global_step < 6
    assert [entry["step"] for entry in run.state.log_history if "eval_loss" in entry][-1] == 2
    assert average.newest_checkpoint(tmp_path) == tmp_path / "checkpoint-2"


def test_another_trainers_evaluations_are_left_alone(tmp_path: Path) -> None:
    mine, other = (trainer(callback(), tmp_path / name, enable_jit_checkpoint=True) for name in ("mine", "other"))
    assert all("get_eval_dataloader" in vars(made) for made in (mine, other))
    plain = Trainer(bert(), arguments(tmp_path, enable_jit_checkpoint=True), train_dataset=Sentences())
    once = mine.get_eval_dataloader
    mine.train()
    assert "get_eval_dataloader" not in vars(plain) and mine.get_eval_dataloader is once


def test_the_end_of_a_run_writes_into_no_checkpoint_of_another(tmp_path: Path) -> None:
    trainer(callback(), tmp_path, save_strategy="steps", save_steps=6, learning_rate=1e-3).train()
    before = (tmp_path / "checkpoint-6" / "ema").stat().st_mtime_ns
    trainer(callback(), tmp_path, enable_jit_checkpoint=True).train()
    assert (tmp_path / "checkpoint-6" / "ema").stat().st_mtime_ns == before


# A checkpoint without its average


def lost(tmp_path: Path) -> str:
    trainer(callback(), tmp_path, save_strategy="steps", save_steps=3, max_steps=3).train()
    (tmp_path / "checkpoint-3" / "ema").rename(tmp_path / "elsewhere")
    return str(tmp_path / "checkpoint-3")


@pytest.mark.parametrize("damage", ["missing", "truncated", "no state", "flipped"])
def test_a_missing_or_damaged_average_is_rebuilt_on_request(tmp_path: Path, damage: str) -> None:
    checkpoint = lost(tmp_path)
    if damage != "missing":
        folder = Path(checkpoint) / "ema"
        (tmp_path / "elsewhere").rename(folder)
        weights = folder / "model.safetensors"
        if damage == "truncated":
            weights.write_bytes(weights.read_bytes()[:-100])
        elif damage == "no state":
            (folder / "ema_state.json").unlink()
        else:
            data = bytearray(weights.read_bytes())
            data[-5] ^= 1
            weights.write_bytes(data)
        with pytest.raises(AverageStateError, match=r"damaged.*on_missing_average='rebuild'"):
            trainer(callback(), tmp_path).train(resume_from_checkpoint=checkpoint)

    average = callback(on_missing_average="rebuild", reference_batch_size=2)
    begin, recorder = Begin(average), Recorder(average)
    run = trainer(average, tmp_path, begin, recorder)
    with pytest.warns(
        UserWarning, match=r"is rebuilt from the student's weights of step 3, and its clock is put at 6 "
    ):
        run.train(resume_from_checkpoint=checkpoint)
    assert begin.updates == [0] and average.average.num_updates == 3
    assert average.clock == 12.0
    student = BertForSequenceClassification.from_pretrained(checkpoint)
    assert all(torch.equal(begin.averages[0][name], p) for name, p in student.named_parameters())
    assert follows(begin.students[0], recorder, 2.0)


def test_a_good_average_is_not_rebuilt(tmp_path: Path) -> None:
    whole = callback()
    trainer(whole, tmp_path, save_strategy="steps", save_steps=3).train()
    average = callback(on_missing_average="rebuild")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "EMACallback")
        trainer(average, tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert same(clones(average), clones(whole))


def test_a_flipped_bit_of_the_student_stops_the_resume(tmp_path: Path) -> None:
    trainer(callback(), tmp_path, save_strategy="steps", save_steps=3, max_steps=3).train()
    weights = tmp_path / "checkpoint-3" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-4] ^= 1  # of one weight, by less than the distance to the average could tell
    weights.write_bytes(data)
    with pytest.raises(AverageStateError, match=r"checkpoint-3 cannot be resumed: model\.safetensors is damaged"):
        trainer(callback(), tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


def test_the_newest_checkpoint_is_the_newest_that_is_whole(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    average = callback()
    assert average.newest_checkpoint(tmp_path) is None
    trainer(average, tmp_path, save_strategy="steps", save_steps=1).train()
    assert average.newest_checkpoint(tmp_path) == tmp_path / "checkpoint-6"
    damages = {
        6: lambda folder: (folder / "trainer_state.json").unlink(),
        5: lambda folder: shutil.rmtree(folder / "ema"),
        4: lambda folder: os.truncate(folder / "optimizer.pt", 100),
        3: lambda folder: shutil.copytree(tmp_path / "checkpoint-2" / "ema", folder / "ema", dirs_exist_ok=True),
        2: lambda folder: os.truncate(folder / "ema" / "model.safetensors", 100),
    }
    transformers.utils.logging.enable_propagation()
    for step, damage in damages.items():
        damage(tmp_path / f"checkpoint-{step}")
        assert average.newest_checkpoint(tmp_path) == tmp_path / f"checkpoint-{step - 1}"
    transformers.utils.logging.disable_propagation()
    for what in (
        "checkpoint-6: trainer_state.json is missing",
        "checkpoint-5: There is no saved average at",
        "checkpoint-4: optimizer.pt is not readable",
        "checkpoint-3: the average in its 'ema' is of step 2",
        "checkpoint-2: The saved average in",
    ):
        assert what in caplog.text, what
    rebuilding = callback(on_missing_average="rebuild")
    assert rebuilding.newest_checkpoint(tmp_path) == tmp_path / "checkpoint-5"


def test_an_average_of_another_step_is_not_rebuilt(tmp_path: Path) -> None:
    trainer(callback(), tmp_path, save_strategy="steps", save_steps=3).train()
    average = callback(resume_from=tmp_path / "checkpoint-6", on_missing_average="rebuild")
    with pytest.raises(AverageStateError, match="of step 6, but training resumes at step 3"):
        trainer(average, tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


def test_all_processes_rebuild_when_one_must(tmp_path: Path, monkeypatch: Any) -> None:
    trainer(callback(), tmp_path, save_strategy="steps", save_steps=3, max_steps=3).train()
    average = callback(on_missing_average="rebuild")
    begin = Begin(average)
    others = {1: ["not on process 1."], 0: []}  # one entry of each process says what is wrong with its average
    monkeypatch.setattr(callback_checkpoints, "gather_object", lambda mine: [*mine, *others[len(mine)]])
    with pytest.warns(UserWarning, match="is rebuilt from.*: not on process 1"):
        trainer(average, tmp_path, begin, max_steps=4).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert begin.updates == [0]
    assert all(torch.equal(begin.averages[0][name], p) for name, p in begin.students[0].items())


def test_what_to_do_without_an_average_is_checked() -> None:
    with pytest.raises(ValueError, match="'ignore'"):
        callback(on_missing_average="ignore")


# What Trainer restores, evaluates and loads by itself


@pytest.mark.parametrize("restore", [False, True])
def test_restored_callback_states_leave_the_users_callbacks_alone(tmp_path: Path, restore: bool) -> None:
    whole = [callback(), callback(momentum=0.5, name="fast")]
    run = trainer(whole[0], tmp_path, whole[1], save_strategy="steps", save_steps=3)
    run.train()
    mine = [callback(), callback(momentum=0.5, name="fast")]
    again = trainer(mine[0], tmp_path, mine[1], restore_callback_states_from_checkpoint=restore)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert [c for c in again.callback_handler.callbacks if isinstance(c, EMACallback)] == mine
    for old, new in zip(whole, mine, strict=True):
        assert same(clones(old), clones(new)) and new.average.num_updates == 6
        assert (new.momentum, new.folder) == (old.momentum, old.folder)


def test_every_set_of_an_evaluation_is_scored_on_the_average(tmp_path: Path) -> None:
    average = callback(momentum=0.99)
    sets = {"a": Sentences(7), "b": torch.utils.data.Subset(Sentences(), range(20, 31))}
    run = trainer(average, tmp_path, learning_rate=5e-2)
    run.train()
    student = run.evaluate(sets)
    with average.averaged_weights():
        averaged = run.evaluate(sets)
    average.export(tmp_path / "export")
    exported = BertForSequenceClassification.from_pretrained(tmp_path / "export")
    expected = trainer(callback(), tmp_path, model=exported).evaluate(sets)
    for name in sets:
        key = f"eval_{name}_loss"
        assert averaged[key] == expected[key]
        assert not math.isclose(averaged[key], student[key], rel_tol=1e-3)
    assert run.evaluate(sets)["eval_b_loss"] == student["eval_b_loss"]


def test_loading_the_best_model_loads_the_student_and_leaves_the_average(tmp_path: Path) -> None:
    average = callback()
    run = Trainer(
        bert(),
        arguments(
            tmp_path,
            save_strategy="steps",
            eval_strategy="steps",
            save_steps=2,
            eval_steps=2,
            learning_rate=0.3,
            load_best_model_at_end=True,
        ),
        train_dataset=Sentences(),
        eval_dataset=Sentences(10),
        callbacks=[average, recorder := Recorder(average)],
    )
    run.train()
    assert run.state.best_model_checkpoint is not None and run.state.best_global_step < 6
    assert run.evaluate()["eval_loss"] == run.state.best_metric
    assert same(clones(average), recorder.average[-1])
    best = recorder.average[run.state.best_global_step - 1]
    saved = BertForSequenceClassification.from_pretrained(Path(run.state.best_model_checkpoint) / "ema")
    assert all(torch.equal(p, best[name]) for name, p in saved.named_parameters())


def test_every_hook_is_an_event_of_trainer() -> None:
    hooks = {name for name in dir(EMACallback) if name.startswith("on_")}
    assert hooks == {name for name in dir(TrainerCallback) if name.startswith("on_")}
