"""Seeds for random numbers that belong to an item of the stream, not to a batch."""

from __future__ import annotations

_MASK = 2**64 - 1


def spread_seed(seed: int) -> int:
    """A seed in [0, 2 ** 63) whose low bits depend on all bits of `seed`.

    PyTorch's CPU generator looks at the low 32 bits of a seed only, so seeds of the form `run * 2 ** 40 + position`
    would be the same for every run. This is the finaliser of SplitMix64, a bijection of 64 bits but for the last
    shift (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014).
    """
    z = (seed + 0x9E3779B97F4A7C15) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return (z ^ (z >> 31)) & (2**63 - 1)
