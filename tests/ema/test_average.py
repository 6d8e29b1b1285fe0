from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForMaskedLM

from hf_ema_scaling.ema import WeightAverage, canonical_name

MOMENTA = [0.9, 0.99, 0.995, 0.999, 0.9995, 0.9999]


class Scalar(nn.Module):
    def __init__(self, value: float, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([value], dtype=dtype))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(4, 3)
        self.head = nn.Linear(3, 4, bias=False)
        self.head.weight = self.embed.weight


class Wrapper(nn.Module):
    def __init__(self, model: nn.Module, name: str) -> None:
        super().__init__()
        self.add_module(name, model)


class Net(nn.Module):
    """Linear layer, BatchNorm, an integer buffer and two non-persistent buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 4)
        self.norm = nn.BatchNorm1d(4)
        self.register_buffer("ids", torch.arange(7))
        self.register_buffer("mask", torch.tensor([True, False]))
        self.register_buffer("table", torch.randn(5), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.linear(x))


def set_(tensor: Tensor, value: float | Tensor) -> None:
    with torch.no_grad():
        tensor.copy_(torch.as_tensor(value))


def shake_(model: nn.Module) -> None:
    """An arbitrary training step: every floating tensor gets noise, every integer counter goes up."""
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point():
                tensor.add_(torch.randn_like(tensor))
            elif tensor.dtype == torch.int64:
                tensor.add_(1)


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {n: t.detach().clone() for n, t in (*model.named_parameters(), *model.named_buffers())}


def assert_same_bits(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype
        assert torch.equal(a[name].reshape(-1).view(torch.uint8), b[name].reshape(-1).view(torch.uint8)), name


def value(average: WeightAverage, name: str = "w") -> float:
    return average.tensors()[name].item()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("module.a.weight", "a.weight"),
        ("_orig_mod.module.a.weight", "a.weight"),
        ("a._fsdp_wrapped_module.b._orig_mod.bias", "a.b.bias"),
        ("submodule.modules.weight", "submodule.modules.weight"),
    ],
)
def test_canonical_name(name: str, expected: str) -> None:
    assert canonical_name(name) == expected


def test_keras_sequence() -> None:
    model = Scalar(2.0)  # 3 after one step of learning rate 1 and gradient 1; the first update copies
    average = WeightAverage(model)
    values = [value(average)]
    for weight in (1.0, 0.0):
        set_(model.w, weight)
        average.update(model, 0.9)
        values.append(value(average))
    assert values == pytest.approx([2.0, 1.9, 1.71], rel=1e-6)


def test_ignite_sequence() -> None:
    model = Scalar(1.0)
    average, sparse, corrected = (WeightAverage(model) for _ in range(3))
    for step in range(1, 5):
        set_(model.w, 1.0 + step)
        average.update(model, 0.5)
        if step % 2 == 0:
            sparse.update(model, 0.5)
            corrected.update(model, 0.5, kappa=2)
    assert (value(average), value(sparse), value(corrected)) == (4.0625, 3.5, 4.375)
    assert (average.num_updates, sparse.num_updates) == (4, 2)


def test_tied_weight_moves_once() -> None:
    model = Tied()
    set_(model.embed.weight, torch.zeros(4, 3))
    average = WeightAverage(model)
    set_(model.embed.weight, torch.ones(4, 3))
    average.update(model, 0.9)
    assert list(average.tensors()) == ["embed.weight"]
    torch.testing.assert_close(average.tensors()["embed.weight"], torch.full((4, 3), 0.1), rtol=1e-6, atol=0)
    state = average.state_dict(model)
    assert list(state) == ["embed.weight", "head.weight"]
    assert state["head.weight"].data_ptr() == state["embed.weight"].data_ptr()
    assert average.resolve("module.head.weight") == "embed.weight"
    model.head.weight = nn.Parameter(torch.ones(4, 3))
    with pytest.raises(ValueError, match="Tied weights changed"):
        average.update(model, 0.9)


@pytest.mark.parametrize("momentum", MOMENTA)
def test_integer_buffers_are_bit_exact(momentum: float) -> None:
    config = BertConfig(
        vocab_size=9, hidden_size=4, num_hidden_layers=1, num_attention_heads=1, intermediate_size=4,
        max_position_embeddings=512,
    )  # fmt: skip
    bert, norm = BertForMaskedLM(config), nn.BatchNorm1d(2)
    averages = WeightAverage(bert), WeightAverage(norm)
    for _ in range(3):
        norm(torch.randn(4, 2))
        averages[0].update(bert, momentum)
        averages[1].update(norm, momentum)
    with averages[0].swapped(bert):
        assert torch.equal(bert.bert.embeddings.position_ids[0], torch.arange(512))
    shadow = averages[0]._shadow["bert.embeddings.position_ids"]
    assert shadow.dtype == torch.int64 and torch.equal(shadow[0], torch.arange(512))
    assert averages[1].tensors()["num_batches_tracked"].item() == 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_model_does_not_freeze_the_average(dtype: torch.dtype) -> None:
    model = Scalar(1.0, dtype)
    average = WeightAverage(model)
    set_(model.w, 1.1)
    target = model.w.item()
    for _ in range(20_000):
        average.blend(model, 1e-4)
    assert average.tensors()["w"].dtype == torch.float32
    assert abs(value(average) - (target + (1.0 - target) * 0.9999**20_000)) < 1e-4


def test_float64_stays_float64() -> None:
    model = Scalar(1.0, torch.float64)
    average = WeightAverage(model)
    set_(model.w, 2.0)
    average.update(model, 0.9999)
    assert average.tensors()["w"].dtype == torch.float64
    assert value(average) == pytest.approx(1.0001, rel=1e-15)


@pytest.mark.parametrize("kappas", [[1.0] * 4, [0.3, 1.2, 2.5], [4.0]])
@pytest.mark.parametrize("momentum", [0.9, 0.999, 0.9999])
def test_kappa_partitions_agree(momentum: float, kappas: list[float]) -> None:
    model = Scalar(0.0)
    average = WeightAverage(model)
    set_(model.w, 1.0)
    for kappa in kappas:
        average.update(model, momentum, kappa)
    assert value(average) == pytest.approx(-math.expm1(4 * math.log(momentum)), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_random_steps_follow_the_closed_form(dtype: torch.dtype) -> None:
    model = nn.Linear(6, 5).to(dtype)
    average = WeightAverage(model)
    expected = {name: tensor.double() for name, tensor in snapshot(model).items()}
    for _ in range(50):
        shake_(model)
        average.update(model, 0.97)
        expected = {name: 0.97 * expected[name] + 0.03 * t.double() for name, t in snapshot(model).items()}
    for name, tensor in average.tensors().items():
        torch.testing.assert_close(tensor.double(), expected[name], rtol=0, atol=2e-6)


def test_momentum_zero_and_one() -> None:
    model = Net()
    average = WeightAverage(model)
    start = {name: tensor.clone() for name, tensor in average.tensors().items()}
    shake_(model)
    average.update(model, 1.0)
    moved = {name for name, tensor in average.tensors().items() if not torch.equal(tensor, start[name])}
    assert moved == {"norm.num_batches_tracked", "ids"}  # counters are copied, never averaged
    average.update(model, 0.0)
    assert average.equals(model) and average.distance(model) == 0.0
    assert_same_bits(average.tensors(), {k: v for k, v in snapshot(model).items() if k != "table"})


@pytest.mark.parametrize(("policy", "expected"), [("average", 0.1), ("copy", 1.0)])
def test_buffer_policy(policy: str, expected: float) -> None:
    model = Net()
    average = WeightAverage(model, buffers=policy)  # type: ignore[arg-type]
    set_(model.norm.running_mean, torch.ones(4))
    set_(model.table, torch.full((5,), 0.3))
    average.update(model, 0.9)
    assert average.tensors()["norm.running_mean"].tolist() == pytest.approx([expected] * 4)
    assert "table" not in average.tensors()
    assert torch.equal(average._shadow["table"], model.table)  # not persistent: always the student's bits
    with pytest.raises(ValueError, match="'ema'"):
        WeightAverage(model, buffers="ema")  # type: ignore[arg-type]


def test_frozen_parameters_are_copied() -> None:
    model = Net()
    average = WeightAverage(model)
    model.linear.bias.requires_grad_(False)  # frozen after construction: what counts is the moment of the update
    old = model.linear.weight.detach().clone()
    shake_(model)
    average.update(model, 0.9)
    assert torch.equal(average.tensors()["linear.bias"], model.linear.bias)
    torch.testing.assert_close(average.tensors()["linear.weight"], 0.9 * old + 0.1 * model.linear.weight.detach())
    model.linear.bias.requires_grad_(True)
    set_(model.linear.bias, model.linear.bias.detach() + 1)
    average.update(model, 0.9)
    torch.testing.assert_close(average.tensors()["linear.bias"], model.linear.bias.detach() - 0.9)


def test_a_model_that_is_cast_while_swapped_says_so() -> None:
    model = nn.Linear(2, 2)
    average = WeightAverage(model)
    with pytest.raises(RuntimeError, match=r"'weight' was torch.float32 and is torch.bfloat16.* bf16_full_eval"):
        with average.swapped(model):
            model.to(torch.bfloat16)
    average.update(model, 0.9)  # it is not taken for swapped any more


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_swap_restores_bits_also_on_exception(dtype: torch.dtype) -> None:
    model = Net().to(dtype)
    average = WeightAverage(model)
    shake_(model)
    average.update(model, 0.9)
    shake_(model)
    before, objects = snapshot(model), [id(p) for p in model.parameters()]
    with pytest.raises(KeyError), average.swapped(model):
        for name, tensor in average.tensors().items():
            held = dict([*model.named_parameters(), *model.named_buffers()])[name]
            assert held.dtype == before[name].dtype and torch.equal(held, tensor.to(held.dtype))
        model(torch.randn(8, 3, dtype=dtype))  # moves the running statistics of the average
        raise KeyError
    assert_same_bits(snapshot(model), before)
    assert [id(p) for p in model.parameters()] == objects
    with average.swapped(model):
        pass
    assert_same_bits(snapshot(model), before)


def test_what_a_swap_refuses() -> None:
    model = Net()
    average, other = WeightAverage(model), WeightAverage(model)
    shake_(model)
    before = {name: tensor.clone() for name, tensor in average.tensors().items()}
    with average.swapped(model):
        for action in (
            lambda: average.swapped(model).__enter__(),
            lambda: other.swapped(Wrapper(model, "module")).__enter__(),
            lambda: average.update(model, 0.9),
            lambda: other.update(model, 0.9),
            lambda: average.copy_to(model),
            lambda: average.distance(model),
            lambda: WeightAverage(model),
        ):
            with pytest.raises(RuntimeError, match="swapped-in"):
                action()
    assert_same_bits(average.tensors(), before)
    average.update(model, 0.9)
    assert average.num_updates == 1


class Encoder(nn.Module):
    """A part that is averaged on its own, tied to another part of the whole."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head, self.frozen = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3)
        self.frozen.requires_grad_(False)
        self.head.bias = self.inner.bias


