from __future__ import annotations

import math
import os
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.data_loader import prepare_data_loader
from accelerate.optimizer import AcceleratedOptimizer
from stock_runs import (
    RHO,
    Recorder,
    Regression,
    Sentences,
    Streamed,
    arguments,
    bert,
    callback,
    clones,
    fresh_accelerator,
    same,
    trainer,
)
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import (
    BertForSequenceClassification,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from hf_ema_scaling.ema import AverageStateError, DeadTeacherError, EMATeacher, WeightAverage
from hf_ema_scaling.training.callback import EMACallback
from hf_ema_scaling.training.stock import loader_batch_size, nonfinite_parameter

pytestmark = pytest.mark.filterwarnings("ignore:EMACallback scales only the momentum")


@pytest.mark.parametrize(("batch", "accumulation", "kappa"), [(4, 1, 1.0), (8, 1, 2.0), (4, 4, 4.0), (2, 1, 0.5)])
def test_follows_the_closed_form_of_the_students_own_weights(
    tmp_path: Path, batch: int, accumulation: int, kappa: float
) -> None:
    average = callback()
    recorder = Recorder(average)
    model = bert()
    expected = {name: p.detach().double() for name, p in model.named_parameters()}
    run = trainer(
        average,
        tmp_path,
        recorder,
        model=model,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
    )
    run.train()
    assert average.kappa == kappa
    assert average.clock == 6 * kappa
    assert average.average.num_updates == run.state.global_step == len(recorder.student) == 6
    for student, shadow in zip(recorder.student, recorder.average, strict=True):
        for name in expected:
            expected[name] = RHO**kappa * expected[name] + (1 - RHO**kappa) * student[name].double()
            assert (shadow[name] - expected[name]).abs().max() < 1e-6
    assert average.average.distance(model) > 1e-3


def test_accumulation_does_not_change_the_trajectory(tmp_path: Path) -> None:
    results = []
    for batch, accumulation in ((8, 1), (2, 4)):
        average = callback()
        run = trainer(
            average,
            tmp_path,
            model=Regression(),
            optim="sgd",
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
        )
        run.train()
        assert (average.kappa, average.average.num_updates, run.state.global_step) == (2.0, 6, 6)
        results.append(clones(average))
    for name in results[0]:
        torch.testing.assert_close(results[0][name], results[1][name], rtol=0, atol=1e-6)


def test_the_last_step_of_an_epoch_counts_the_batches_it_accumulated(tmp_path: Path) -> None:
    average = callback()
    recorder = Recorder(average)
    run = trainer(average, tmp_path, recorder, gradient_accumulation_steps=4)
    # Ten batches, four to a step: the third step of an epoch has two.
    run.train_dataset = torch.utils.data.Subset(Sentences(), range(40))
    expected = {name: p.detach().double() for name, p in run.model.named_parameters()}
    run.train()
    assert average.kappa == 4 and average.clock == 2 * 10
    for kappa, student, shadow in zip([4, 4, 2] * 2, recorder.student, recorder.average, strict=True):
        for name in expected:
            expected[name] = RHO**kappa * expected[name] + (1 - RHO**kappa) * student[name].double()
            assert (shadow[name] - expected[name]).abs().max() < 1e-6


def test_half_life_is_the_same_momentum(tmp_path: Path) -> None:
    by_momentum, by_half_life = callback(momentum=0.5**0.25), callback(momentum=None, half_life=16)
    assert by_half_life.momentum == by_momentum.momentum
    with pytest.raises(RuntimeError, match="no average yet"):
        _ = by_half_life.average


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"half_life": 10.0}, "exactly one"),
        ({"momentum": None}, "exactly one"),
        ({"momentum": 0.0}, "momentum=0.0"),
        ({"momentum": 1.0}, "strictly between"),
        ({"momentum": math.nan}, "nan"),
        ({"momentum": None, "half_life": math.inf}, "half_life=inf"),
        ({"momentum": None, "half_life": -1.0}, "half_life"),
        ({"reference_batch_size": 0}, "reference_batch_size"),
        ({"ema_start": -1}, "ema_start"),
        ({"buffers": "keep"}, "keep"),
    ],
)
def test_bad_arguments_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        callback(**changes)


