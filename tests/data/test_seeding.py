"""Seeds whose low bits say everything."""

from __future__ import annotations

import torch

from hf_ema_scaling.data.seeding import spread_seed


def test_splitmix64() -> None:
    """The first outputs of the published generator from state 1234567, whose state grows by the golden ratio."""
    states = [(1234567 + i * 0x9E3779B97F4A7C15) & (2**64 - 1) for i in range(3)]
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert [spread_seed(state) for state in states] == [value & (2**63 - 1) for value in published]


def test_torch_ignores_high_bits_and_spread_seeds_do_not() -> None:
    def drawn(seed: int) -> float:
        return float(torch.rand(1, generator=torch.Generator().manual_seed(seed)))

    assert drawn(5) == drawn(5 + 2**40)
    assert drawn(spread_seed(5)) != drawn(spread_seed(5 + 2**40))
    low = {spread_seed(run * 2**41 + place) % 2**32 for run in range(10) for place in range(1000)}
    assert len(low) > 9_990
