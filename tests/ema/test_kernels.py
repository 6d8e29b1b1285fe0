from __future__ import annotations

import pytest
import torch

from hf_ema_scaling.ema import kernels


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weight_zero_and_one_are_exact(dtype: torch.dtype) -> None:
    start = torch.tensor([-0.0, 0.0, 1e-45, float("inf"), 3.0])
    shadow = start.clone()
    source = torch.tensor([1.0, -0.0, -65504.0, 2.0, float("nan")]).to(dtype)
    kernels.lerp_([shadow], [source], 0.0)
    assert torch.equal(shadow.view(torch.int32), start.view(torch.int32))
    kernels.lerp_([shadow], [source], 1.0)
    assert torch.equal(shadow.view(torch.int32), source.float().view(torch.int32))


@pytest.mark.parametrize("weight", [1e-4, 0.1, 0.5, 0.9])
def test_mixed_dtypes_agree_with_float64(weight: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_SCRATCH_ELEMENTS", 40)  # several chunks, the last one partly filled
    sources = [torch.randn(5, 3).to(d) for d in (torch.bfloat16, torch.float32, torch.float16, torch.float64) * 3]
    shadows = [torch.randn(5, 3) for _ in sources]
    expected = [s.double() + weight * (p.double() - s.double()) for s, p in zip(shadows, sources, strict=True)]
    kernels.lerp_(shadows, sources, weight)
    for shadow, value in zip(shadows, expected, strict=True):
        assert shadow.dtype == torch.float32
        torch.testing.assert_close(shadow.double(), value, rtol=0, atol=5e-7)


def test_bad_arguments() -> None:
    one = [torch.zeros(1)]
    for weight in (-1e-9, 1.0000001, float("nan")):
        with pytest.raises(ValueError, match="between 0 and 1"):
            kernels.lerp_(one, one, weight)
    with pytest.raises(ValueError, match="1 shadow tensors for 0"):
        kernels.lerp_(one, [], 0.5)
    kernels.lerp_([], [], 0.5)
    kernels.copy_([], [])


def test_relative_distance_and_bit_sums() -> None:
    shadow, source = [torch.zeros(1), torch.zeros(2)], [torch.full((1,), 3.0), torch.tensor([0.0, 4.0])]
    assert kernels.relative_distance(shadow, source) == 1.0
    assert kernels.relative_distance([source[0], torch.tensor([3.0, 4.0])], source) == pytest.approx(3 / 5)
    assert kernels.relative_distance(shadow, shadow) == 0.0
    assert kernels.relative_distance(source, shadow) == float("inf")
    # 1.0 has the bit pattern 0x3f800000 in float32 and 0x3ff0... in float64.
    assert kernels.bit_sums([torch.ones(2), torch.ones((), dtype=torch.float64)]) == (2 * 0x3F800000, 0x3FF << 52)
