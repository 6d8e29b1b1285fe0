from __future__ import annotations

import copy
import multiprocessing
import pickle
import sys
from collections.abc import Iterator

import pytest
import torch
from operations import Operations
from torch import Tensor, nn

from hf_ema_scaling import WeightAverage
from hf_ema_scaling.ema import compiled, kernels

pytest.importorskip("numba")


@pytest.fixture(autouse=True)
def for_small_models_too(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(compiled, "MIN_ELEMENTS", 0)
    monkeypatch.setattr(compiled, "PIECE_ELEMENTS", 100)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def tensors(dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    shadows = [torch.randn(shape) for shape in ((), (0, 7), (1,), (3, 5), (1021,), (8, 16, 4, 4), (70, 33))]
    shadows[5] = shadows[5].contiguous(memory_format=torch.channels_last)
    shadows[6] = shadows[6].T
    shadows.append(torch.tensor([-0.0, 0.0, 1e-45, float("inf"), float("-inf"), float("nan"), 3e38, -3e38]))
    sources = [torch.randn_like(shadow).to(dtype) for shadow in shadows]
    sources[-1] = torch.tensor([0.0, -0.0, -1e-40, 1.0, float("inf"), 1.0, -3e38, float("nan")]).to(dtype)
    return shadows, sources


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("weight", [1e-7, 1e-3, 0.3, 0.4999, 0.5, 0.8, 0.99999, -0.1, -0.7])
def test_the_compiled_update_has_the_bits_of_pytorch(weight: float, threads: int, dtype: torch.dtype) -> None:
    torch.set_num_threads(threads)
    shadows, sources = tensors(dtype)
    expected = [shadow.clone() for shadow in shadows]
    torch._foreach_lerp_(expected, [source.float() for source in sources], weight)
    with Operations() as seen:
        kernels.Pairs(shadows, sources).lerp_(weight, away=True)
    assert seen.names == []
    for shadow, value in zip(shadows, expected, strict=True):
        # NaN has many bit patterns; which of them comes out is nobody's promise.
        shadow, value = shadow.nan_to_num(123.0, 456.0, -456.0), value.nan_to_num(123.0, 456.0, -456.0)
        assert torch.equal(shadow.view(torch.int32), value.view(torch.int32))


def test_what_pytorch_must_update_itself() -> None:
    def suits(shadow: Tensor, source: Tensor, dtype: torch.dtype = torch.bfloat16) -> bool:
        return compiled.suits([torch.zeros(9), shadow], [torch.zeros(9, dtype=dtype), source])

    class Other(Tensor):
        pass

    one = torch.zeros(4, 6)
    other = one.bfloat16()
    assert suits(one, other) and suits(one.T, other.T) and suits(one, nn.Parameter(other))
    assert suits(one, nn.Parameter(one), torch.float32) and not suits(one, other, torch.float32)
    assert not suits(one, one.half(), torch.float16)
    for shadow, source in (
        (one.double(), other),
        (one, one),
        (one, one.half()),
        (other, other),
        (one, torch.zeros(6, 4).bfloat16().T),
        (one, other[0]),
        (one[:, ::2], other[:, ::2]),
        (one, other[0].expand(4, 6)),
        (one, other.as_subclass(Other)),
        (one.to("meta"), other.to("meta")),
    ):
        assert not suits(shadow, source), (shadow.dtype, source.dtype, source.stride())


def test_small_models_do_not_wait_for_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "MIN_ELEMENTS", 1001)
    assert not compiled.suits([torch.zeros(1000)], [torch.ones(1000).bfloat16()])
    assert compiled.suits([torch.zeros(1001)], [torch.ones(1001).bfloat16()])


@pytest.mark.parametrize("lacking", ["numba", "compiler", "OpenMP"])
def test_without_numba_or_threads_to_run_on_pytorch_updates(lacking: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if lacking == "numba":
        monkeypatch.setitem(sys.modules, "numba", None)
    elif lacking == "compiler":
        monkeypatch.setattr(sys.modules["numba"].config, "DISABLE_JIT", 1)
    else:
        monkeypatch.setattr(compiled, "_openmp", lambda: None)
    compiled.available.cache_clear()
    try:
        shadow, source = torch.zeros(3), torch.ones(3).bfloat16()
        with Operations() as seen:
            kernels.Pairs([shadow], [source]).lerp_(0.25)
        assert seen.names[-1] == "_foreach_lerp_" and shadow.tolist() == [0.25] * 3
    finally:
        compiled.available.cache_clear()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_happens_behind_a_weight_is_seen(dtype: torch.dtype) -> None:
    model = nn.Linear(6, 6, dtype=dtype)
    average = WeightAverage(model)
    expected = {name: p.detach().float().clone() for name, p in model.named_parameters()}

    def update() -> None:
        for name, p in model.named_parameters():
            expected[name].lerp_(p.detach().float(), 0.25)
        with Operations() as seen:
            average.update(model, 0.75)
        assert "_foreach_lerp_" not in seen.names
        for name, value in average.tensors().items():
            assert torch.equal(value, expected[name]), name

    update()
    model.weight.data = torch.randn(6, 6).to(dtype)
    update()
    model.weight.data = model.weight.data.T  # of the same address, size and dtype
    with pytest.raises(AssertionError, match="_foreach_lerp_"):  # laid out otherwise: PyTorch's, and right
        update()
    model.weight.data = model.weight.data.contiguous()
    for name, value in average.tensors().items():
        expected[name].copy_(value)
    update()
    before = {name: value.clone() for name, value in average.tensors().items()}
    model.weight.data = model.weight.data[:5]  # of the same address
    with pytest.raises(ValueError, match=r"'weight' has shape \(5, 6\), the average has \(6, 6\)"):
        average.update(model, 0.75)
    assert all(torch.equal(value, before[name]) for name, value in average.tensors().items())


def test_a_weight_of_another_dtype_at_the_same_address_is_seen() -> None:
    storage = torch.randn(64)
    model = nn.Linear(8, 8, bias=False)
    model.weight.data = storage.view(8, 8)
    average = WeightAverage(model)
    average.update(model, 0.5)
    value = average.tensors()["weight"].clone()
    half = torch.randn(8, 8).bfloat16()
    storage.view(torch.bfloat16)[:64].copy_(half.view(-1))
    model.weight.data = storage.view(torch.bfloat16)[:64].view(8, 8)
    average.update(model, 0.5)
    assert torch.equal(average.tensors()["weight"], value.lerp(half.float(), 0.5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_copy_has_addresses_of_its_own(dtype: torch.dtype) -> None:
    model = nn.Linear(6, 6, dtype=dtype)
    average = WeightAverage(model)
    average.update(model, 0.5)
    for copied in (copy.deepcopy, lambda both: pickle.loads(pickle.dumps(both))):
        other_model, other = copied((model, average))
        assert other.same_parameters(other_model)
        before = [value.clone() for value in average.tensors().values()]
        expected = [value.lerp(torch.ones(()), 0.5) for value in before]
        with torch.no_grad():
            for parameter in other_model.parameters():
                parameter.fill_(1.0)
        other.update(other_model, 0.5)
        assert all(map(torch.equal, other.tensors().values(), expected))
        assert all(map(torch.equal, average.tensors().values(), before))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("whose", ["average", "teacher", "student"])
def test_tensors_that_move_into_shared_memory_are_followed(whose: str, dtype: torch.dtype) -> None:
    """As when one of them is sent to a process that was spawned: the same storage has other memory afterwards."""
    model, twin = (nn.Linear(64, 64, dtype=dtype) for _ in range(2))
    average = WeightAverage(model)
    average.update(model, 0.5)
    average.share_with(twin)
    values = average.tensors()
    expected = {name: value.lerp(torch.ones(()), 0.5) for name, value in values.items()}
    before = {name: value.data_ptr() for name, value in values.items()}
    if whose == "average":
        for value in values.values():
            value.share_memory_()
    else:
        (twin if whose == "teacher" else model).share_memory()
    assert all((values[name].data_ptr() == before[name]) == (whose == "student") for name in values)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1.0)
    average.update(model, 0.5)
    for name, value in twin.named_parameters():
        assert torch.equal(average.tensors()[name], expected[name])
        assert torch.equal(value, expected[name])


def test_pytorch_knows_of_the_writes() -> None:
    shadow, source = torch.ones(8, requires_grad=True), torch.zeros(8).bfloat16()
    pairs = kernels.Pairs([shadow], [source])
    with torch.no_grad():
        pairs.copy_changed_()
        pairs.lerp_(0.5)
        shadow += 1.0
        pairs.lerp_(0.25)
        assert shadow.tolist() == [0.75] * 8
        pairs.copy_changed_()
        assert shadow.tolist() == [0.0] * 8
    product = (shadow * shadow).sum()
    with torch.no_grad():
        pairs.lerp_(0.5)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


def _updates(shadow: Tensor, source: Tensor, threads: int) -> None:
    torch.set_num_threads(threads)
    kernels.Pairs([shadow], [source]).lerp_(0.5)


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="no fork on this system")
@pytest.mark.parametrize("threads", [1, 2])
def test_a_forked_process_needs_none_of_its_parents_threads(threads: int) -> None:
    shadow, source = torch.zeros(1000).share_memory_(), torch.ones(1000).bfloat16()
    _updates(shadow, source, 2)
    child = multiprocessing.get_context("fork").Process(target=_updates, args=(shadow, source, threads))
    child.start()
    child.join(60)
    if child.exitcode is None:
        child.kill()
    assert child.exitcode == 0
    assert shadow.tolist() == [0.75] * 1000


def test_an_average_does_not_depend_on_numba(monkeypatch: pytest.MonkeyPatch) -> None:
    def run() -> dict[str, Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(31, 17), nn.BatchNorm1d(17), nn.Linear(17, 3)).bfloat16()
        average = WeightAverage(model)
        for _ in range(50):
            with torch.no_grad():
                for tensor in (*model.parameters(), model[1].running_mean, model[1].running_var):
                    tensor.add_(torch.randn_like(tensor))
            average.update(model, 0.97, kappa=2.0)
        return average.state_dict(model)

    ours = run()
    monkeypatch.setattr(compiled, "MIN_ELEMENTS", 1 << 62)
    theirs = run()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
