"""Pages out of view: given back while their sequence runs, evicted, found again and refilled."""

from __future__ import annotations

import pytest

from cache.allocation import Allocation
from cache.kv_cache import KVCache
from cache.misses import MissReason
from cache.view import View


def admitted(
    cache: KVCache, tokens: list[int], namespace: str = "", reserve_pages: int = 0
) -> Allocation:
    allocation = cache.admit(tokens, namespace, reserve_pages)
    assert allocation is not None
    cache.check()
    return allocation


def served(cache: KVCache, tokens: list[int], namespace: str = "") -> list[int]:
    """Let a sequence come, be computed and go; its block table."""
    allocation = admitted(cache, tokens, namespace)
    cache.free(allocation, tokens, len(tokens))
    cache.check()
    return allocation.page_ids


def windowed(num_pages: int, window: int, *, sinks: int = 0, chunk_tokens: int = 2) -> KVCache:
    return KVCache(num_pages, 2, view=View(sinks, window), chunk_tokens=chunk_tokens)


def test_a_prompt_gets_pages_for_its_window_and_a_chunk() -> None:
    cache = windowed(8, 4)
    allocation = admitted(cache, [1] * 100)
    assert len(allocation.page_ids) == 3
    assert cache.grow(allocation, 8)
    view = View(window=4)
    assert cache.bounds.max_tokens(view) > 10**9
    assert windowed(2, 4).bounds.max_tokens(view) == 4


def test_pages_out_of_view_go_back_while_their_sequence_runs() -> None:
    cache = windowed(8, 3)
    tokens = list(range(8))
    allocation = admitted(cache, tokens)
    assert cache.grow(allocation, 8)
    table = list(allocation.page_ids)
    cache.commit(allocation, tokens, 6)
    cache.drop(allocation, range(2))
    cache.check()
    assert allocation.page_ids == table
    stats = cache.stats()
    assert (stats.pages_private, stats.pages_leased, stats.pages_cached) == (1, 1, 3)
    assert cache.match(tokens).num_tokens == 6, "they stay cached"
    cache.drop(allocation, range(1))
    assert cache.stats().pages_leased == 1, "a page is dropped once"
    cache.free(allocation, tokens, 6)
    with pytest.raises(ValueError, match="freed before"):
        cache.drop(allocation, range(3))


def test_a_page_that_another_reads_survives_a_drop() -> None:
    cache = windowed(4, 4)
    tokens = list(range(6))
    first = admitted(cache, tokens)
    cache.commit(first, tokens, 4)
    second = admitted(cache, tokens[:4])
    cache.drop(first, range(1))
    assert cache.stats().pages_leased == 2
    cache.drop(second, range(1))
    assert cache.stats().pages_leased == 1
    cache.check()


def test_a_prefix_is_found_without_its_pages_out_of_view() -> None:
    cache = windowed(4, 3)
    tokens = list(range(8))
    allocation = admitted(cache, tokens)
    assert cache.grow(allocation, 8)
    cache.commit(allocation, tokens, 8)
    cache.drop(allocation, range(3))
    served(cache, [9, 9])
    # The first page made room. The last three are all that a query at 8 or at 7 reads.
    assert cache.match([*tokens, 5]).num_tokens == 8
    assert cache.match([0, 1, 2, 3, 7]).num_tokens == 4
    assert cache.explain([0, 1, 2, 7]).reason is MissReason.EVICTED, "its first page is in view"
    again = admitted(cache, [*tokens, 5])
    assert again.page_ids[3] == allocation.page_ids[3]


def test_a_page_computed_again_takes_its_old_place() -> None:
    cache = windowed(4, 3)
    tokens = list(range(6))
    allocation = admitted(cache, tokens)
    assert cache.grow(allocation, 6)
    cache.commit(allocation, tokens, 6)
    cache.drop(allocation, range(2))
    served(cache, [8, 9, 9, 9])
    assert cache.match([0, 1, 2]).num_tokens == 0
    served(cache, [0, 1])
    assert cache.match([0, 1, 2]).num_tokens == 2
    assert cache.explain([0, 1, 2, 3, 9]).reason is MissReason.EVICTED, "the next page is gone"


def test_sinks_are_read_for_ever() -> None:
    cache = windowed(8, 3, sinks=2)
    tokens = list(range(10))
    allocation = admitted(cache, tokens)
    assert cache.grow(allocation, 10)
    cache.commit(allocation, tokens, 8)
    cache.drop(allocation, range(1, 3))
    cache.check()
    assert cache.reset() == 2
    assert cache.match(tokens).num_tokens == 8


def test_a_sequence_beyond_its_shared_tokens_has_no_cached_continuation() -> None:
    """The pages behind them were computed with other keys in view."""
    cache, tokens = KVCache(16, 2), list(range(12))
    served(cache, tokens)
    bounded = cache.admit(tokens[:4], view=View(window=6))
    assert bounded is not None
    assert cache.continuation(bounded, tokens[:6], 4).token_ids == [6, 7, 8, 9]
    assert cache.continuation(bounded, tokens[:8], 4).token_ids == []
