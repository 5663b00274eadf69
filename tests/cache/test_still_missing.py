"""A prompt that found no room is looked up again only after one of these events."""

from __future__ import annotations

from cache.allocation import Allocation
from cache.kv_cache import KVCache
from cache.view import View


def admitted(cache: KVCache, tokens: list[int]) -> Allocation:
    allocation = cache.admit(tokens)
    assert allocation is not None
    cache.check()
    return allocation


def served(cache: KVCache, tokens: list[int]) -> None:
    """Let a sequence come, be computed and go."""
    cache.free(admitted(cache, tokens), tokens, len(tokens))
    cache.check()


def test_a_page_is_still_missing_until_it_is_computed_cached_or_out_of_reach() -> None:
    cache, tokens = KVCache(3, 2), [1, 2, 3, 4, 5]
    assert not cache.is_still_missing(cache.match(tokens).next_page), "nothing to begin at"
    served(cache, [1, 2])
    page = cache.match(tokens).next_page
    assert cache.is_still_missing(page)
    allocation = admitted(cache, tokens)
    assert not cache.is_still_missing(page), "it is being computed"
    cache.commit(allocation, tokens, 4)
    assert not cache.is_still_missing(page), "it is cached"
    cache.free(allocation, tokens, 4)
    after = cache.match([*tokens, 6, 7]).next_page
    assert cache.is_still_missing(after)
    served(cache, [7, 8, 9, 10, 11, 12])
    assert not cache.is_still_missing(after), "the pages before it were evicted"
    assert not cache.is_still_missing(page), "so was the root, and the next one is another"


def test_under_a_window_no_page_is_surely_missing() -> None:
    cache = KVCache(8, 2, view=View(window=4), chunk_tokens=4)
    served(cache, [1, 2])
    assert not cache.is_still_missing(cache.match([1, 2, 3, 4, 5]).next_page)


def test_beside_husks_no_page_is_surely_missing() -> None:
    """A page before the missing one may be a husk by now, and be computed again."""
    cache, tokens = KVCache(8, 2), [1, 2, 3, 4, 5, 6]
    bounded = cache.admit(tokens, view=View(window=4))
    assert bounded is not None
    cache.commit(bounded, tokens, 6)
    page = cache.match([*tokens[:4], 9, 9, 9]).next_page
    assert cache.is_still_missing(page)
    cache.drop(bounded, range(1))
    assert cache.reset() == 1
    assert not cache.is_still_missing(page)
    cache.check()


def test_each_way_to_more_pages_is_counted() -> None:
    cache = KVCache(8, 2)
    first, second = admitted(cache, [1, 2, 3]), admitted(cache, [4, 5, 6])
    cache.commit(first, [1, 2, 3], 2)
    assert cache.grow(first, 5)
    assert cache.num_releases == 0, "these took pages, or moved them"
    cache.free(first, [1, 2, 3], 2)
    freed = cache.num_releases
    assert freed > 0
    cache.discard(second)
    discarded = cache.num_releases
    assert discarded > freed
    cache.reset()
    assert cache.num_releases > discarded
