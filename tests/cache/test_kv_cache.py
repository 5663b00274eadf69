"""Guarantees of the cache to the scheduler, one a test."""

from __future__ import annotations

import pytest

from cache.allocation import Allocation
from cache.kv_cache import KVCache
from cache.misses import MissReason
from cache.moves import PageMove, PageRef, Tier
from cache.node import Node
from cache.view import FULL_VIEW


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


def copy(source: int, target: int, num_tokens: int) -> PageMove:
    return PageMove(PageRef(Tier.DEVICE, source), PageRef(Tier.DEVICE, target), num_tokens)


# ---- matching ------------------------------------------------------------------------------------


def test_an_unknown_prompt_is_cold() -> None:
    match = KVCache(8, 4).match([1, 2, 3])
    assert (match.num_tokens, match.in_flight) == (0, False)


def test_reuse_is_exact_to_the_token() -> None:
    cache = KVCache(8, 4)
    served(cache, [1, 2, 3, 4, 5, 6, 7, 8])
    assert cache.match([1, 2, 3, 4, 5, 6, 9, 9, 9]).num_tokens == 6
    assert cache.match([1, 9, 9]).num_tokens == 1


def test_the_last_token_is_always_computed() -> None:
    cache = KVCache(8, 4)
    served(cache, [1, 2, 3, 4, 5, 6, 7, 8])
    for num_tokens in range(1, 9):
        match = cache.match([1, 2, 3, 4, 5, 6, 7, 8][:num_tokens])
        assert match.num_tokens == num_tokens - 1
        assert cache.explain([1, 2, 3, 4, 5, 6, 7, 8][:num_tokens]).reason is MissReason.COMPLETE


def test_a_prompt_that_goes_on_differently_has_diverged() -> None:
    cache = KVCache(8, 2)
    served(cache, [1, 2, 3, 4])
    assert cache.explain([1, 2, 9, 9]).reason is MissReason.DIVERGED
    assert cache.explain([1, 2, 3, 9, 9]).reason is MissReason.DIVERGED
    assert cache.explain([1, 9, 9, 9]).reason is MissReason.DIVERGED


def test_a_prompt_longer_than_what_is_cached_says_that_it_ended() -> None:
    cache = KVCache(8, 2)
    served(cache, [1, 2, 3, 4])
    assert cache.explain([1, 2, 3, 4, 5, 6]).reason is MissReason.NEVER


def test_namespaces_share_nothing() -> None:
    cache = KVCache(8, 2)
    served(cache, [1, 2, 3, 4], "mine")
    assert cache.explain([1, 2, 3, 4], "theirs").reason is MissReason.NEVER
    assert cache.match([1, 2, 3, 4], "mine").num_tokens == 3


def test_the_longest_head_is_found_among_many_children() -> None:
    cache = KVCache(2_000, 4)
    for token in range(0, 1_000, 2):
        served(cache, [token, token + 1, 70_000, 70_001])
    assert cache.match([500, 501, 70_000, 1, 1]).num_tokens == 3
    assert cache.match([500, 501, 99_999, 1, 1]).num_tokens == 2
    assert cache.match([501, 501, 70_000, 1, 1]).num_tokens == 0


def test_a_match_does_not_make_pages_recent() -> None:
    cache = KVCache(2, 2)
    served(cache, [1, 2])
    served(cache, [3, 4])
    cache.match([1, 2, 3])
    served(cache, [5, 6])
    assert cache.match([1, 2, 3]).num_tokens == 0
    assert cache.match([3, 4, 5]).num_tokens == 2


def test_no_tokens_are_refused() -> None:
    cache = KVCache(2, 2)
    with pytest.raises(ValueError, match="tokens"):
        cache.match([])
    with pytest.raises(ValueError, match="tokens"):
        cache.admit([])


# ---- in flight -----------------------------------------------------------------------------------


def test_a_page_that_is_being_computed_is_in_flight_until_it_is_committed() -> None:
    cache = KVCache(16, 4)
    first = [1, 2, 3, 4, 5, 6, 7, 8, 9]
    allocation = admitted(cache, first)
    assert cache.match(first).in_flight
    assert cache.match([1, 2, 3, 4]).in_flight, "the page's head is worth waiting for too"
    assert not cache.match([1, 2, 3]).in_flight, "too short for the page"
    assert not cache.match([1, 2, 3, 9, 9]).in_flight
    assert not cache.match(first, "another").in_flight
    cache.commit(allocation, first, 4)
    assert cache.match([1, 2, 3, 4, 5, 6, 7, 8, 0]).in_flight, "now the second page is"
    assert not cache.match([1, 2, 3, 4, 9, 9, 9, 9]).in_flight
    cache.commit(allocation, first, 8)
    assert not cache.match(first).in_flight
    cache.check()


def test_nothing_stays_in_flight_when_its_sequence_is_gone() -> None:
    cache = KVCache(16, 4)
    allocations = [admitted(cache, [1, 2, 3, 4, 5]) for _ in range(2)]
    cache.free(allocations[0], [1, 2, 3, 4, 5], 0)
    assert cache.match([1, 2, 3, 4, 5]).in_flight, "the other one goes on"
    cache.free(allocations[1], [1, 2, 3, 4, 5], 0)
    assert not cache.match([1, 2, 3, 4, 5]).in_flight


