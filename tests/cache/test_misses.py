"""The reasons why tokens are not reused, each provoked alone."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cache.allocation import Allocation
from cache.ghosts import Cause, Eviction, Ghosts, first_chain, next_chain
from cache.kv_cache import KVCache
from cache.misses import Misses, MissReason
from cache.pins import PinEnd
from cache.view import View

PROMPT = list(range(100, 112))
Never, Evicted, Diverged = MissReason.NEVER, MissReason.EVICTED, MissReason.DIVERGED


def admitted(cache: KVCache, tokens: list[int], namespace: str = "") -> Allocation:
    allocation = cache.admit(tokens, namespace)
    assert allocation is not None
    return allocation


def served(cache: KVCache, tokens: list[int], namespace: str = "") -> None:
    """Compute and release a sequence."""
    cache.free(admitted(cache, tokens, namespace), tokens, len(tokens))
    cache.check()


def nothing(_: KVCache) -> None:
    """Leave the cache empty."""


def the_same(cache: KVCache) -> None:
    served(cache, PROMPT)


def of_another_namespace(cache: KVCache) -> None:
    served(cache, PROMPT, "other")


def longer_ones(cache: KVCache) -> None:
    served(cache, [*PROMPT[:4], 7, 7, 7, 7])


def another_beginning(cache: KVCache) -> None:
    served(cache, [7, 7, 7, 7])


def another_behind_six(cache: KVCache) -> None:
    served(cache, [*PROMPT[:6], 7, 7])


def the_beginning(cache: KVCache) -> None:
    served(cache, PROMPT[:4])


def at_work(cache: KVCache) -> None:
    cache.commit(admitted(cache, PROMPT), PROMPT, 4)


def pinned_for_a_while(cache: KVCache) -> None:
    served(cache, PROMPT)
    pin, _ = cache.pins.add(cache.covering(PROMPT), "owner", "5m")
    assert pin is not None
    cache.pins.end(pin, PinEnd.EXPIRED)
    cache.set_time(3.0)
    served(cache, [7] * 25)


def evicted_for_room(cache: KVCache) -> None:
    served(cache, PROMPT)
    cache.set_time(3.0)
    served(cache, [7] * 25)


def evicted_and_at_work(cache: KVCache) -> None:
    evicted_for_room(cache)
    cache.commit(admitted(cache, PROMPT), PROMPT, 4)


def reset(cache: KVCache) -> None:
    served(cache, PROMPT)
    cache.set_time(5.0)
    cache.reset()


def evicted_and_cached_again(cache: KVCache) -> None:
    evicted_for_room(cache)
    served(cache, PROMPT)


def not_trusted(cache: KVCache) -> None:
    allocation = admitted(cache, PROMPT)
    cache.commit(allocation, PROMPT, 12)
    cache.discard(allocation)


Prepare = Callable[[KVCache], None]

#: The steps before, the reasons of the prompt's tokens, where it diverges, and the eviction.
CASES: list[tuple[Prepare, list[tuple[MissReason, int]], int | None, Eviction | None]] = [
    (nothing, [(Never, 11)], None, None),
    (of_another_namespace, [(Never, 11)], None, None),
    (another_beginning, [(Never, 11)], None, None),
    (the_same, [], None, None),
    (the_beginning, [(Never, 7)], None, None),
    (longer_ones, [(Diverged, 7)], 4, None),
    (another_behind_six, [(Diverged, 5)], 6, None),
    (at_work, [(MissReason.IN_FLIGHT, 4), (Never, 3)], None, None),
    (evicted_for_room, [(Evicted, 7)], None, Eviction(Cause.ROOM, 3.0)),
    (
        evicted_and_at_work,
        [(MissReason.IN_FLIGHT, 4), (Evicted, 3)],
        None,
        Eviction(Cause.ROOM, 3.0),
    ),
    (pinned_for_a_while, [(Evicted, 7)], None, Eviction(Cause.PIN_LAPSED, 3.0)),
    (evicted_and_cached_again, [], None, None),
    (reset, [(Evicted, 11)], None, Eviction(Cause.RESET, 5.0)),
    (not_trusted, [(Evicted, 11)], None, Eviction(Cause.FAULT, 0.0)),
]


@pytest.mark.parametrize(
    ("prepare", "parts", "diverged_at", "eviction"), CASES, ids=[c[0].__name__ for c in CASES]
)
def test_each_token_has_a_reason(
    prepare: Prepare,
    parts: list[tuple[MissReason, int]],
    diverged_at: int | None,
    eviction: Eviction | None,
) -> None:
    cache = KVCache(8, 4)
    prepare(cache)
    num_reused = len(PROMPT) - 1 - sum(count for _, count in parts)
    expected = Misses(num_reused, tuple(parts), diverged_at, eviction)
    assert cache.explain(PROMPT) == expected
    assert cache.match(PROMPT).num_tokens == num_reused
    cache.check()


def test_the_allocation_has_the_reasons_of_the_time_before_it() -> None:
    cache = KVCache(3, 4)
    served(cache, PROMPT)
    cache.set_time(2.0)
    allocation = admitted(cache, [*PROMPT[:4], 9, 9])
    assert allocation.misses == Misses(4, ((Diverged, 1),), diverged_at=4)
    assert allocation.misses.reason is Diverged
    assert cache.explain(PROMPT).eviction == Eviction(Cause.ROOM, 2.0)


def test_what_the_request_limits_is_said_to_be_limited() -> None:
    cache = KVCache(8, 4)
    served(cache, PROMPT)
    assert cache.explain(PROMPT, max_cached_tokens=5) == Misses(5, ((MissReason.LIMITED, 6),))
    assert cache.explain(PROMPT, max_cached_tokens=0).num_tokens(MissReason.LIMITED) == 11


def test_what_lies_behind_a_view_is_said_to_be_of_the_view() -> None:
    cache = KVCache(8, 4)
    served(cache, PROMPT)
    view = View(sinks=2, window=5)
    assert cache.explain(PROMPT, view=view) == Misses(7, ((MissReason.VIEW, 4),))
    assert cache.explain([1, 2], view=view) == Misses(0, ((Never, 1),))


def test_pages_of_codes_are_reused_as_a_whole() -> None:
    cache = KVCache(8, 4, can_share_heads=False)
    served(cache, PROMPT)
    assert cache.explain(PROMPT) == Misses(8, ((MissReason.PAGE, 3),))
    prompt = [*PROMPT[:6], 9, 9, 9]
    assert cache.explain(prompt) == Misses(4, ((MissReason.PAGE, 2), (Diverged, 2)), 6)


def test_a_page_that_is_cached_again_is_no_ghost() -> None:
    cache = KVCache(8, 4, can_share_heads=False)
    served(cache, PROMPT)
    cache.reset()
    served(cache, PROMPT)
    assert cache.explain(PROMPT) == Misses(8, ((MissReason.PAGE, 3),))


def test_pages_behind_an_evicted_one_are_lost_with_it() -> None:
    cache = KVCache(4, 4, view=View(window=12), chunk_tokens=4)
    allocation = admitted(cache, PROMPT)
    assert cache.grow(allocation, 16)
    cache.commit(allocation, [*PROMPT, 1, 2, 3, 4], 16)
    cache.drop(allocation, range(1))
    cache.set_time(4.0)
    served(cache, [7])
    # The first page made room, and a query at 6 would read it.
    eviction = Eviction(Cause.ROOM, 4.0)
    expected = Misses(0, ((Evicted, 6), (Diverged, 1)), 6, eviction)
    assert cache.explain([*PROMPT[:6], 9, 9]) == expected
    admitted(cache, PROMPT[:4])
    parts = ((MissReason.IN_FLIGHT, 4), (Evicted, 2), (Diverged, 1))
    assert cache.explain([*PROMPT[:6], 9, 9]) == Misses(0, parts, 6, eviction)


def test_the_eviction_is_that_of_the_first_page_though_it_is_being_computed() -> None:
    cache = KVCache(3, 4)
    served(cache, PROMPT[:8])
    cache.set_time(1.0)
    served(cache, [7] * 8)
    cache.set_time(2.0)
    served(cache, [8] * 4)
    admitted(cache, PROMPT[:5])
    misses = cache.explain(PROMPT[:9])
    assert misses.parts == ((MissReason.IN_FLIGHT, 4), (Evicted, 4))
    assert misses.eviction == Eviction(Cause.ROOM, 2.0)


def test_a_lookup_changes_nothing() -> None:
    cache = KVCache(3, 4)
    served(cache, PROMPT[:4])
    served(cache, [7] * 4)
    cache.explain(PROMPT)
    served(cache, [8] * 8)
    assert cache.match(PROMPT).num_tokens == 0, "the older one was to go"
    assert cache.match([7] * 5).num_tokens == 4


def test_tokens_of_another_namespace_are_no_ghosts() -> None:
    cache = KVCache(3, 4)
    served(cache, PROMPT, "mine")
    cache.reset()
    assert cache.explain(PROMPT, "mine").reason is Evicted
    assert cache.explain(PROMPT, "theirs").reason is Never


def test_ghosts_are_bounded_and_the_oldest_go() -> None:
    ghosts = Ghosts(max_pages=8)
    names = [next_chain(first_chain(""), bytes([number])) for number in range(20)]
    for number, name in enumerate(names):
        ghosts.now_s = number // 2
        ghosts.add(name, Cause.ROOM)
        assert len(ghosts) <= 8
    assert [ghosts.get(name) for name in names[:12]] == [None] * 12
    assert ghosts.get(names[15]) == Eviction(Cause.ROOM, 7.0)
    assert ghosts.get(names[19]) == Eviction(Cause.ROOM, 9.0)
    for name in (names[13], names[19], names[0]):
        ghosts.discard(name)
        assert ghosts.get(name) is None


@settings(max_examples=60)
@given(
    turns=st.lists(st.lists(st.integers(1, 3), min_size=1, max_size=7), min_size=1, max_size=5),
    data=st.data(),
)
def test_an_edit_is_found_at_its_token(turns: list[list[int]], data: st.DataObject) -> None:
    cache = KVCache(16, 4)
    prompt = [token for turn in turns for token in (0, *turn)]
    served(cache, prompt)
    place = data.draw(st.integers(0, len(prompt) - 1))
    edited = [*prompt[:place], 9, *prompt[place + 1 :]]
    num_whole, last = len(prompt) // 4 * 4, len(prompt) - 1
    num_reused = min(place, num_whole, last)
    misses = cache.explain(edited)
    assert misses.num_reused_tokens == num_reused
    is_seen = 0 < place < min(num_whole, last)
    assert misses.diverged_at == (place if is_seen else None)
    if num_reused < last:
        assert misses.parts == ((Diverged if is_seen else Never, last - num_reused),)
