from __future__ import annotations

import re
import shutil
import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import DistributedType
from torch import nn
from transformers import BertForSequenceClassification

from hf_ema_scaling import ReferenceClock, WeightAverage, register_average
from hf_ema_scaling.ema import AverageStateError, EMATeacher, load_average, save_average

RHO = 0.9


@pytest.fixture(autouse=True)
def _fresh_accelerator() -> Iterator[None]:
    # accumulate() asks GradientState, which outlives the others.
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


class Loop:
    """A plain Accelerate loop of an own kind of model, two batches of three rows to a step."""

    def __init__(
        self, seed: int = 0, *, name: str | None = None, model: nn.Module | None = None, missing: Any = "raise"
    ) -> None:
        torch.manual_seed(seed)
        self.accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
        self.inner = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)) if model is None else model
        optimizer: Any = torch.optim.AdamW(self.inner.parameters(), lr=0.1)
        self.model, self.optimizer = self.accelerator.prepare(self.inner, optimizer)
        self.average, self.clock = WeightAverage(self.model), ReferenceClock(3)
        self.registration = register_average(
            self.accelerator, self.model, self.average, self.clock, name=name, on_missing_average=missing
        )
        self.students: list[dict[str, torch.Tensor]] = []

    def train(self, start: int, end: int) -> None:
        for number in range(2 * start, 2 * end):
            rows = torch.randn(3, 4, generator=torch.Generator().manual_seed(number))
            with self.accelerator.accumulate(self.model):
                self.accelerator.backward(self.model(rows).square().mean())
                self.optimizer.step()
                self.optimizer.zero_grad()
            if self.accelerator.sync_gradients:
                self.average.update(self.model, RHO, self.clock.advance(6))
                self.students.append({n: p.detach().double() for n, p in self.inner.named_parameters()})

    def bits(self) -> list[dict[str, torch.Tensor]]:
        return [{k: v.clone() for k, v in x.items()} for x in (self.average.tensors(), self.inner.state_dict())]


def test_the_average_follows_the_closed_form_and_resumes_bit_for_bit(tmp_path: Path) -> None:
    whole = Loop()
    expected = {name: p.detach().double() for name, p in whole.inner.named_parameters()}
    whole.train(0, 3)
    whole.accelerator.save_state(str(tmp_path / "checkpoint"))
    whole.train(3, 6)
    for student in whole.students:
        expected = {n: RHO**2 * expected[n] + (1 - RHO**2) * student[n] for n in expected}
    for name in expected:
        assert (whole.average.tensors()[name] - expected[name]).abs().max() < 1e-6
    assert whole.average.distance(whole.inner) > 1e-3

    resumed = Loop(seed=1)
    resumed.accelerator.load_state(str(tmp_path / "checkpoint"))
    assert (resumed.average.num_updates, resumed.clock.units, resumed.clock.position) == (3, 18.0, 6.0)
    resumed.train(3, 6)
    assert tiny.same_bits(resumed.bits(), whole.bits())
    assert (resumed.average.num_updates, resumed.clock.position) == (6, 12.0)


def test_only_safetensors_and_json_are_written_and_nothing_is_left_over(tmp_path: Path) -> None:
    loop = Loop()
    for _ in range(2):  # the second replaces the first
        loop.train(0, 1)
        loop.accelerator.save_state(str(tmp_path))
    assert sorted(path.name for path in (tmp_path / "ema").iterdir()) == ["ema_state.json", "model.safetensors"]
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["ema"]
    state = load_average(tmp_path / "ema", loop.inner, loop.average)
    assert state.pop("student").keys() == loop.inner.state_dict().keys()
    assert state == {"units_seen": 12.0, "reference_batch_size": 3, "processes": 1}


def test_a_transformers_model_gets_a_from_pretrained_folder(tmp_path: Path) -> None:
    loop = Loop(model=tiny.bert())
    with torch.no_grad():
        loop.inner.get_parameter("classifier.bias").add_(1.0)
    loop.average.update(loop.model, RHO)
    loop.accelerator.save_state(str(tmp_path))
    assert loop.average.equals(BertForSequenceClassification.from_pretrained(tmp_path / "ema"))


def test_a_checkpoint_without_a_sound_average_loads_nothing(tmp_path: Path) -> None:
    saved = Loop()
    saved.train(0, 2)
    saved.accelerator.save_state(str(tmp_path))
    loop = Loop(seed=1)
    before = loop.bits()
    (tmp_path / "ema").rename(tmp_path / "gone")
    with pytest.raises(AverageStateError, match="no saved average at"):
        loop.accelerator.load_state(str(tmp_path))
    (tmp_path / "gone").rename(tmp_path / "ema")
    weights = tmp_path / "ema" / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(AverageStateError, match="damaged"):
        loop.accelerator.load_state(str(tmp_path))
    save_average(tmp_path / "ema", saved.inner, saved.average, state={})
    with pytest.raises(AverageStateError, match="register_average did not write it"):
        loop.accelerator.load_state(str(tmp_path))
    assert tiny.same_bits(loop.bits()[1], before[1])
    assert loop.clock.units == 0


