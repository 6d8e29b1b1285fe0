from __future__ import annotations

import numpy as np
import pytest
import torch
from operations import Operations
from torch import nn

from hf_ema_scaling import WeightAverage
from hf_ema_scaling.ema import kernels


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weight_zero_and_one_are_exact(dtype: torch.dtype) -> None:
    start = torch.tensor([-0.0, 0.0, 1e-45, float("inf"), 3.0])
    shadow = start.clone()
    source = torch.tensor([1.0, -0.0, -65504.0, 2.0, float("nan")]).to(dtype)
    kernels.Pairs([shadow], [source]).lerp_(0.0)
    assert torch.equal(shadow.view(torch.int32), start.view(torch.int32))
    kernels.Pairs([shadow], [source]).lerp_(1.0)
    assert torch.equal(shadow.view(torch.int32), source.float().view(torch.int32))


@pytest.mark.parametrize("weight", [1e-4, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("source_dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_pair_of_dtypes_agrees_with_float64(
    dtype: torch.dtype, source_dtype: torch.dtype, weight: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Small tensors share a scratch, the last rounds are partly filled, large tensors pass in several pieces.
    monkeypatch.setitem(kernels.SCRATCH_ELEMENTS, "cpu", 40)
    whole = torch.randn(4, 30, 6)
    sources = [
        torch.randn(5, 3),
        torch.randn(()),
        torch.randn(0, 7),
        torch.randn(401),
        torch.randn(3, 8, 4, 4).contiguous(memory_format=torch.channels_last),
        torch.randn(2, 3, 2, 2).contiguous(memory_format=torch.channels_last),
        torch.randn(9, 11).T,
        whole[:, ::2, 1:5],  # neither dense nor small
        whole[::2, :3, 2],  # not dense, but small
        torch.randn(7, 1).expand(7, 9),
        torch.randn(40),
    ]
    sources = [source.to(source_dtype) for source in sources]
    sources[7], sources[8] = (whole.to(source_dtype)[part] for part in (np.s_[:, ::2, 1:5], np.s_[::2, :3, 2]))
    shadows = [torch.randn(source.shape, dtype=dtype) for source in sources]
    shadows[4] = shadows[4].contiguous(memory_format=torch.channels_last)
    expected = [s.double() + weight * (p.double() - s.double()) for s, p in zip(shadows, sources, strict=True)]
    kernels.Pairs(shadows, sources).lerp_(weight)
    for shadow, value in zip(shadows, expected, strict=True):
        assert shadow.dtype == dtype
        torch.testing.assert_close(shadow.double(), value, rtol=0, atol=5e-7 if dtype == torch.float32 else 1e-14)


def test_a_mixed_update_is_the_update_of_the_cast_bit_for_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(kernels.SCRATCH_ELEMENTS, "cpu", 64)
    sources = [torch.randn(n).bfloat16() for n in (3, 200, 64, 65, 1)]
    shadows = [torch.randn(p.shape) for p in sources]
    plain = [s.clone() for s in shadows]
    pairs, cast = kernels.Pairs(shadows, sources), kernels.Pairs(plain, [p.float() for p in sources])
    for _ in range(3):
        pairs.lerp_(0.01)
        cast.lerp_(0.01)
    assert all(torch.equal(s, p) for s, p in zip(shadows, plain, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_other_storage_behind_a_source_is_seen(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(kernels.SCRATCH_ELEMENTS, "cpu", 16)
    model = nn.ParameterList([torch.zeros(5, dtype=dtype), torch.zeros(50, dtype=dtype)])
    average = WeightAverage(model)
    average.update(model, 0.5)
    for source, expected in zip(model, ([0.5, 0.0], [0.75, 0.5]), strict=True):
        source.data = torch.ones_like(source)
        average.update(model, 0.5)
        found = [shadow.unique().tolist() for shadow in average.tensors().values()]
        assert found == [[value] for value in expected]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shadow_dtype", [torch.float32, torch.float64])
def test_an_update_allocates_nothing_and_waits_for_nothing(
    dtype: torch.dtype, shadow_dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(kernels.SCRATCH_ELEMENTS, "cpu", 256)
    sources = [torch.randn(n).to(dtype) for n in (5, 1000, 256, 30)]
    pairs = kernels.Pairs([torch.randn(p.shape, dtype=shadow_dtype) for p in sources], sources)
    with Operations() as first:
        pairs.lerp_(0.1)
    # The one scratch, and only where there is something to cast.
    assert first.allocated == ([] if dtype == shadow_dtype else [256 * shadow_dtype.itemsize])
    with Operations() as later:
        pairs.lerp_(0.1)
        pairs.copy_()
        pairs.copy_changed_()
    assert later.allocated == [] and later.synchronising == []
    assert 0 < len(later.names) <= (4 if dtype == shadow_dtype else 2 * 7 + 2)


def test_the_watch_sees_temporaries_and_synchronisations() -> None:
    x, y = torch.randn(100), torch.randn(100)
    for mutant, allocated, synchronising in (
        (lambda: x.lerp_(y.double().float(), 0.5), [800, 400], 0),
        (lambda: x.mul_(0.5).add_(y * 0.5), [400], 0),
        (lambda: x.mul_(1 - y[0].item()), [], 1),
        (lambda: float(x.sum()), [4], 1),
        (lambda: torch._foreach_add_([x], torch._foreach_mul([y], 0.5)), [400], 0),
    ):
        with Operations() as seen:
            mutant()
        assert (seen.allocated, len(seen.synchronising)) == (allocated, synchronising)


def test_copies_are_made_only_of_what_was_written_to() -> None:
    shadow, source = torch.zeros(3), torch.ones(3)
    pairs = kernels.Pairs([shadow], [source])
    for change in (
        lambda: None,
        lambda: source.add_(1.0),
        lambda: shadow.zero_(),
        lambda: source[1:].mul_(2.0),
        lambda: setattr(source, "data", torch.full((3,), 7.0)),
    ):
        change()
        pairs.copy_changed_()
        assert torch.equal(shadow, source)
        with Operations() as seen:
            pairs.copy_changed_()
        assert seen.names == []


def test_bad_arguments() -> None:
    one = [torch.zeros(1)]
    for weight in (-1e-9, 1.0000001, float("nan")):
        with pytest.raises(ValueError, match="between 0 and 1"):
            kernels.Pairs(one, one).lerp_(weight)
    for weight in (1.5, float("-inf")):
        with pytest.raises(ValueError, match="between 0 and 1"):
            kernels.Pairs(one, one).lerp_(weight, away=True)
    with pytest.raises(ValueError, match="1 shadow tensors for 0"):
        kernels.Pairs(one, [])
    kernels.Pairs([], []).lerp_(0.5)
    kernels.Pairs([], []).copy_()


def test_relative_distance_and_bit_sums() -> None:
    shadow, source = [torch.zeros(1), torch.zeros(2)], [torch.full((1,), 3.0), torch.tensor([0.0, 4.0])]
    assert kernels.relative_distance(shadow, source) == 1.0
    assert kernels.relative_distance([source[0], torch.tensor([3.0, 4.0])], source) == pytest.approx(3 / 5)
    assert kernels.relative_distance(shadow, shadow) == 0.0
    assert kernels.relative_distance(source, shadow) == float("inf")
    # 1.0 has the bit pattern 0x3f800000 in float32 and 0x3ff0... in float64.
    assert kernels.bit_sums([torch.ones(2), torch.ones((), dtype=torch.float64)]) == (2 * 0x3F800000, 0x3FF << 52)