@pytest.mark.filterwarnings("default:EMACallback scales only the momentum")
def test_says_once_that_the_learning_rate_is_not_scaled(tmp_path: Path) -> None:
    average = callback(reference_batch_size=1)
    run = trainer(average, tmp_path, max_steps=1)
    with pytest.warns(UserWarning, match=r"kappa=4 .* 0\.6561\..*times 2 for Adam") as caught:
        run.train()
        run.train()
    assert sum("scales only" in str(w.message) for w in caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        callback_of_one = callback()
        trainer(callback_of_one, tmp_path, max_steps=1).train()
    assert callback_of_one.kappa == 1.0


@pytest.mark.parametrize(
    ("options", "iterable", "expected"),
    [
        ({"num_processes": 4}, False, 16),
        ({"num_processes": 4, "split_batches": True}, False, 4),
        ({"num_processes": 4, "dispatch_batches": False}, True, 16),
        ({"num_processes": 4, "dispatch_batches": False, "split_batches": True}, True, 4),
        ({"num_processes": 4, "dispatch_batches": True}, True, 16),
        ({"num_processes": 4, "dispatch_batches": True, "split_batches": True}, True, 4),
    ],
)
def test_batch_of_a_prepared_loader_over_all_processes(options: dict[str, Any], iterable: bool, expected: int) -> None:
    fresh_accelerator()
    loader = DataLoader(Streamed() if iterable else Sentences(), batch_size=4)
    prepared = prepare_data_loader(loader, process_index=0, put_on_device=True, **options)
    assert loader_batch_size(prepared, 4) == expected


def test_a_loader_without_a_batch_size_is_refused() -> None:
    sampler = [[0, 1], [2]]
    prepared = prepare_data_loader(DataLoader(Sentences(), batch_sampler=sampler), num_processes=1, process_index=0)  # type: ignore[arg-type]
    for loader in (None, DataLoader(Sentences()), prepared):
        with pytest.raises(ValueError, match="cannot tell how many samples"):
            loader_batch_size(loader, 1)


def test_kappa_of_a_stream_in_a_stock_trainer(tmp_path: Path) -> None:
    average = callback(reference_batch_size=2)
    run = Trainer(bert(), arguments(tmp_path, max_steps=3), train_dataset=Streamed(), callbacks=[average])
    run.train()
    assert (average.kappa, average.average.num_updates) == (2.0, 3)


def test_before_ema_start_the_average_is_the_student(tmp_path: Path) -> None:
    average = callback(ema_start=3)
    recorder = Recorder(average)
    trainer(average, tmp_path, recorder).train()
    equal = [
        all(torch.equal(shadow[n], student[n]) for n in student)
        for student, shadow in zip(recorder.student, recorder.average, strict=True)
    ]
    assert equal == [True] * 3 + [False] * 3

    short = callback(ema_start=100)
    run = trainer(short, tmp_path)
    run.train()
    assert short.average.equals(run.model)


def test_resuming_is_bit_identical(tmp_path: Path) -> None:
    whole = callback(ema_start=1)
    trainer(whole, tmp_path, save_strategy="steps", save_steps=3).train()

    resumed = callback(ema_start=1)
    run = trainer(resumed, tmp_path)
    run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert (resumed.average.num_updates, resumed.clock, run.state.global_step) == (6, 6.0, 6)
    assert same(clones(resumed), clones(whole))


def test_a_checkpoint_holds_the_average_as_a_model(tmp_path: Path) -> None:
    average = callback()
    run = trainer(average, tmp_path, save_strategy="steps", save_steps=6)
    run.train()
    loaded = BertForSequenceClassification.from_pretrained(tmp_path / "checkpoint-6" / "ema")
    student = BertForSequenceClassification.from_pretrained(tmp_path / "checkpoint-6")
    assert average.average.equals(loaded)
    assert not average.average.equals(student)
    assert all(torch.equal(a, b) for a, b in zip(student.parameters(), run.model.parameters(), strict=True))


def test_rotation_takes_the_average_along_and_keeps_its_order(tmp_path: Path) -> None:
    average = callback()
    with pytest.warns(UserWarning, match="save_total_limit=1: .* Keep at least two"):
        trainer(average, tmp_path, save_strategy="steps", save_steps=2, save_total_limit=1).train()
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["checkpoint-6"]
    assert (tmp_path / "checkpoint-6" / "ema" / "ema_state.json").is_file()


def test_saving_does_not_touch_older_checkpoints(tmp_path: Path) -> None:
    class Clock(TrainerCallback):
        seen: list[int] = []  # noqa: RUF012

        def on_save(self, *_: Any, **__: Any) -> None:
            self.seen.append(os.stat(tmp_path / "checkpoint-2").st_mtime_ns)

    average = callback()
    trainer(average, tmp_path, Clock(), save_strategy="steps", save_steps=2).train()
    assert len(Clock.seen) == 3
    assert len(set(Clock.seen)) == 1


def test_a_missing_average_stops_the_resume(tmp_path: Path) -> None:
    trainer(callback(), tmp_path, save_strategy="steps", save_steps=3).train()
    (tmp_path / "checkpoint-3" / "ema").rename(tmp_path / "elsewhere")
    checkpoint = str(tmp_path / "checkpoint-3")

    lost = callback()
    with pytest.raises(AverageStateError, match=r"step 3.*resume_from.*on_missing_average='rebuild'"):
        trainer(lost, tmp_path).train(resume_from_checkpoint=checkpoint)
    with pytest.raises(RuntimeError, match="no average yet"):
        _ = lost.average

    wrong = callback(resume_from=tmp_path / "checkpoint-6")
    with pytest.raises(AverageStateError, match="of step 6, but training resumes at step 3"):
        trainer(wrong, tmp_path).train(resume_from_checkpoint=checkpoint)

    with pytest.raises(ValueError, match="starts at step 0"):
        trainer(callback(resume_from=tmp_path / "elsewhere"), tmp_path).train()

    found = callback(resume_from=tmp_path / "elsewhere", momentum=0.8)
    run = trainer(found, tmp_path, max_steps=4)
    with pytest.warns(UserWarning, match=r"momentum was 0.9 .* now 0.8"):
        run.train(resume_from_checkpoint=checkpoint)
    assert found.average.num_updates == 4
    run.train()
    assert found.average.num_updates == 8


def test_the_average_of_another_run_is_noticed(tmp_path: Path) -> None:
    for name, rate in (("first", 1e-2), ("second", 3e-2)):
        trainer(callback(), tmp_path / name, save_strategy="steps", save_steps=3, learning_rate=rate).train()
    run = trainer(callback(), tmp_path / "second")
    with pytest.raises(AverageStateError, match=r"of another run"):
        run.train(resume_from_checkpoint=str(tmp_path / "first" / "checkpoint-3"))
    resumed = callback(resume_from=tmp_path / "first" / "checkpoint-3")
    trainer(resumed, tmp_path / "second").train(resume_from_checkpoint=str(tmp_path / "first" / "checkpoint-3"))
    assert resumed.average.num_updates == 6


def test_a_second_train_continues_the_average(tmp_path: Path) -> None:
    average = callback()
    run = trainer(average, tmp_path, max_steps=3)
    run.train()
    first, teacher = clones(average), average.teacher
    recorder = Recorder(average)
    run.add_callback(recorder)
    run.train()
    assert (average.average.num_updates, average.clock) == (6, 3.0)
    for name, student in recorder.student[0].items():
        expected = RHO * first[name].double() + (1 - RHO) * student.double()
        assert (recorder.average[0][name] - expected).abs().max() < 1e-6
    assert average.teacher is teacher


def test_new_parameters_rebuild_the_average(tmp_path: Path) -> None:
    average = callback()
    run = Trainer(
        args=arguments(tmp_path, max_steps=3), train_dataset=Sentences(), callbacks=[average], model_init=bert
    )
    run.train()
    first, teacher = average.average, average.teacher
    with pytest.warns(UserWarning, match="average is rebuilt"):
        run.train()
    assert average.average is not first
    assert average.teacher is not teacher
    assert average.average.num_updates == 3


def test_averaged_weights_return_on_an_exception(tmp_path: Path) -> None:
    average = callback()
    run = trainer(average, tmp_path)
    run.train()
    before = {name: p.detach().clone() for name, p in run.model.named_parameters()}
    with pytest.raises(KeyError, match="stop"):
        with average.averaged_weights(run.model):
            assert average.average.tensors().keys() >= before.keys()
            for name, parameter in run.model.named_parameters():
                assert torch.equal(parameter, average.average.tensors()[name])
            raise KeyError("stop")
    assert same({name: p.detach() for name, p in run.model.named_parameters()}, before)
    with average.averaged_weights(), pytest.raises(RuntimeError, match="swapped-in"):
        average.on_optimizer_step(
            run.args, TrainerState(), TrainerControl(), model=run.model, optimizer=SimpleNamespace(param_groups=[])
        )


def test_the_teacher_is_the_average_at_every_step(tmp_path: Path) -> None:
    class Asks(TrainerCallback):
        answers: list[tuple[int, Tensor, Tensor]] = []  # noqa: RUF012

        def on_optimizer_step(self, *_: Any, model: nn.Module, **__: Any) -> None:
            teacher, batch = average.teacher, Sentences().ids[:3]
            output = teacher(input_ids=batch).logits
            model.eval()
            with average.averaged_weights(model), torch.no_grad():
                self.answers.append((id(teacher), output, model(input_ids=batch).logits))
            model.train()

    average = callback()
    trainer(average, tmp_path, Asks()).train()
    assert isinstance(average.teacher, EMATeacher)
    assert len({key for key, _, _ in Asks.answers}) == 1
    assert all(torch.equal(output, expected) for _, output, expected in Asks.answers)
    assert len({output.sum().item() for _, output, _ in Asks.answers}) == 6


def test_export_writes_the_average(tmp_path: Path) -> None:
    average = callback()
    run = trainer(average, tmp_path / "run")
    run.train()
    average.export(tmp_path / "export")
    assert average.average.equals(BertForSequenceClassification.from_pretrained(tmp_path / "export"))
    assert not average.average.equals(run.model)


def no_update(self: WeightAverage, model: nn.Module, momentum: float, kappa: float = 1.0) -> None:
    self.num_updates += 1


def copy_student(self: WeightAverage, model: nn.Module, momentum: float, kappa: float = 1.0) -> None:
    self.blend(model, 1.0)


@pytest.mark.parametrize(("mutant", "message"), [(no_update, "not moved"), (copy_student, "equals the student")])
def test_a_dead_average_is_an_error(tmp_path: Path, monkeypatch: Any, mutant: Any, message: str) -> None:
    monkeypatch.setattr(WeightAverage, "update", mutant)
    run = trainer(callback(), tmp_path)
    with pytest.raises(DeadTeacherError, match=f"{message}.* after 3 updates"):
        run.train()
    assert run.state.global_step == 2


def test_steps_with_learning_rate_zero_are_not_judged(tmp_path: Path) -> None:
    average = callback()
    trainer(average, tmp_path, learning_rate=0.0).train()
    assert average.average.num_updates == 6


class NaNAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_pre_optimizer_step(self, _: Any, state: TrainerState, __: Any, model: nn.Module, **___: Any) -> None:
        if state.global_step == self.step:
            parameter = next(p for name, p in model.named_parameters() if name == "classifier.weight")
            assert parameter.grad is not None
            parameter.grad[0, 0] = math.nan


def test_weights_that_are_not_finite_never_enter_the_average(tmp_path: Path) -> None:
    average = callback()
    recorder = Recorder(average)
    run = trainer(average, tmp_path, recorder, NaNAt(3))
    with pytest.raises(FloatingPointError, match=r"'classifier.weight' is not finite after optimizer step 4.* 3 upd"):
        run.train()
    assert same(clones(average), recorder.average[-1])
    assert len(recorder.average) == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_nonfinite_parameter(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)).to(dtype)
    model.register_parameter("nothing", nn.Parameter(torch.empty(0)))
    with torch.no_grad():
        model[0].weight.fill_(torch.finfo(dtype).max)
    assert nonfinite_parameter(model) is None
    for value in (math.nan, math.inf, -math.inf):
        with torch.no_grad():
            model[1].bias[1] = value
        assert nonfinite_parameter(model) == "1.bias"
    model[1].bias.requires_grad_(False)
    assert nonfinite_parameter(model) is None


