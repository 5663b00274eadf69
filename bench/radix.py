"""How long the prefix cache takes: `python bench/radix.py`. Prints; asserts nothing."""

# ruff: noqa: T201 - printing is all a benchmark is for

from __future__ import annotations

import random
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from time import perf_counter

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from cache.allocation import Allocation
from cache.kv_cache import KVCache

PAGE_SIZE_TOKENS = 16
PROMPT_TOKENS = 8_000
VOCABULARY = 150_000


def median_us(action: Callable[[], object], runs: int = 300) -> float:
    times_s = []
    for _ in range(runs):
        start_s = perf_counter()
        action()
        times_s.append(perf_counter() - start_s)
    return statistics.median(times_s) * 1e6


def random_tokens(num_tokens: int, rng: random.Random) -> list[int]:
    return [rng.randrange(VOCABULARY) for _ in range(num_tokens)]


def enter(cache: KVCache, tokens: list[int]) -> None:
    """Leave a prompt's whole pages in the cache."""
    allocation = cache.admit(tokens)
    assert allocation is not None
    cache.free(allocation, tokens, len(tokens))


def bench_prompt(rng: random.Random) -> None:
    cache = KVCache(num_pages=4_000, page_size=PAGE_SIZE_TOKENS)
    prompt = random_tokens(PROMPT_TOKENS, rng)
    enter(cache, prompt)
    # Equal tokens, other int objects: as they come off the wire.
    again = [int(str(token)) for token in prompt]
    print(f"match, {PROMPT_TOKENS} tokens cached   {median_us(lambda: cache.match(again)):9.1f} us")
    admit_us, free_us, step_us = [], [], []
    for _ in range(300):
        start_s = perf_counter()
        allocation = cache.admit(again)
        admit_us.append((perf_counter() - start_s) * 1e6)
        assert allocation is not None
        start_s = perf_counter()
        cache.commit(allocation, again, PROMPT_TOKENS - 1)
        step_us.append((perf_counter() - start_s) * 1e6)
        start_s = perf_counter()
        cache.free(allocation, again, PROMPT_TOKENS - 1)
        free_us.append((perf_counter() - start_s) * 1e6)
    print(f"admit                       {statistics.median(admit_us):9.1f} us")
    print(f"commit, no page filled      {statistics.median(step_us):9.1f} us")
    print(f"free                        {statistics.median(free_us):9.1f} us")


def bench_many_children(rng: random.Random) -> None:
    cache = KVCache(num_pages=20_000, page_size=PAGE_SIZE_TOKENS)
    for _ in range(10_000):
        enter(cache, random_tokens(PAGE_SIZE_TOKENS, rng))
    probe = random_tokens(PAGE_SIZE_TOKENS * 2, rng)
    print(f"match among 10,000 children {median_us(lambda: cache.match(probe)):9.1f} us")


def bench_evict(rng: random.Random) -> None:
    num_pages = 10_000
    cache = KVCache(num_pages, PAGE_SIZE_TOKENS)
    for _ in range(num_pages // 100):
        enter(cache, random_tokens(100 * PAGE_SIZE_TOKENS, rng))
    taken: list[Allocation | None] = []
    start_s = perf_counter()
    taken.append(cache.admit([0] * (num_pages * PAGE_SIZE_TOKENS)))
    duration_s = perf_counter() - start_s
    print(f"evicting {num_pages} pages       {duration_s * 1e6:9.1f} us, all in one admit")


def main() -> None:
    rng = random.Random(0)
    bench_prompt(rng)
    bench_many_children(rng)
    bench_evict(rng)


if __name__ == "__main__":
    main()
