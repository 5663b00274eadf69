"""When requests are due in an open loop: endless, ascending offsets in seconds. Pure and seeded."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

Process = Callable[[float, int, int], Iterator[float]]


def constant(rate_per_s: float, seed: int, burst: int) -> Iterator[float]:
    """Yield evenly spaced moments."""
    del seed, burst
    number = 0
    while True:
        yield number / rate_per_s
        number += 1


def poisson(rate_per_s: float, seed: int, burst: int) -> Iterator[float]:
    """Yield the moments of callers that do not know of each other."""
    del burst
    yield from bursts(rate_per_s, seed, 1)


def bursts(rate_per_s: float, seed: int, burst: int) -> Iterator[float]:
    """Yield `burst` at one moment, at Poisson's moments; `rate_per_s` is kept in the long run."""
    chance = random.Random(seed)  # noqa: S311 - a workload is not a secret
    moment_s = 0.0
    while True:
        moment_s += chance.expovariate(rate_per_s / burst)
        for _ in range(burst):
            yield moment_s


PROCESSES: dict[str, Process] = {"poisson": poisson, "constant": constant, "burst": bursts}