def test_a_cached_page_is_not_in_flight_when_its_last_token_is_computed_again() -> None:
    cache = KVCache(16, 4)
    served(cache, [1, 2, 3, 4])
    admitted(cache, [1, 2, 3, 4])
    assert not cache.match([1, 2, 3, 4]).in_flight


def test_generated_pages_are_not_announced() -> None:
    cache = KVCache(16, 2)
    tokens = [1, 2, 3]
    allocation = admitted(cache, tokens)
    tokens.append(4)
    assert cache.grow(allocation, 4)
    cache.commit(allocation, tokens, 3)
    assert not cache.match([1, 2, 3, 4, 5]).in_flight


# ---- admission -----------------------------------------------------------------------------------


def test_the_block_table_covers_the_whole_prompt() -> None:
    cache = KVCache(8, 4)
    assert admitted(cache, [1] * 9).page_ids == [0, 1, 2]
    assert cache.stats().pages_private == 3


def test_a_cached_beginning_is_shared_and_the_head_of_a_page_is_copied() -> None:
    cache = KVCache(8, 4)
    old = served(cache, [1, 2, 3, 4, 5, 6, 7, 8])
    allocation = admitted(cache, [1, 2, 3, 4, 5, 6, 9])
    assert allocation.page_ids[0] == old[0]
    assert allocation.page_ids[1] not in old
    assert allocation.moves == [copy(old[1], allocation.page_ids[1], 2)]
    assert allocation.num_cached_tokens == 6
    assert allocation.misses.reason is MissReason.COMPLETE


def test_a_shared_page_is_never_written_not_even_for_the_last_token() -> None:
    cache = KVCache(8, 4)
    old = served(cache, [1, 2, 3, 4])
    allocation = admitted(cache, [1, 2, 3, 4])
    assert allocation.moves == [copy(old[0], allocation.page_ids[0], 3)]


def test_an_admission_that_does_not_fit_changes_nothing() -> None:
    cache = KVCache(4, 2)
    served(cache, [1, 2, 3, 4])
    before = cache.stats()
    assert cache.admit([1, 2, 3, 4, 5, 6, 7, 8, 9]) is None
    assert cache.admit([9] * 9, "new namespace") is None
    cache.check()
    assert cache.stats() == before


def test_pages_about_to_be_leased_cannot_make_room() -> None:
    cache = KVCache(4, 2)
    served(cache, [1, 2, 3, 4, 5, 6])
    assert cache.available_pages == 4
    # Three are reused, one is new: nothing is left for the reserve.
    assert cache.admit([1, 2, 3, 4, 5, 6, 7], reserve_pages=1) is None
    admitted(cache, [1, 2, 3, 4, 5, 6, 7])
    assert cache.available_pages == 0


def test_pages_leased_already_are_not_counted_twice() -> None:
    cache = KVCache(4, 2)
    first = admitted(cache, [1, 2, 3])
    cache.commit(first, [1, 2, 3], 2)
    admitted(cache, [1, 2, 5, 6], reserve_pages=1)


def test_the_reserve_stays_available() -> None:
    cache = KVCache(4, 2)
    assert cache.admit([1, 2, 3], reserve_pages=3) is None
    admitted(cache, [1, 2, 3], reserve_pages=2)
    assert cache.available_pages == 2


def test_a_copy_whose_source_becomes_its_target_is_not_needed() -> None:
    cache = KVCache(1, 4)
    served(cache, [1, 2, 3, 4])
    allocation = admitted(cache, [1, 2, 9])
    assert allocation.num_cached_tokens == 2
    assert allocation.moves == []
    assert cache.stats().copied_pages_total == 0


def test_what_can_ever_fit() -> None:
    cache = KVCache(3, 4)
    admitted(cache, [1] * 12)
    assert cache.bounds.max_tokens(FULL_VIEW) == 12


@pytest.mark.parametrize(("num_pages", "page_size"), [(0, 4), (4, 0)])
def test_empty_shapes_are_refused_by_name(num_pages: int, page_size: int) -> None:
    name = "num_pages" if num_pages == 0 else "page_size"
    with pytest.raises(ValueError, match=name):
        KVCache(num_pages, page_size)


# ---- growth, commit, free ------------------------------------------------------------------------


def test_growth_appends_and_evicts_what_nobody_holds() -> None:
    cache = KVCache(3, 2)
    served(cache, [1, 2, 3, 4])
    allocation = admitted(cache, [9, 9])
    table = allocation.page_ids
    assert cache.grow(allocation, 2)
    assert len(table) == 1
    assert cache.grow(allocation, 5)
    assert len(table) == 3
    assert not cache.grow(allocation, 7)
    assert sorted(table) == [0, 1, 2]
    cache.check()