@pytest.mark.parametrize("swapped", ["", "inner"])
def test_a_part_of_what_is_swapped_is_refused_and_so_is_what_has_a_part_that_is(swapped: str) -> None:
    model = Encoder()
    averages = {name: WeightAverage(model.get_submodule(name)) for name in ("", "inner", "head", "frozen")}
    shake_(model)
    held = model.get_submodule(swapped)
    before = {name: [t.clone() for t in average.tensors().values()] for name, average in averages.items()}
    with averages[swapped].swapped(held):
        for name in ("", "inner", "head"):  # the last has the bias of the one that is swapped
            part, average = model.get_submodule(name), averages[name]
            for action in (
                lambda part=part, average=average: average.update(part, 0.9),
                lambda part=part, average=average: average.lead(part, -0.1),
                lambda part=part, average=average: average.swapped(Wrapper(part, "module")).__enter__(),
                lambda part=part, average=average: average.copy_to(part),
                lambda part=part, average=average: average.distance(part),
                lambda part=part: WeightAverage(part),
            ):
                with pytest.raises(RuntimeError, match="swapped-in weights"):
                    action()
        averages["frozen"].update(model.frozen, 0.9)  # of which nothing was swapped
        other = Encoder()
        WeightAverage(other).update(other, 0.9)
    for name, tensors in before.items():
        assert all(torch.equal(a, b) for a, b in zip(tensors, averages[name].tensors().values(), strict=True))
    with averages["inner"].swapped(model.inner), averages["frozen"].swapped(model.frozen):
        with pytest.raises(RuntimeError, match=r"update the average from this model now.* in 'inner'; leave"):
            averages[""].update(model, 0.9)
    for name, average in averages.items():
        average.update(model.get_submodule(name), 0.0)
        assert average.equals(model.get_submodule(name))


