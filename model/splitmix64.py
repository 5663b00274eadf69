"""Random 64-bit numbers that depend on a seed and an index alone.

SplitMix64 (Steele, Lea, Flood: Fast Splittable PRNGs, OOPSLA 2014; Vigna's form).
"""

from __future__ import annotations

_UINT64 = 2**64 - 1
_GOLDEN_GAMMA = 0x9E3779B97F4A7C15


def splitmix64(seed: int, index: int) -> int:
    """Return the number at `index`, from 1 on, of the seed's stream."""
    z = (seed + index * _GOLDEN_GAMMA) & _UINT64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _UINT64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _UINT64
    return z ^ (z >> 31)