def test_committed_pages_can_be_shared_while_their_sequence_runs() -> None:
    cache = KVCache(8, 2)
    first = admitted(cache, [1, 2, 3])
    cache.commit(first, [1, 2, 3], 1)
    assert cache.match([1, 2, 5]).num_tokens == 0, "half a page is not"
    cache.commit(first, [1, 2, 3], 2)
    assert admitted(cache, [1, 2, 5]).page_ids[0] == first.page_ids[0]
    assert cache.stats().pages_leased == 1


def test_a_duplicate_page_is_not_freed_while_a_live_block_table_points_at_it() -> None:
    cache = KVCache(8, 2)
    first, second = admitted(cache, [1, 2, 3]), admitted(cache, [1, 2, 4])
    cache.commit(first, [1, 2, 3], 2)
    own_page = second.page_ids[0]
    cache.commit(second, [1, 2, 4], 2)
    cache.check()
    assert second.page_ids[0] == own_page
    assert cache.stats().duplicate_pages_total == 1
    assert cache.stats().pages_private == 3, "the duplicate and the two last pages"
    assert own_page not in admitted(cache, [7] * 8).page_ids
    cache.free(second, [1, 2, 4], 2)
    cache.check()
    assert own_page in admitted(cache, [8] * 4).page_ids


def test_who_computed_a_duplicate_goes_on_below_the_shared_page() -> None:
    cache = KVCache(8, 2)
    first, second = admitted(cache, [1, 2, 3, 4]), admitted(cache, [1, 2, 5, 6])
    cache.free(first, [1, 2, 3, 4], 4)
    cache.free(second, [1, 2, 5, 6], 4)
    cache.check()
    assert cache.stats().pages_cached == 3
    assert cache.match([1, 2, 3, 4, 0]).num_tokens == 4
    assert cache.match([1, 2, 5, 6, 0]).num_tokens == 4


def test_an_allocation_is_freed_exactly_once() -> None:
    cache = KVCache(4, 2)
    allocation = admitted(cache, [1, 2])
    cache.free(allocation, [1, 2], 2)
    with pytest.raises(ValueError, match="freed before"):
        cache.free(allocation, [1, 2], 2)
    with pytest.raises(ValueError, match="freed before"):
        cache.grow(allocation, 8)
    with pytest.raises(ValueError, match="freed before"):
        cache.commit(allocation, [1, 2, 3, 4], 4)
    cache.check()


def test_a_free_before_anything_was_computed_caches_nothing() -> None:
    cache = KVCache(4, 2)
    cache.free(admitted(cache, [1, 2, 3, 4]), [1, 2, 3, 4], 0)
    stats = cache.stats()
    assert (stats.pages_free, stats.pages_cached) == (4, 0)


def test_counters_say_what_happened() -> None:
    cache = KVCache(4, 2)
    served(cache, [1, 2, 3, 4])
    served(cache, [1, 2, 3, 5])
    served(cache, [9] * 8)
    stats = cache.stats()
    assert (stats.copied_pages_total, stats.evicted_pages_total) == (1, 3)


# ---- eviction ------------------------------------------------------------------------------------


def test_the_tail_of_a_sequence_goes_before_its_beginning() -> None:
    cache = KVCache(3, 2)
    served(cache, [1, 2, 3, 4, 5, 6])
    served(cache, [9, 9])
    assert cache.match([1, 2, 3, 4, 5, 6, 7]).num_tokens == 4


def test_the_least_recently_used_goes_first() -> None:
    cache = KVCache(3, 2)
    for tokens in ([1, 1], [2, 2], [3, 3], [1, 1, 0]):
        served(cache, tokens)
    # [1, 1] was used again; the page for the third token took the place of [2, 2].
    assert [cache.match([n, n, 9]).num_tokens for n in (1, 2, 3)] == [2, 0, 2]


def test_a_page_used_by_a_copy_was_used() -> None:
    cache = KVCache(3, 2)
    served(cache, [1, 1])
    served(cache, [2, 2])
    cache.free(admitted(cache, [1, 9]), [1, 9], 1)
    served(cache, [3, 3, 3, 3])
    assert [cache.match([n, n, 9]).num_tokens for n in (1, 2)] == [2, 0]


def test_another_policy_is_another_key() -> None:
    def newest_first(node: Node) -> int:
        return -node.last_used

    cache = KVCache(2, 2, policy=newest_first)
    for tokens in ([1, 1], [2, 2], [3, 3]):
        served(cache, tokens)
    assert [cache.match([n, n, 9]).num_tokens for n in (1, 2, 3)] == [2, 0, 2]


def test_a_reset_forgets_all_that_nobody_holds() -> None:
    cache = KVCache(8, 2)
    served(cache, [1, 2, 3, 4])
    admitted(cache, [1, 2, 5, 6])
    assert cache.reset() == 1
    cache.check()
    stats = cache.stats()
    assert (stats.pages_cached, stats.pages_leased, stats.pages_private) == (1, 1, 1)
    assert stats.evicted_pages_total == 0


def test_a_million_salts_leave_nothing_behind() -> None:
    cache = KVCache(4, 2)
    for salt in range(1_000):
        served(cache, [1, 2, 3, 4], f"salt {salt}")
    assert len(cache._tree.roots()) <= 2
    cache.reset()
    assert len(cache._tree.roots()) == 0
