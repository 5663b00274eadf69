"""The sort keys of eviction, each against an order that another one does not give."""

from __future__ import annotations

import pytest

from cache.kv_cache import KVCache
from cache.policy import CostAware, PolicyName, policy_of


def served(cache: KVCache, first: int, num_pages: int = 1) -> None:
    tokens = [first] * 2 * num_pages
    allocation = cache.admit(tokens)
    assert allocation is not None
    cache.free(allocation, tokens, len(tokens))
    cache.check()


def kept(cache: KVCache, *firsts: int) -> list[int]:
    return [first for first in firsts if cache.match([first, first, 99]).num_tokens]


@pytest.mark.parametrize(("name", "expected"), [("lru", [2, 3]), ("lfu", [1, 3]), ("cost", [1, 3])])
def test_a_page_that_was_used_often_but_not_lately(name: PolicyName, expected: list[int]) -> None:
    cache = KVCache(2, 2, policy_of(name, 2, 2))
    for first in (1, 1, 1, 1, 1, 2, 3):
        served(cache, first)
    assert kept(cache, 1, 2, 3) == expected


@pytest.mark.parametrize(("name", "expected"), [("lfu", [1]), ("cost", [])])
def test_only_without_half_lives_a_page_lives_by_its_past(
    name: PolicyName, expected: list[int]
) -> None:
    cache = KVCache(2, 2, policy_of(name, 2, 2))
    for first in (1, 1, 1, 1, *range(10, 80)):
        served(cache, first)
    assert kept(cache, 1) == expected


def test_of_pages_used_alike_the_deeper_one_costs_more() -> None:
    cache = KVCache(4, 2, CostAware(half_life_uses=100, pages_of_double_price=1))
    served(cache, 1, num_pages=3)
    served(cache, 2)
    served(cache, 3)
    # The last page of the first is older, and its attention reads three pages.
    assert cache.match([1] * 7).num_tokens == 6
    assert kept(cache, 2, 3) == [3]