def mixed(folder: Path, *names: str) -> Path:
    """A checkpoint of three steps in which files of these names are those of two."""
    loop = Loop()
    loop.train(0, 2)
    loop.accelerator.save_state(str(folder / "two"))
    loop.train(2, 3)
    loop.accelerator.save_state(str(folder / "three"))
    for name in names:
        shutil.copytree(folder / "two" / name, folder / "three" / name, dirs_exist_ok=True) if name == "ema" else (
            shutil.copy2(folder / "two" / name, folder / "three" / name)
        )
    return folder / "three"


@pytest.mark.parametrize("missing", ["raise", "rebuild"])
@pytest.mark.parametrize("name", ["ema", "model.safetensors"])
def test_student_and_average_of_two_steps_are_refused_and_nothing_is_loaded(
    tmp_path: Path, name: str, missing: str
) -> None:
    folder = mixed(tmp_path, name)
    loop = Loop(seed=1, missing=missing)
    before = loop.bits()
    with pytest.raises(AverageStateError, match=r"model\.safetensors in .*three holds other weights .* two steps"):
        loop.accelerator.load_state(str(folder))
    assert tiny.same_bits(loop.bits(), before) and (loop.average.num_updates, loop.clock.units) == (0, 0)
    loop.accelerator.load_state(str(tmp_path / "two"))
    assert (loop.average.num_updates, loop.clock.units) == (2, 12.0)


def test_a_flipped_bit_of_the_student_is_seen(tmp_path: Path) -> None:
    weights = mixed(tmp_path) / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-4] ^= 1  # the least significant bit of a weight
    weights.write_bytes(data)
    with pytest.raises(AverageStateError, match=r"holds other weights .*1 tensors, first '2\.weight'.* or damaged"):
        Loop(seed=1).accelerator.load_state(str(weights.parent))


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.bin", "random_states_0.pkl"])
def test_what_else_is_missing_or_torn_is_named_before_anything_is_loaded(tmp_path: Path, name: str) -> None:
    path = mixed(tmp_path) / name
    whole = path.read_bytes()
    loop = Loop(seed=1)
    before = loop.bits()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(AverageStateError, match=rf"three cannot be loaded: {name} is not readable .*before it"):
        loop.accelerator.load_state(str(path.parent))
    path.unlink()
    with pytest.raises(AverageStateError, match=rf"three cannot be loaded: {name} is missing"):
        loop.accelerator.load_state(str(path.parent))
    assert tiny.same_bits(loop.bits(), before)


def test_weights_saved_without_safetensors_are_verified_too(tmp_path: Path) -> None:
    loop = Loop()
    for steps in (2, 3):
        loop.train(steps - 1, steps)
        loop.accelerator.save_state(str(tmp_path / str(steps)), safe_serialization=False)
    resumed = Loop(seed=1)
    resumed.accelerator.load_state(str(tmp_path / "3"))
    assert tiny.same_bits(resumed.bits(), loop.bits())
    shutil.copy2(tmp_path / "2" / "pytorch_model.bin", tmp_path / "3")
    with pytest.raises(AverageStateError, match=r"pytorch_model\.bin in .* holds other weights"):
        resumed.accelerator.load_state(str(tmp_path / "3"))


def test_objects_of_ones_own_are_verified_before_anything_is_loaded(tmp_path: Path) -> None:
    loop = Loop()
    loop.accelerator.register_for_checkpointing(torch.nn.Linear(1, 1))
    loop.train(0, 1)
    loop.accelerator.save_state(str(tmp_path / "one"))
    path = tmp_path / "one" / "custom_checkpoint_0.pkl"
    path.write_bytes(path.read_bytes()[:-40])
    loop.train(1, 2)
    before = loop.bits()
    with pytest.raises(AverageStateError, match=r"custom_checkpoint_0\.pkl is not readable"):
        loop.accelerator.load_state(str(tmp_path / "one"))
    assert tiny.same_bits(loop.bits(), before)


class Places:
    """A data loader that accelerate asks for its place, as it does those of torchdata."""

    use_stateful_dataloader = True
    dataset: tuple[int, ...] = ()

    def __init__(self) -> None:
        self.place = 0

    def state_dict(self) -> dict[str, int]:
        return {"place": self.place}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.place = state["place"]