def test_copy_to_is_permanent_and_casts() -> None:
    model = Scalar(0.0)
    average = WeightAverage(model)
    set_(model.w, 1.0)
    average.update(model, 0.9)
    fresh = Scalar(5.0, torch.bfloat16)
    average.copy_to(fresh)
    assert torch.equal(fresh.w, torch.tensor([0.1]).bfloat16())
    assert average.same_parameters(model) and not average.same_parameters(fresh)


def test_names_decide_and_not_order() -> None:
    model = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
    average = WeightAverage(model)
    reordered = nn.ModuleDict({"b": nn.Linear(2, 2), "a": nn.Linear(2, 2)})
    reordered.load_state_dict({name: tensor + 1 for name, tensor in model.state_dict().items()})
    average.update(reordered, 0.9)
    for name, tensor in average.tensors().items():
        torch.testing.assert_close(tensor, model.state_dict()[name] + 0.1)
    larger = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2), "c": nn.Linear(2, 2)})
    with pytest.raises(ValueError, match=r"unexpected: c\.bias, c\.weight"):
        average.update(larger, 0.9)
    with pytest.raises(ValueError, match=r"Missing in ModuleDict: b\.bias, b\.weight"):
        average.update(nn.ModuleDict({"a": nn.Linear(2, 2)}), 0.9)
    with pytest.raises(ValueError, match=r"'b\.weight' has shape \(2, 3\), the average has \(2, 2\)"):
        average.update(nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(3, 2)}), 0.9)
    model["a"].register_parameter("extra", nn.Parameter(torch.zeros(1)))  # on a model it is already bound to
    with pytest.raises(ValueError, match=r"unexpected: a\.extra"):
        average.update(model, 0.9)
    with pytest.raises(ValueError, match="and 4 more"):
        average.update(nn.ModuleDict({str(i): nn.Linear(1, 1, bias=False) for i in range(9)}), 0.9)
    assert average.num_updates == 1


