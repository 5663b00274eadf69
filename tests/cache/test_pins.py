"""Soft pins: the order of eviction, the quota, the ends of pins, and requests stored in part."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from cache.kv_cache import KVCache
from cache.node import NO_PAGE, Node
from cache.pins import LIFETIMES_S, Pin, PinEnd
from cache.view import View


def served(cache: KVCache, tokens: list[int]) -> None:
    """Let a sequence come, be computed and go."""
    allocation = cache.admit(tokens)
    assert allocation is not None
    cache.free(allocation, tokens, len(tokens))
    cache.check()


def pinned(cache: KVCache, tokens: list[int], lifetime: str = "5m", owner: str = "") -> Pin:
    pin, _ = cache.pins.add(cache.covering(tokens), owner, lifetime)
    assert pin is not None
    cache.check()
    return pin


def ended(cache: KVCache) -> dict[str, int]:
    counts = zip(PinEnd, cache.stats().pins.ended_total, strict=True)
    return {why: count for why, count in counts if count}


def found(cache: KVCache, *firsts: int) -> list[int]:
    """Return how much is cached of the prompts of a page that is full of each token."""
    return [cache.match([first, first, 99]).num_tokens for first in firsts]


def test_pinned_pages_go_last_but_go() -> None:
    cache = KVCache(3, 2)
    served(cache, [1, 1, 2, 2])
    pinned(cache, [1, 1, 2, 2, 3])
    served(cache, [5, 5])
    served(cache, [6, 6])
    assert cache.match([1, 1, 2, 2, 3]).num_tokens == 4
    served(cache, [7, 7, 7, 7])
    assert cache.match([1, 1, 2, 2, 3]).num_tokens == 2
    assert ended(cache) == {"evicted": 1}
    assert cache.stats().pins.pages == (0, 0, 0, 0, 0), "what is left of it is like any other page"


@pytest.mark.parametrize("num_pages", range(1, 7))
def test_shorter_lifetimes_go_first(num_pages: int) -> None:
    cache = KVCache(6, 2)
    for first, lifetime in enumerate(reversed([*LIFETIMES_S]), 1):
        served(cache, [first, first])
        pinned(cache, [first, first], lifetime)
    served(cache, [6, 6])
    served(cache, [9, 9] * num_pages)
    assert found(cache, *range(1, 7)) == [2] * (6 - num_pages) + [0] * num_pages


def test_a_pool_full_of_pins_still_takes_requests() -> None:
    cache = KVCache(4, 2)
    for first in range(1, 5):
        served(cache, [first, first])
        pinned(cache, [first, first], "24h")
    served(cache, [9] * 8)
    assert cache.match([9] * 8).num_tokens == 7
    assert ended(cache) == {"evicted": 4}


def test_the_longest_of_several_pins_counts() -> None:
    cache = KVCache(3, 2)
    served(cache, [1, 1])
    short, long = pinned(cache, [1, 1], "5m"), pinned(cache, [1, 1], "1h")
    assert cache.stats().pins.pages == (0, 0, 1, 0, 0)
    cache.pins.end(long, PinEnd.EXPIRED)
    assert cache.stats().pins.pages == (1, 0, 0, 0, 0)
    cache.pins.end(short, PinEnd.EXPIRED)
    cache.check()
    assert len(cache.pins) == 0


def test_the_page_in_which_a_prompt_ends_is_covered() -> None:
    cache = KVCache(4, 4)
    served(cache, [1, 1, 1, 1, 2, 2, 2, 2])
    pinned(cache, [1, 1, 1, 1, 2, 2])
    assert cache.stats().pins.pages[0] == 2
    assert len(cache.covering([1, 1, 1, 1, 2, 3])) == 1, "that page goes on with other tokens"
    assert len(cache.covering([1, 1, 1, 1, 2, 2, 2, 2, 3, 3])) == 2


def test_nothing_cached_is_not_pinned() -> None:
    cache = KVCache(4, 2)
    assert cache.pins.add(cache.covering([1, 1]), "", "5m") == (None, 0)


def test_the_same_pin_is_one() -> None:
    cache = KVCache(4, 2)
    served(cache, [1, 1])
    assert pinned(cache, [1, 1]) is pinned(cache, [1, 1])
    assert len(cache.pins) == 1


def test_the_oldest_pins_of_an_owner_make_room_for_its_newest() -> None:
    cache = KVCache(8, 2, pin_share=0.25)
    for first in (1, 2, 3):
        served(cache, [first, first])
    pinned(cache, [1, 1])
    pinned(cache, [2, 2])
    pinned(cache, [1, 1])
    pin, num_ended = cache.pins.add(cache.covering([3, 3]), "", "5m")
    assert pin is not None
    assert num_ended == 1
    firsts = [int.from_bytes(one.last.key[:4], "big") for one in cache.pins]
    assert firsts == [1, 3], "the first was used again after the second"
    assert ended(cache) == {"quota": 1}
    cache.check()


def test_no_owner_displaces_the_pins_of_one_with_fewer() -> None:
    cache = KVCache(16, 2, pin_share=0.25)
    for first in range(1, 7):
        served(cache, [first, first])
    for first in range(1, 5):
        pinned(cache, [first, first], owner="large")
    pinned(cache, [5, 5], owner="small")
    pin, num_ended = cache.pins.add(cache.covering([6, 6]), "large", "24h")
    assert pin is not None
    assert num_ended == 1
    assert sorted(one.owner for one in cache.pins) == ["large", "large", "large", "small"]
    cache.check()


def test_a_pin_longer_than_the_quota_displaces_none() -> None:
    cache = KVCache(8, 2, pin_share=0.25)
    served(cache, [1, 1])
    served(cache, [2] * 6)
    pinned(cache, [1, 1])
    assert cache.pins.add(cache.covering([2] * 6), "", "24h") == (None, 0)
    assert len(cache.pins) == 1


def test_a_pin_that_its_own_quota_ends_is_refused() -> None:
    cache = KVCache(8, 2, pin_share=0.5)
    for first in range(1, 4):
        served(cache, [first, first])
    served(cache, [4] * 4)
    for first in range(1, 4):
        pinned(cache, [first, first], owner=f"owner {first}")
    assert cache.pins.add(cache.covering([4] * 4), "new", "5m") == (None, 0)
    assert len(cache.pins) == 3
    cache.check()


def test_a_share_of_nothing_pins_nothing() -> None:
    cache = KVCache(8, 2, pin_share=0.0)
    served(cache, [1, 1])
    assert cache.pins.add(cache.covering([1, 1]), "", "5m") == (None, 0)


def test_reading_uses_a_pin_and_looking_up_does_not() -> None:
    cache = KVCache(8, 2)
    served(cache, [1, 1, 2, 2])
    first, whole = pinned(cache, [1, 1]), pinned(cache, [1, 1, 2, 2])
    cache.match([1, 1, 2, 2, 3])
    assert cache.pins.take_used() == []
    served(cache, [1, 1, 3, 3])
    assert cache.pins.take_used() == [first]
    # A copied head counts, too.
    served(cache, [1, 1, 2, 9])
    assert cache.pins.take_used() == [first, whole]
    assert cache.pins.take_used() == []


def test_a_reset_ends_all_pins() -> None:
    cache = KVCache(8, 2)
    served(cache, [1, 1])
    pin = pinned(cache, [1, 1], "1h")
    assert cache.reset() == 1
    cache.check()
    assert not pin.is_live
    assert ended(cache) == {"removed": 1}


def test_discarded_pages_lose_their_pins() -> None:
    cache = KVCache(8, 2)
    allocation = cache.admit([1, 1, 2, 2])
    assert allocation is not None
    cache.commit(allocation, [1, 1, 2, 2], 4)
    pinned(cache, [1, 1])
    pinned(cache, [1, 1, 2, 2])
    cache.discard(allocation)
    cache.check()
    assert len(cache.pins) == 0


def test_a_request_that_is_not_stored_leaves_no_page() -> None:
    cache = KVCache(8, 2)
    allocation = cache.admit([1, 1, 2, 2, 3], max_stored_tokens=0)
    assert allocation is not None
    assert not cache.match([1, 1, 2, 2, 3]).in_flight, "nobody may wait for its pages"
    cache.commit(allocation, [1, 1, 2, 2, 3], 4)
    cache.check()
    cache.free(allocation, [1, 1, 2, 2, 3], 5)
    cache.check()
    assert cache.stats().pages_free == 8


def test_a_request_is_stored_up_to_its_last_whole_page() -> None:
    cache = KVCache(8, 2)
    allocation = cache.admit([1, 1, 2, 2, 3, 3], max_stored_tokens=3)
    assert allocation is not None
    cache.free(allocation, [1, 1, 2, 2, 3, 3], 6)
    assert cache.match([1, 1, 2, 2, 3, 3]).num_tokens == 2


def test_one_that_is_not_stored_reads_what_others_stored() -> None:
    cache = KVCache(8, 2)
    served(cache, [1, 1, 2, 2])
    allocation = cache.admit([1, 1, 2, 2, 3, 3, 4], max_stored_tokens=0)
    assert allocation is not None
    assert allocation.num_cached_tokens == 4
    cache.check()
    cache.free(allocation, [1, 1, 2, 2, 3, 3, 4], 7)
    assert cache.match([1, 1, 2, 2, 3, 3, 4]).num_tokens == 4


# ---- check sees ----------------------------------------------------------------------------------


def _a_page(cache: KVCache) -> Node:
    return next(node for node in cache._tree.nodes() if node.pin_rank)


def miscount_pins(cache: KVCache) -> None:
    cache.pins._counts[_a_page(cache)][1] += 1


def mistake_an_owner(cache: KVCache) -> None:
    cache.pins._pages_of["another"] = cache.pins._pages_of.pop("")


def mistake_a_rank(cache: KVCache) -> None:
    node = _a_page(cache)
    node.pin_rank += 1
    cache._tree._queue.push(node)


def miscount_pages(cache: KVCache) -> None:
    cache.pins._num_pages[1] += 1


def pin_too_much(cache: KVCache) -> None:
    cache.pins._max_pages = 0


def move_a_pin(cache: KVCache) -> None:
    [at] = cache.pins._at.values()
    at["", 2] = at.pop(("", 1))


def leave_a_pin_behind(cache: KVCache) -> None:
    node = _a_page(cache)
    cache.pins._at[node]["", 2] = Pin(cache.pins, node, "", "30m")


@pytest.mark.parametrize(
    "damage",
    [
        miscount_pins,
        mistake_an_owner,
        mistake_a_rank,
        miscount_pages,
        pin_too_much,
        move_a_pin,
        leave_a_pin_behind,
    ],
)
def test_check_sees(damage: Callable[[KVCache], None]) -> None:
    cache = KVCache(8, 2)
    served(cache, [1, 1])
    pinned(cache, [1, 1])
    damage(cache)
    with pytest.raises((AssertionError, KeyError)):
        cache.check()


def test_a_pin_ends_at_a_page_and_not_at_a_husk() -> None:
    cache = KVCache(2, 1, view=View(0, 1))
    held = cache.admit([3, 3])
    assert held is not None
    cache.commit(held, [3, 3], 2)
    cache.drop(held, range(1))
    while cache.stats().evicted_pages_total == 0:
        assert cache.admit([4])
    path = cache.covering([3])
    assert [node.page_id for node in path] == [NO_PAGE]
    assert cache.pins.add(path, "", "5m") == (None, 0)