def everything(seed: int) -> tuple[Loop, Places]:
    """A loop with one of each that accelerate saves."""
    loop, places = Loop(seed), Places()
    loop.accelerator._dataloaders.append(places)  # type: ignore[arg-type]
    loop.accelerator.prepare_scheduler(torch.optim.lr_scheduler.StepLR(loop.optimizer, 1))
    loop.accelerator.register_for_checkpointing(nn.Linear(1, 1))
    loop.accelerator.scaler = torch.amp.GradScaler("cpu")
    return loop, places


def flip_in_a_record(path: Path) -> None:
    """One bit of the longest record of a file of PyTorch."""
    data = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as file:
        record = max(file.infolist(), key=lambda record: record.file_size)
    head = record.header_offset
    names = sum(struct.unpack("<HH", data[head + 26 : head + 30]))
    data[head + 30 + names + record.file_size // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("damage", ["flipped", "missing"])
def test_damage_to_any_file_is_named_before_anything_is_loaded(tmp_path: Path, damage: str) -> None:
    loop, places = everything(0)
    loop.train(0, 2)
    places.place = 7
    loop.accelerator.save_state(str(tmp_path))
    torch.save({"seed": 3}, tmp_path / "sampler.bin")  # accelerate has one for iterable data alone
    names = sorted(path.name for path in tmp_path.iterdir() if path.is_file())
    assert names == [
        "custom_checkpoint_0.pkl", "dl_state_dict.bin", "model.safetensors", "optimizer.bin", "random_states_0.pkl",
        "sampler.bin", "scaler.pt", "scheduler.bin",
    ]  # fmt: skip
    other, moved = everything(1)
    before = other.bits()
    for name in names:
        path = tmp_path / name
        whole = path.read_bytes()
        if damage == "missing":
            path.unlink()
        elif path.suffix != ".safetensors":
            flip_in_a_record(path)
        else:
            path.write_bytes(whole[:-4] + bytes([whole[-4] ^ 1]) + whole[-3:])
        if (damage, name) != ("missing", "sampler.bin"):  # which this loader does not need
            with pytest.raises(AverageStateError, match=re.escape(name)) as raised:
                other.accelerator.load_state(str(tmp_path))
            says = {"missing": "is missing", "flipped": "wrong CRC-32 of its record"}[damage]
            weights = (damage, name) == ("flipped", "model.safetensors")
            assert ("holds other weights" if weights else says) in str(raised.value)
        assert tiny.same_bits(other.bits(), before) and moved.place == 0
        path.write_bytes(whole)
    other.accelerator.load_state(str(tmp_path))
    assert tiny.same_bits(other.bits(), loop.bits()) and moved.place == 7


def test_a_save_into_an_older_checkpoint_that_ends_early_leaves_no_half_of_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = Loop()
    loop.train(0, 2)
    loop.accelerator.save_state(str(tmp_path), safe_serialization=False)  # by another name
    loop.train(2, 3)
    names: list[str] = []

    def full(thing: Any, path: Any, *_: Any, **__: Any) -> None:
        names.extend(sorted(entry.name for entry in tmp_path.iterdir()))
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)  # the optimizer's
    with pytest.raises(OSError):
        loop.accelerator.save_state(str(tmp_path))
    assert names == ["ema", "model.safetensors"]
    monkeypatch.undo()
    with pytest.raises(AverageStateError, match=r"optimizer\.bin is missing; random_states_0\.pkl is missing"):
        loop.accelerator.load_state(str(tmp_path))


def test_a_digit_of_the_clock_is_not_believed(tmp_path: Path) -> None:
    saved = Loop()
    saved.train(0, 2)
    saved.accelerator.save_state(str(tmp_path))
    path = tmp_path / "ema" / "ema_state.json"
    assert '"units_seen": 12.0' in path.read_text()
    path.write_text(path.read_text().replace('"units_seen": 12.0', '"units_seen": 16.0'))
    loop = Loop(seed=1)
    before = loop.bits()
    with pytest.raises(AverageStateError, match=r"ema_state\.json is not as it was written"):
        loop.accelerator.load_state(str(tmp_path))
    assert tiny.same_bits(loop.bits(), before) and loop.clock.units == 0.0
    rebuilding = Loop(seed=1, missing="rebuild")
    with pytest.warns(UserWarning, match="Its clock is not known and stays at 0 units: set clock.units"):
        rebuilding.accelerator.load_state(str(tmp_path))
    assert rebuilding.average.equals(saved.inner)


