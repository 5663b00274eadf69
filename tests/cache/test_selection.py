"""Compaction points, the pages that are enough, and the block table of a sequence that compacts."""

from __future__ import annotations

import pytest

from cache.kv_cache import KVCache
from cache.selection import Selection

SELECTION = Selection(window=3, capacity=8, interval=4)


@pytest.mark.parametrize("num_prompt", [1, 7, 12, 13, 40])
def test_points_are_functions_of_positions_alone(num_prompt: int) -> None:
    """The definition, step by step: at its end the prompt, then all that gather are dropped."""
    points, num_stored, num_dropped = list[int](), 0, 0
    for position in range(80):
        if position >= num_prompt and num_stored >= 12:
            points.append(position)
            num_dropped += num_stored - 8
            num_stored = 8
        assert SELECTION.num_dropped(position, num_prompt) == num_dropped
        num_stored += 1
        assert num_stored <= max(num_prompt, SELECTION.max_keys)
    assert points[0] == SELECTION.first_point(num_prompt)
    assert not SELECTION.is_reached(num_prompt, points[0] + 1), "the newest is not computed"
    assert SELECTION.is_reached(num_prompt, points[0] + 2)
    behind = [SELECTION.next_point(position, num_prompt) for position in range(points[-1])]
    assert behind == [min(p for p in points if p > position) for position in range(points[-1])]


def test_the_queries_of_the_first_window_are_computed() -> None:
    assert SELECTION.max_cached_tokens(40) == 37
    assert SELECTION.max_cached_tokens(13) == 10
    assert SELECTION.max_cached_tokens(10) == 9
    assert SELECTION.max_cached_tokens(5) == 5
    assert Selection(3, 8, scoring="all").max_cached_tokens(40) == 0, "all queries count"


@pytest.mark.parametrize("page_size", [1, 4, 5, 16])
@pytest.mark.parametrize("num_prompt", [1, 7, 12, 13, 40, 41])
@pytest.mark.parametrize("num_shared", [0, 6, 37])
def test_a_fixed_need_is_enough_at_the_first_point(
    page_size: int, num_prompt: int, num_shared: int
) -> None:
    """Even where all whole pages of the prompt are shared: other private ones are there."""
    num_pages = SELECTION.num_pages(num_prompt, page_size)
    cache = KVCache(num_pages + 10, page_size)
    tokens = list(range(num_prompt))
    if num_shared < num_prompt:
        other = cache.admit([*tokens[:num_shared], 99])
        assert other is not None
        cache.free(other, [*tokens[:num_shared], 99], num_shared + 1)
    allocation = cache.admit(tokens, max_stored_tokens=num_prompt)
    assert allocation is not None
    assert cache.grow(allocation, num_pages * page_size)
    assert len(allocation.page_ids) == num_pages
    text = tokens + [98] * 80
    first_point = SELECTION.first_point(num_prompt)
    assert cache.grow(allocation, first_point)
    assert len(allocation.page_ids) == num_pages, "it never needs more"
    cache.commit(allocation, text, first_point)
    assert len(allocation.lease.nodes) == num_prompt // page_size, "only the prompt is shared"
    cache.check()
    before, table = cache.num_releases, allocation.page_ids
    for _ in range(2):
        cache.detach(allocation, SELECTION.max_keys)
        cache.check()
        assert len(allocation.page_ids) == -(-SELECTION.max_keys // page_size)
        assert cache.stats().pages_private == len(allocation.page_ids)
        assert cache.stats().pages_leased == 0
    assert len(table) == num_pages, "the old table is another list"
    assert cache.num_releases > before
    cache.commit(allocation, text, 80)
    assert cache.match(text).num_tokens == num_prompt // page_size * page_size
    cache.free(allocation, text, 80)
    cache.check()
    assert cache.stats().pages_private == 0
    with pytest.raises(ValueError, match="freed before"):
        cache.detach(allocation, SELECTION.max_keys)


def test_a_waiting_prompt_does_not_wait_for_pages_that_will_not_come() -> None:
    cache, tokens = KVCache(20, 4), list(range(16))
    allocation = cache.admit(tokens)
    assert allocation is not None
    cache.commit(allocation, tokens, 4)
    assert cache.match(tokens).in_flight
    cache.detach(allocation, 12)
    assert not cache.match(tokens).in_flight
