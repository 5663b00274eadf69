"""Pages that come from another tier are cached pages like computed ones."""

from __future__ import annotations

import pytest

from cache.kv_cache import KVCache
from cache.node import NO_PAGE
from cache.view import View

TOKENS = list(range(1, 13))


@pytest.fixture
def cache() -> KVCache:
    return KVCache(num_pages=4, page_size=4)


def compute(cache: KVCache, tokens: list[int]) -> None:
    allocation = cache.admit(tokens)
    assert allocation is not None
    cache.free(allocation, tokens, len(tokens))


def test_entered_pages_are_found_by_the_next_prompt(cache: KVCache) -> None:
    assert cache.arrivals.enter(TOKENS, "", range(3)) == [0, 1, 2]
    assert cache.match([*TOKENS, 99]).num_tokens == 12
    assert cache.match([*TOKENS, 99], "other").num_tokens == 0
    assert cache.arrivals.resident([*TOKENS, 99], "", 3) == [0, 1, 2]
    cache.check()


def test_cached_pages_are_not_entered_again(cache: KVCache) -> None:
    compute(cache, TOKENS[:8])
    assert cache.arrivals.resident(TOKENS, "", 3) == [0, 1]
    assert cache.arrivals.enter(TOKENS, "", range(1, 3)) == [NO_PAGE, 2]
    assert cache.arrivals.enter(TOKENS, "", range(3)) == [NO_PAGE] * 3
    cache.check()


def test_pages_behind_a_missing_one_are_not_entered(cache: KVCache) -> None:
    compute(cache, TOKENS[:4])
    assert cache.arrivals.enter(TOKENS, "", range(2, 3)) == []
    assert cache.arrivals.enter([9, *TOKENS], "", range(1, 3)) == []
    assert cache.stats().pages_cached == 1
    cache.check()


def test_no_pages_leave_no_trace(cache: KVCache) -> None:
    assert cache.arrivals.enter(TOKENS, "unknown", range(0)) == []
    assert not cache._tree.roots()


def test_others_make_room_and_the_prompt_itself_does_not(cache: KVCache) -> None:
    compute(cache, [50, 51, 52, 53])
    long = list(range(1, 25))
    assert len(cache.arrivals.enter(long, "", range(6))) == 4
    assert cache.match([50, 51, 52, 53, 54]).num_tokens == 0
    assert cache.match(long).num_tokens == 16
    assert cache.stats().evicted_pages_total == 1
    cache.check()


def test_pages_in_use_make_no_room(cache: KVCache) -> None:
    allocation = cache.admit(list(range(60, 73)))
    assert allocation is not None
    assert cache.arrivals.enter(TOKENS, "", range(3)) == []
    assert not cache._tree.roots()[1:]
    cache.check()


def test_a_page_that_was_evicted_before_others_is_filled() -> None:
    """A sequence with a view of its own lets go of pages in the middle."""
    cache = KVCache(num_pages=4, page_size=4)
    allocation = cache.admit(TOKENS, view=View(4, 8))
    assert allocation is not None
    cache.commit(allocation, TOKENS, 12)
    cache.drop(allocation, range(1, 2))
    assert cache.arrivals.enter([70] * 8, "", range(2)) == [3, 1]
    assert cache.arrivals.resident(TOKENS, "", 3) == [0]
    cache.check()
    cache.reset()
    assert cache.arrivals.enter(TOKENS, "", range(1, 3)) == [3, NO_PAGE]
    assert cache.match([*TOKENS, 99]).num_tokens == 12
    cache.free(allocation, TOKENS, 12)
    cache.check()