@pytest.mark.parametrize("norm", [nn.BatchNorm1d(3), nn.InstanceNorm1d(3, track_running_stats=True)])
def test_running_statistics_that_are_not_finite_are_seen(norm: Any) -> None:
    """A step that is skipped for its gradient leaves them behind, and an average would never get rid of them."""
    model = nn.Sequential(nn.Identity(), norm)
    model(torch.full((2, 3, 4), math.inf))
    assert nonfinite_parameter(model) == "1.running_mean"
    norm.reset_running_stats()
    assert nonfinite_parameter(model) is None


def test_nonfinite_parameter_of_several_dtypes() -> None:
    model = nn.Sequential(nn.Linear(3, 3).double(), nn.Linear(3, 3).bfloat16(), nn.Linear(3, 3))
    with torch.no_grad():
        model[0].weight.fill_(1e300)
        assert nonfinite_parameter(model) is None
        model[2].weight[0, 0] = math.nan
        assert nonfinite_parameter(model) == "2.weight"
        model[0].bias[2] = math.inf
    assert nonfinite_parameter(model) == "0.bias"


def started(model: nn.Module, folder: Path, **changes: Any) -> tuple[EMACallback, TrainingArguments, TrainerState]:
    average, args, state = callback(), arguments(folder, **changes), TrainerState()
    loader = prepare_data_loader(DataLoader(Sentences(), batch_size=4), num_processes=1, process_index=0)
    average.on_train_begin(args, state, TrainerControl(), model=model, train_dataloader=loader)
    return average, args, state


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_skipped_by_the_loss_scaler_moves_nothing(tmp_path: Path, fused: bool) -> None:
    model = Regression()
    average, args, state = started(model, tmp_path)
    fresh_accelerator()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    optimizer = AcceleratedOptimizer(torch.optim.AdamW(model.parameters(), lr=0.1, fused=fused), scaler=scaler)
    start, data = clones(average), Sentences()
    for step, (gradient, updates) in enumerate([(math.inf, 0), (1.0, 1), (math.nan, 1), (1.0, 2)]):
        scaler.scale(model(data.ids[:4], data.labels[:4])["loss"]).backward()
        model.line.weight.grad[0, 0] *= gradient  # type: ignore[index]
        state.global_step = step
        average.on_pre_optimizer_step(args, state, TrainerControl(), model=model, optimizer=optimizer)
        optimizer.step()
        average.on_optimizer_step(args, state, TrainerControl(), model=model, optimizer=optimizer)
        optimizer.zero_grad()
        assert average.average.num_updates == updates
        assert same(clones(average), start) == (updates == 0)
    assert (average.clock, average.global_step) == (4.0, 4)
    assert scaler.get_scale() == 2.0**14