@pytest.mark.parametrize("lost", ["ema", "ema/ema_state.json", "ema/model.safetensors"])
def test_a_lost_average_is_rebuilt_from_the_student_on_request(tmp_path: Path, lost: str) -> None:
    saved = Loop()
    saved.train(0, 2)
    saved.accelerator.save_state(str(tmp_path))
    path = tmp_path / lost
    shutil.rmtree(path) if path.is_dir() else path.write_bytes(path.read_bytes()[:-9])
    loop = Loop(seed=1, missing="rebuild")
    loop.clock.units = 30.0
    known = lost == "ema/model.safetensors"
    clock = "" if known else "Its clock is not known and stays at 30 units: set clock.units."
    with pytest.warns(UserWarning, match=f"rebuilt from the student's weights in {tmp_path}.*{clock}"):
        loop.accelerator.load_state(str(tmp_path))
    assert tiny.same_bits(loop.bits()[1], saved.bits()[1])
    assert loop.average.equals(loop.inner) and loop.average.num_updates == 0
    assert loop.clock.units == (12.0 if known else 30.0)
    loop.train(2, 3)  # and it moves from there
    start, end = saved.bits()[1]["0.weight"].double(), loop.students[-1]["0.weight"]
    expected = RHO**2 * start + (1 - RHO**2) * end
    assert (loop.average.tensors()["0.weight"] - expected).abs().max() < 1e-6
    with pytest.raises(AverageStateError, match="Set on_missing_average='rebuild' if the average was there"):
        Loop(seed=1).accelerator.load_state(str(tmp_path))


def test_a_sound_average_is_not_rebuilt_and_other_answers_are_refused(tmp_path: Path) -> None:
    saved = Loop()
    saved.train(0, 2)
    saved.accelerator.save_state(str(tmp_path))
    loop = Loop(seed=1, missing="rebuild")
    loop.accelerator.load_state(str(tmp_path))
    assert tiny.same_bits(loop.bits(), saved.bits()) and loop.average.num_updates == 2
    with pytest.raises(ValueError, match="must be 'raise' or 'rebuild', got 'ignore'"):
        Loop(missing="ignore")


def test_where_accelerate_loads_the_model_itself_the_distance_decides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As under FSDP and DeepSpeed: hooks get no weights and no models."""
    loop = Loop()
    (save,), (load,) = (
        list(hooks.values())
        for hooks in (loop.accelerator._save_model_state_pre_hook, loop.accelerator._load_model_state_pre_hook)
    )
    monkeypatch.setattr(type(loop.accelerator), "distributed_type", DistributedType.FSDP)
    loop.train(0, 2)
    save(loop.accelerator._models, [], str(tmp_path))
    average, student = loop.bits()
    loop.average.update(loop.model, RHO)
    load([], str(tmp_path))
    assert tiny.same_bits(loop.bits(), [average, student])
    loop.train(2, 3)
    with pytest.raises(AverageStateError, match=r"are of two steps: their distance was [0-9.e-]+ when"):
        load([], str(tmp_path))


def test_several_averages_keep_apart_and_one_can_be_removed(tmp_path: Path) -> None:
    loop = Loop(name="slow")
    with pytest.raises(ValueError, match="'ema-slow'"):
        register_average(loop.accelerator, loop.model, loop.average, loop.clock, name="slow")
    with pytest.raises(ValueError, match="name must be"):
        register_average(loop.accelerator, loop.model, loop.average, loop.clock, name="../x")
    fast, clock = WeightAverage(loop.model), ReferenceClock(1)
    other = register_average(loop.accelerator, loop.model, fast, clock)
    loop.train(0, 2)
    fast.update(loop.model, 0.5)
    loop.accelerator.save_state(str(tmp_path / "both"))
    slow, quick = loop.average.fingerprint(), fast.fingerprint()
    assert slow != quick
    loop.train(2, 3)
    fast.update(loop.model, 0.5)
    loop.accelerator.load_state(str(tmp_path / "both"))
    assert (loop.average.fingerprint(), fast.fingerprint()) == (slow, quick)
    assert (loop.average.num_updates, fast.num_updates, loop.clock.units, clock.units) == (2, 1, 12.0, 0.0)

    other.remove()
    loop.accelerator.save_state(str(tmp_path / "one"))
    assert [path.name for path in (tmp_path / "one").glob("ema*")] == ["ema-slow"]
    register_average(loop.accelerator, loop.model, fast, clock)


def test_a_teacher_stays_valid_over_a_resume(tmp_path: Path) -> None:
    loop = Loop()
    loop.train(0, 2)
    loop.accelerator.save_state(str(tmp_path))
    teacher = EMATeacher(
        loop.model, loop.average, factory=lambda: nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    )
    rows = torch.randn(5, 4)
    answer = teacher(rows)
    loop.train(2, 4)
    assert not torch.equal(teacher(rows), answer)
    loop.accelerator.load_state(str(tmp_path))
    assert torch.equal(teacher(rows), answer)