@pytest.mark.parametrize("names", [["module"], ["_orig_mod"], ["module", "_orig_mod"], ["_fsdp_wrapped_module"]])
def test_wrappers_are_seen_through(names: list[str]) -> None:
    model = Net()
    wrapped: nn.Module = model
    for name in names:
        wrapped = Wrapper(wrapped, name)
    average = WeightAverage(wrapped)
    assert list(average.tensors()) == list(WeightAverage(model).tensors())
    set_(model.linear.bias, average.tensors()["linear.bias"] + 1)
    average.update(wrapped, 0.9)
    average.update(model, 0.9)
    torch.testing.assert_close(average.tensors()["linear.bias"], model.linear.bias.detach() - 0.81)
    assert list(average.state_dict(wrapped)) == list(model.state_dict())
    assert average.same_parameters(wrapped) and average.same_parameters(model)


def test_compiled_model() -> None:
    model = Scalar(0.0)
    compiled = torch.compile(model)
    average = WeightAverage(compiled)
    set_(model.w, 1.0)
    average.update(compiled, 0.9)
    assert value(average) == pytest.approx(0.1)
    with average.swapped(compiled):
        assert model.w.item() == pytest.approx(0.1)


def test_two_names_that_collide_are_refused() -> None:
    model = nn.ModuleDict({"module": nn.Linear(1, 1), "x": nn.Linear(1, 1)})
    model["x"].add_module("module", nn.Linear(1, 1))
    with pytest.raises(ValueError, match=r"share the name 'x\.weight'"):
        WeightAverage(model)


