"""Two groups of pages: both or none, and no more of the windowed ones than their layers read."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from cache.allocation import Allocation
from cache.groups import GroupedCache
from cache.misses import MissReason
from cache.moves import PageMove
from cache.pins import PinEnd
from cache.view import FULL_VIEW, View

WINDOW, CHUNK, PAGE_SIZE = 8, 4, 2
#: Windowed pages of a sequence with a chunk under way.
MOST_PAGES = (WINDOW + CHUNK) // PAGE_SIZE + 1
TEXT = [3 + i * i % 89 for i in range(60)]


def grouped(
    num_pages: int = 64, num_windowed_pages: int = 64, *, can_share_heads: bool = True
) -> GroupedCache:
    return GroupedCache(
        num_pages,
        num_windowed_pages,
        PAGE_SIZE,
        windowed_view=View(window=WINDOW),
        chunk_tokens=CHUNK,
        can_share_heads=can_share_heads,
    )


def admitted(cache: GroupedCache, tokens: list[int], view: View = FULL_VIEW) -> Allocation:
    allocation = cache.admit(tokens, view=view)
    assert allocation is not None
    return allocation


def held(cache: GroupedCache) -> tuple[int, int]:
    """Return the pages that sequences hold, in each group."""
    stats = [cache.stats(), cache.windowed.stats()]
    both, windowed = (one.pages_private + one.pages_leased for one in stats)
    return both - windowed, windowed


def compute(
    cache: GroupedCache, allocation: Allocation, tokens: list[int], last: int | None = None
) -> int:
    """Compute tokens, a chunk a step; return the most windowed pages that were held."""
    most, last = 0, len(tokens) if last is None else last
    for end in [*range(allocation.num_cached_tokens + CHUNK, last, CHUNK), last]:
        assert cache.grow(allocation, end)
        most = max(most, held(cache)[1])
        cache.commit(allocation, tokens, end)
        cache.drop_unread(allocation, end)
        cache.check()
    return most


def serve(cache: GroupedCache, tokens: list[int], view: View = FULL_VIEW) -> Allocation:
    allocation = admitted(cache, tokens, view)
    compute(cache, allocation, tokens)
    cache.free(allocation, tokens, len(tokens))
    cache.check()
    return allocation


def test_a_long_sequence_holds_its_window_and_a_chunk_in_the_windowed_group() -> None:
    cache = grouped(30, MOST_PAGES)
    allocation = admitted(cache, TEXT)
    assert compute(cache, allocation, TEXT) <= MOST_PAGES
    full, windowed = held(cache)
    assert full == 30
    assert windowed <= WINDOW // PAGE_SIZE + 1
    assert len(allocation.page_ids) == len(allocation.shortest_page_ids) == 30


@pytest.mark.parametrize("sizes", [(40, MOST_PAGES - 2), (29, 64)])
def test_a_sequence_is_taken_in_by_both_groups_or_by_none(sizes: tuple[int, int]) -> None:
    cache = grouped(*sizes)
    serve(cache, [9] * 4)
    before = cache.stats()
    assert cache.admit(TEXT, reserve_pages=1) is None
    assert cache.stats() == before
    cache.check()


@pytest.mark.parametrize("sizes", [(20, 64), (64, 6)])
def test_a_sequence_grows_in_both_groups_or_in_none(sizes: tuple[int, int]) -> None:
    cache = grouped(*sizes)
    allocation = admitted(cache, TEXT[:4])
    tables = [list(allocation.page_ids), list(allocation.shortest_page_ids)]
    assert not cache.grow(allocation, 60)
    assert not cache.can_grow(allocation, 5, reserve_pages=64)
    assert tables == [allocation.page_ids, allocation.shortest_page_ids]
    assert cache.can_grow(allocation, 12)
    assert cache.grow(allocation, 12)
    cache.check()


def test_a_prompt_is_found_though_the_windowed_pages_behind_it_are_gone() -> None:
    """Only the pages that a layer reads are needed, and these go last."""
    cache = grouped(64, MOST_PAGES + 1)
    serve(cache, TEXT)
    # Takes the pages before the window: each of them is older than those in it.
    other = admitted(cache, [1, 2, 1])
    found = cache.explain([*TEXT, 1])
    assert (found.num_reused_tokens, found.reason) == (60, MissReason.COMPLETE)
    cache.free(other, [1, 2, 1], 0)
    again = admitted(cache, [*TEXT, 1])
    assert again.num_cached_tokens == 60
    compute(cache, again, [*TEXT, 1])


def test_evicted_windowed_pages_shorten_a_prefix() -> None:
    cache = grouped(64, MOST_PAGES)
    serve(cache, TEXT)
    found = cache.explain(TEXT[:20])
    assert (found.num_reused_tokens, found.parts) == (0, ((MissReason.EVICTED, 19),))
    admitted(cache, [1] * 13)
    assert cache.match([*TEXT, 1]).num_tokens == 0
    # The groups agree on the longest beginning that both have.
    cache = grouped()
    serve(cache, TEXT)
    cache.windowed.reset()
    serve(cache, TEXT[:31])
    found = cache.explain([*TEXT, 1])
    assert (found.num_reused_tokens, found.parts) == (30, ((MissReason.EVICTED, 30),))
    assert not cache.match([*TEXT, 1]).in_flight


def test_the_full_group_may_have_less_than_the_windowed_one() -> None:
    cache = grouped(34, 64)
    serve(cache, TEXT)
    other = admitted(cache, [2] * 20)
    found = cache.explain([*TEXT, 1])
    assert (found.num_reused_tokens, found.parts) == (48, ((MissReason.EVICTED, 12),))
    cache.free(other, [2] * 20, 0)
    serve(cache, [*TEXT, 1])


def test_a_head_is_copied_in_both_groups() -> None:
    cache = grouped()
    serve(cache, TEXT)
    allocation = admitted(cache, [*TEXT[:21], 1, 1])
    assert allocation.num_cached_tokens == 21
    assert [move.is_windowed for move in allocation.moves] == [False, True]
    assert {move.num_tokens for move in allocation.moves} == {1}
    whole = grouped(can_share_heads=False)
    serve(whole, TEXT)
    assert admitted(whole, [*TEXT[:21], 1, 1]).num_cached_tokens == 20


def test_pages_under_computation_are_waited_for_in_either_group() -> None:
    cache = grouped()
    first = admitted(cache, TEXT)
    compute(cache, first, TEXT, last=20)
    found = cache.match(TEXT)
    assert (found.num_tokens, found.in_flight) == (20, True)
    assert cache.is_in_flight(found.next_page)
    assert not cache.is_still_missing(found.next_page)
    compute(cache, first, TEXT)
    cache.free(first, TEXT, 60)
    # Now the windowed pages alone are computed again.
    cache.windowed.reset()
    second = admitted(cache, [*TEXT, 1])
    assert second.num_cached_tokens == 0
    found = cache.match(TEXT)
    assert (found.num_tokens, found.in_flight) == (0, True)
    cache.discard(second)
    cache.check()
    assert cache.match(TEXT).num_tokens == 0


def test_a_requests_view_shares_nothing_behind_it_in_either_group() -> None:
    cache = grouped()
    # Wider than the window: it changes the contents of windowed pages all the same.
    view = View(2, 10)
    serve(cache, TEXT, view)
    assert cache.match([*TEXT, 1]).num_tokens == 12
    assert cache.windowed.match([*TEXT, 1]).num_tokens == 12
    found = cache.explain([*TEXT, 1], view=view)
    assert (found.num_reused_tokens, found.parts) == (12, ((MissReason.VIEW, 48),))
    # Kernels may load sinks that the window hides, so these stay.
    assert cache.windowed.search.own_view(view) == View(2, WINDOW)
    narrow = serve(cache, TEXT, View(2, 4))
    assert narrow.num_cached_tokens == 6
    assert held(cache) == (0, 0)


def test_a_pin_in_each_group_keeps_a_prefix() -> None:
    cache = grouped(64, 40)
    serve(cache, TEXT)
    pins = [group.pins.add(group.covering(TEXT), "", "5m")[0] for group in cache.groups]
    for token in (1, 2):
        serve(cache, [token] * 30)
    # Else the pages before its window would have gone.
    assert cache.match([*TEXT[:20], 1]).num_tokens == 20
    for pin in pins:
        assert pin is not None
        pin.pins.end(pin, PinEnd.EXPIRED)
    cache.check()


def test_reset_continuation_and_times_are_of_both_groups() -> None:
    cache = grouped(64, 40)
    serve(cache, TEXT)
    allocation = admitted(cache, TEXT[:20])
    compute(cache, allocation, TEXT[:20])
    assert cache.continuation(allocation, TEXT[:20], 4).token_ids == TEXT[20:24]
    cache.free(allocation, TEXT[:20], 20)
    with pytest.raises(ValueError, match="freed before"):
        cache.free(allocation, TEXT[:20], 20)
    stats = cache.stats()
    assert stats.windowed is not None
    assert cache.reset() == stats.pages_cached > stats.windowed.pages_cached
    assert cache.stats().pages_cached == 0
    cache.set_time(5.0)
    serve(cache, TEXT)
    cache.windowed.reset()
    eviction = cache.windowed.explain(TEXT).eviction
    assert eviction is not None
    assert eviction.at_s == 5.0


def test_the_share_in_use_is_that_of_the_fuller_group() -> None:
    cache = grouped(30, 10)
    assert cache.stats().used_share == 0
    allocation = admitted(cache, TEXT[:10])
    assert cache.stats().used_share == pytest.approx(5 / 10)
    compute(cache, allocation, TEXT)
    assert cache.stats().used_share == 1.0
    assert cache.windowed.stats().used_share < 1.0


# ---- random operations ---------------------------------------------------------------------------

#: Contents of a place: the tokens up to it, and the view where it depends on one.
Written = tuple[tuple[int, ...], View | None] | None
MAX_LIVE = 3


@dataclass(eq=False)
class Live:
    tokens: list[int]
    allocation: Allocation
    num_computed: int

    def parts(self) -> list[Allocation]:
        assert self.allocation.windowed is not None
        return [self.allocation, self.allocation.windowed]

    def written(self, num_tokens: int) -> Written:
        is_shared = num_tokens <= self.allocation.max_shared_tokens
        return tuple(self.tokens[:num_tokens]), None if is_shared else self.allocation.view


def prompt(length: int, turn: int, pattern: int) -> list[int]:
    """Return a beginning that all share and, from `turn` on, one of a few ways to go on."""
    return [3 if i < turn else 3 + (pattern >> (i - turn) % 3 & 1) for i in range(length)]


prompts = st.builds(prompt, st.integers(1, 24), st.integers(0, 18), st.integers(0, 7))
views = st.sampled_from((FULL_VIEW, FULL_VIEW, View(0, 4), View(3, 2), View(1, 9)))


class GroupsMachine(RuleBasedStateMachine):
    """Contents of both groups, written, moved and read as a model does."""

    @initialize(
        num_pages=st.integers(3, 12),
        num_windowed_pages=st.integers(2, 10),
        page_size=st.integers(1, 4),
        window=st.sampled_from((1, 3, 5, 8)),
        chunk_tokens=st.integers(1, 6),
        can_share_heads=st.sampled_from((True, True, False)),
    )
    def start(
        self,
        num_pages: int,
        num_windowed_pages: int,
        page_size: int,
        window: int,
        chunk_tokens: int,
        can_share_heads: bool,
    ) -> None:
        self.page_size, self.chunk_tokens = page_size, chunk_tokens
        self.cache = GroupedCache(
            num_pages,
            num_windowed_pages,
            page_size,
            windowed_view=View(window=window),
            chunk_tokens=chunk_tokens,
            can_share_heads=can_share_heads,
        )
        self.memory: list[list[list[Written]]] = [
            [[None] * page_size for _ in range(count)] for count in (num_pages, num_windowed_pages)
        ]
        self.moves: list[PageMove] = []
        self.live: list[Live] = []

    @precondition(lambda self: len(self.live) < MAX_LIVE)
    @rule(tokens=prompts, reserve_pages=st.sampled_from((0, 0, 2)), view=views)
    def admit(self, tokens: list[int], reserve_pages: int, view: View) -> None:
        before, found = self.cache.stats(), self.cache.match(tokens, view=view)
        misses = self.cache.explain(tokens, view=view)
        assert misses.num_reused_tokens == found.num_tokens
        assert sum(count for _, count in misses.parts) == len(tokens) - 1 - found.num_tokens
        allocation = self.cache.admit(tokens, "", reserve_pages, view=view)
        if allocation is None:
            assert self.cache.stats() == before
            return
        assert allocation.num_cached_tokens == found.num_tokens
        assert allocation.misses == misses
        assert len(allocation.shortest_page_ids) * self.page_size > found.num_tokens
        self.moves += allocation.moves
        self.live.append(Live(tokens, allocation, found.num_tokens))

    @precondition(lambda self: self.live)
    @rule(pick=st.integers(0, 9), token=st.sampled_from((3, 4)), count=st.integers(1, 5))
    def grow(self, pick: int, token: int, count: int) -> None:
        seq = self.live[pick % len(self.live)]
        end = len(seq.tokens) + count
        fits = self.cache.can_grow(seq.allocation, end)
        assert self.cache.grow(seq.allocation, end) == fits
        if fits:
            seq.tokens += [token] * count

    @precondition(lambda self: self.live)
    @rule(counts=st.lists(st.integers(0, 6), min_size=MAX_LIVE, max_size=MAX_LIVE))
    def step(self, counts: list[int]) -> None:
        for move in self.moves:
            memory = self.memory[move.is_windowed]
            head = memory[move.source.page_id][: move.num_tokens]
            memory[move.target.page_id][: move.num_tokens] = head
        self.moves.clear()
        for memory, group in zip(self.memory, self.cache.groups, strict=True):
            for page_id in group._pool.free_ids:
                memory[page_id] = [None] * self.page_size
        for seq, count in zip(self.live, counts, strict=False):
            self.compute(seq, min(count, self.chunk_tokens))
        for seq in self.live:
            self.cache.commit(seq.allocation, seq.tokens, seq.num_computed)
            self.cache.drop_unread(seq.allocation, seq.num_computed)

    def compute(self, seq: Live, count: int) -> None:
        end = min(seq.num_computed + count, len(seq.tokens))
        if not self.cache.grow(seq.allocation, end):
            end = min(end, len(seq.allocation.shortest_page_ids) * self.page_size)
        for memory, part in zip(self.memory, seq.parts(), strict=True):
            self.read(seq, memory, part)
            for position in range(seq.num_computed, end):
                page, place = divmod(position, self.page_size)
                memory[part.page_ids[page]][place] = seq.written(position + 1)
        seq.num_computed = end

    def read(self, seq: Live, memory: list[list[Written]], part: Allocation) -> None:
        first = part.view.start(seq.num_computed)
        for position in range(seq.num_computed):
            if position < part.view.sinks or position >= first:
                page, place = divmod(position, self.page_size)
                found = memory[part.page_ids[page]][place]
                assert found == seq.written(position + 1), f"position {position} is lost"

    @precondition(lambda self: self.live)
    @rule(pick=st.integers(0, 9), is_trusted=st.sampled_from((True, True, False)))
    def end(self, pick: int, is_trusted: bool) -> None:
        seq = self.live.pop(pick % len(self.live))
        if is_trusted:
            self.cache.free(seq.allocation, seq.tokens, seq.num_computed)
        else:
            self.cache.discard(seq.allocation)

    @precondition(lambda self: not self.live)
    @rule()
    def reset(self) -> None:
        self.cache.reset()

    @invariant()
    def pages_are_in_one_place_each(self) -> None:
        self.cache.check()
        if not self.live:
            assert held(self.cache) == (0, 0)


GroupsMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=25)
TestGroupsMachine = GroupsMachine.TestCase
