"""Tensors without values (on `meta`), and tensors that share memory without being the same object."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor, nn
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from hf_ema_scaling.ema import EMATeacher, WeightAverage, load_average, save_average
from hf_ema_scaling.ema.names import entries_of
from hf_ema_scaling.ema.overlaps import overlapping, repeats


class Views(nn.Module):
    """Two parameters that are windows on one flat tensor, and a weight that is trained."""

    def __init__(self, first: slice, second: slice, *, trained: tuple[bool, bool] = (False, False)) -> None:
        super().__init__()
        flat = torch.arange(8.0)
        self.first = nn.Parameter(flat[first], requires_grad=trained[0])
        self.second = nn.Parameter(flat[second], requires_grad=trained[1])
        self.head = nn.Linear(2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x) + self.first.sum() + 10 * self.second.sum()


# ---- Without values


@pytest.mark.parametrize("trained", [True, False])
def test_a_part_that_was_never_materialised_is_refused_by_name(trained: bool) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)).requires_grad_(trained)
    model[1].to("meta")
    with pytest.raises(ValueError, match=r"'1\.weight' is on the meta device.*never materialised.*cpu_offload"):
        WeightAverage(model)
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    model[1].running_mean = torch.zeros(2, device="meta")
    with pytest.raises(ValueError, match=r"'1\.running_mean' is on the meta device"):
        WeightAverage(model)


def test_weights_that_accelerate_offloads_are_refused_before_and_after() -> None:
    """An average that followed them to `meta` would be lost without a word."""
    from accelerate import cpu_offload
    from accelerate.hooks import remove_hook_from_submodules

    model = tiny.bert()
    average = WeightAverage(model)
    before = {name: tensor.clone() for name, tensor in average.tensors().items()}
    cpu_offload(model, execution_device=torch.device("cpu"))
    name = r"'bert\.embeddings\.word_embeddings\.weight' is on the meta device"
    with pytest.raises(ValueError, match=name):
        WeightAverage(model)
    for use in (lambda: average.update(model, 0.9), lambda: average.copy_to(model), lambda: average.distance(model)):
        with pytest.raises(ValueError, match=name):
            use()
    with pytest.raises(ValueError, match=name), average.swapped(model):
        pass
    assert tiny.same_bits(dict(average.tensors()), before) and average.num_updates == 0
    remove_hook_from_submodules(model)


def test_adapters_are_averaged_and_saved_over_a_base_that_is_offloaded(tmp_path: Path) -> None:
    adapted = pytest.importorskip("adapted")
    model = adapted.lora_bert()
    for part in model.modules():
        for leaf, parameter in part._parameters.items():
            if parameter is not None and not parameter.requires_grad:
                part._parameters[leaf] = nn.Parameter(parameter.to("meta"), requires_grad=False)
    average = WeightAverage(model)
    adapted.shake_(model, 1.0)
    average.update(model, 0.9)
    save_average(tmp_path / "ema", model, average, state={})
    loaded = adapted.peft.PeftModel.from_pretrained(tiny.bert(), tmp_path / "ema/adapter")
    mine = adapted.trained(model)
    assert len(mine) == 6 and all(torch.equal(loaded.get_parameter(name), value) for name, value in mine.items())
    with pytest.raises(ValueError, match=r"word_embeddings\.weight' is on the meta device"):
        EMATeacher(model, average)


# ---- Shared memory


def test_overlaps_are_those_of_elements_and_not_of_spans() -> None:
    def found(first: Tensor, second: Tensor) -> bool:
        module = nn.Module()
        module.first, module.second = nn.Parameter(first), nn.Parameter(second)
        return bool(list(overlapping(entries_of(module))))

    flat, table = torch.zeros(8), torch.zeros(3, 4)
    assert found(flat[:5], flat[4:]) and found(flat, flat.view(2, 4)) and found(flat[2:3], flat)
    assert not found(flat[:4], flat[4:]) and not found(flat[:5], torch.zeros(8)[4:])
    assert not found(table[:, :2], table[:, 2:]) and found(table[:, :3], table[:, 2:])
    assert not found(flat[::2], flat[1::2]) and found(flat[::2], flat[::4])
    assert not found(flat[:0], flat)
    wrapped = TwoTensor(flat, flat)
    assert is_traceable_wrapper_subclass(wrapped) and not found(wrapped, TwoTensor(table, table))
    assert repeats(torch.zeros(1, 2).expand(3, 2)) and not repeats(torch.zeros(1, 2).expand(1, 2))


@pytest.mark.parametrize(("first", "second"), [(slice(5), slice(3, 8)), (slice(8), slice(8))])
def test_frozen_views_of_the_same_elements_are_saved_and_read(tmp_path: Path, first: slice, second: slice) -> None:
    """safetensors refuses tensors that share memory, so here the average has a copy of each."""
    model = Views(first, second)
    average = WeightAverage(model)
    assert not average.references
    with torch.no_grad():
        model.head.weight.add_(1.0)
        model.second.mul_(2.0)
    average.update(model, 0.5)
    save_average(tmp_path / "ema", model, average, state={})
    other = Views(first, second)
    restored = WeightAverage(other)
    load_average(tmp_path / "ema", other, restored)
    teacher = EMATeacher(other, restored, factory=lambda: Views(first, second))
    own = tiny.parameters(model)
    x = torch.ones(1, 2)
    with average.swapped(model):
        torch.testing.assert_close(teacher(x), model(x))
        assert torch.equal(model.first, own["first"])  # frozen: its own average
    assert tiny.same_bits(tiny.parameters(model), own)


def test_views_beside_each_other_stay_the_students_own() -> None:
    assert WeightAverage(Views(slice(4), slice(4, 8))).references == {"first", "second"}


def test_trained_views_of_the_same_elements_move_alike() -> None:
    model = Views(slice(5), slice(3, 8), trained=(True, True))
    average = WeightAverage(model)
    with torch.no_grad():
        model.first.add_(1.0)
    average.update(model, 0.9)
    expected = torch.arange(8.0)
    expected[:5] += 0.1
    torch.testing.assert_close(average.tensors()["first"], expected[:5])
    torch.testing.assert_close(average.tensors()["second"], expected[3:])
    own = tiny.parameters(model)
    with average.swapped(model):
        torch.testing.assert_close(model.second.detach(), expected[3:])
    assert tiny.same_bits(tiny.parameters(model), own)


@pytest.mark.parametrize("trained", [(True, False), (False, True)])
def test_memory_that_is_trained_and_frozen_is_refused(trained: tuple[bool, bool]) -> None:
    model = Views(slice(5), slice(3, 8), trained=trained)
    names = ("second", "first") if trained[0] else ("first", "second")
    with pytest.raises(ValueError, match=rf"'{names[0]}', which is not averaged, lies in the memory of '{names[1]}'"):
        WeightAverage(model)
    buffered: Any = nn.Linear(2, 2)
    buffered.register_buffer("copy", buffered.weight.data)
    WeightAverage(buffered)
    with pytest.raises(ValueError, match="'copy', which is not averaged, lies in the memory of 'weight'"):
        WeightAverage(buffered, buffers="copy")


def test_expanded_tensors_are_refused_by_name() -> None:
    model: Any = nn.Linear(2, 2)
    model.scale = nn.Parameter(torch.ones(1, 2).expand(3, 2))
    with pytest.raises(ValueError, match=r"'scale' is an expanded tensor.*\.contiguous\(\)"):
        WeightAverage(model)
    model.scale.requires_grad_(False)
    average = WeightAverage(model)  # nobody writes to what is frozen
    with torch.no_grad():
        model.weight.add_(1.0)
    with average.swapped(model):
        assert torch.equal(model.scale, torch.ones(3, 2))