def test_names_of_a_wrapped_model_are_the_same_names(tmp_path: Path) -> None:
    model = Regression()
    average, args, state = started(nn.DataParallel(model), tmp_path)
    assert set(clones(average)) == {"line.weight", "line.bias"}
    with torch.no_grad():
        model.line.weight.add_(1.0)
    start = clones(average)["line.weight"]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    average.on_optimizer_step(args, state, TrainerControl(), model=model, optimizer=optimizer)
    torch.testing.assert_close(clones(average)["line.weight"], start + 0.1)


class ScheduleFree(torch.optim.SGD):
    """Known, as all of its kind, by the two modes."""

    def train(self) -> None: ...

    def eval(self) -> None: ...


def test_what_is_not_supported_is_refused(tmp_path: Path) -> None:
    model = Regression()
    with pytest.raises(ValueError, match="schedule_free"):
        started(model, tmp_path, optim="schedule_free_adamw")
    free = ScheduleFree(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="ScheduleFree keeps an average of its own"):
        Trainer(
            model, arguments(tmp_path), train_dataset=Sentences(), callbacks=[callback()], optimizers=(free, None)
        ).train()
    average, args, state = started(model, tmp_path)
    state.global_step = 7
    with pytest.raises(FileNotFoundError, match="checkpoint-7"):
        average.on_save(args, state, TrainerControl(), model=model)
    assert not (tmp_path / "checkpoint-7").exists()
    model.line.weight.ds_id = 0  # type: ignore[assignment]
    with pytest.raises(NotImplementedError, match="ZeRO-3"):
        started(model, tmp_path)