def test_replaced_parameters_and_casts_are_noticed() -> None:
    model = Scalar(0.0)
    average = WeightAverage(model)
    average.update(model, 0.9)
    model.w.data = torch.tensor([1.0])
    average.update(model, 0.9)
    assert value(average) == pytest.approx(0.1) and average.same_parameters(model)
    model.to(torch.bfloat16)
    average.update(model, 0.9)
    assert value(average) == pytest.approx(0.19)
    model.w = nn.Parameter(torch.tensor([2.0]))
    assert not average.same_parameters(model)
    average.update(model, 0.9)
    assert value(average) == pytest.approx(0.9 * 0.19 + 0.2) and average.same_parameters(model)
    assert average.storage_version == 0  # a teacher that shares the storage need not be told


def test_non_persistent_buffers_may_come_and_grow() -> None:
    model = Net()
    average = WeightAverage(model)
    model.table = torch.randn(9)
    average.update(model, 0.9)
    assert torch.equal(average._shadow["table"], model.table) and average.storage_version == 1
    model.register_buffer("late", torch.ones(2), persistent=False)
    average.update(model, 0.9)
    assert torch.equal(average._shadow["late"], torch.ones(2)) and average.storage_version == 2


def test_load_is_strict_and_exact() -> None:
    model = Net()
    average = WeightAverage(model)
    shake_(model)
    average.update(model, 0.7)
    saved = {name: tensor.clone() for name, tensor in average.tensors().items()}
    fresh = WeightAverage(Net())
    pointers = {name: tensor.data_ptr() for name, tensor in fresh.tensors().items()}
    before = {name: tensor.clone() for name, tensor in fresh.tensors().items()}
    for wrong, message in (
        ({k: v for k, v in saved.items() if k != "ids"}, "Missing in saved average: ids"),
        ({**saved, "other": torch.ones(1)}, "unexpected: other"),
        ({**saved, "linear.bias": torch.ones(5)}, r"\(5,\)"),
        ({**saved, "linear.bias": torch.ones(4, dtype=torch.bfloat16)}, "bfloat16"),
    ):
        with pytest.raises(ValueError, match=message):
            fresh.load(wrong)
        assert_same_bits(fresh.tensors(), before)
    fresh.load({f"module.{name}": tensor for name, tensor in saved.items()})
    assert_same_bits(fresh.tensors(), saved)
    assert {name: tensor.data_ptr() for name, tensor in fresh.tensors().items()} == pointers


def test_distance_and_fingerprint() -> None:
    model = nn.Linear(2, 1)
    set_(model.weight, torch.tensor([[3.0, 0.0]]))
    set_(model.bias, torch.tensor([4.0]))
    average = WeightAverage(model)
    first = average.fingerprint()
    assert average.distance(model) == 0.0 and average.equals(model)
    set_(model.bias, torch.tensor([0.0]))
    assert average.distance(model) == pytest.approx(4 / 3)
    assert average.fingerprint() == first and not average.equals(model)
    set_(average.tensors()["bias"], math.nextafter(4.0, 5.0) + 5e-7)  # the next float32
    changed = [a - b for a, b in zip(average.fingerprint(), first, strict=True)]
    assert changed == [0, 1]


def test_model_without_parameters_is_refused() -> None:
    with pytest.raises(ValueError, match="no parameters"):
        WeightAverage(nn.ReLU())
