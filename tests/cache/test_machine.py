"""Random operations on a tiny cache, compared with a brute-force model of it.

The model records which (namespace, prefix) was written into each place of each page. A wrong share,
a page given back too early or a wrong copy is therefore wrong content when a sequence reads its
block table. The model also predicts every match, admission and eviction.
"""

from __future__ import annotations

from arrival_rules import ArrivalRules, Written, namespaces, prompts
from cache_reference import VOCABULARY, Entry, Live, PinnedPath, Reference
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    initialize,
    invariant,
    precondition,
    rule,
)

from cache.ghosts import Cause
from cache.kv_cache import KVCache
from cache.moves import PageMove
from cache.node import NO_PAGE
from cache.pins import RANKS, Pin, PinEnd
from cache.view import FULL_VIEW, View

MAX_LIVE = 4


#: Of requests: most have that of the model.
own_views = st.sampled_from((FULL_VIEW, FULL_VIEW, View(0, 4), View(3, 2), View(1, 5)))


class CacheMachine(ArrivalRules):
    @initialize(
        num_pages=st.integers(1, 8),
        page_size=st.integers(1, 4),
        view=st.builds(View, st.sampled_from((0, 0, 3)), st.sampled_from((None, 1, 3, 5, 8))),
        chunk_tokens=st.integers(1, 6),
        can_share_heads=st.sampled_from((True, True, False)),
    )
    def start(
        self,
        num_pages: int,
        page_size: int,
        view: View,
        chunk_tokens: int,
        can_share_heads: bool,
    ) -> None:
        self.cache = KVCache(
            num_pages,
            page_size,
            view=view,
            chunk_tokens=chunk_tokens,
            can_share_heads=can_share_heads,
            # Husks count too: no quota.
            pin_share=100.0,
        )
        self.model = Reference(num_pages, page_size, view, chunk_tokens, can_share_heads)
        self.memory: list[list[Written]] = [[None] * page_size for _ in range(num_pages)]
        self.moves: list[PageMove] = []
        self.pins: list[tuple[Pin, PinnedPath]] = []

    # ---- what a scheduler does -------------------------------------------------------------------

    @precondition(lambda self: len(self.model.live) < MAX_LIVE)
    @rule(
        tokens=prompts,
        namespace=namespaces,
        reserve_pages=st.sampled_from((0, 0, 0, 1, 3)),
        own_view=own_views,
    )
    def admit(
        self,
        tokens: list[int],
        namespace: str,
        reserve_pages: int = 0,
        own_view: View = FULL_VIEW,
    ) -> None:
        model = self.model
        view = own_view.within(model.view)
        del tokens[model.num_pages * model.page_size + 1 :]
        num_reused = model.num_reusable(namespace, tokens, view)
        misses = model.misses(namespace, tokens, view)
        num_path = num_reused // model.page_size
        path = list(model.path(namespace, tokens, num_path))
        gap = view.unread_pages(num_reused, model.page_size)
        num_new = model.num_first_pages(len(tokens), num_reused, view) - num_path
        read = model.read.union(key for i, key in enumerate(path) if i not in gap)
        leased = model.leased.union(path)
        fits = num_new + reserve_pages <= model.num_pages - model.num_private - len(read)
        source = (
            model.source(namespace, tokens) if num_reused > num_path * model.page_size else None
        )

        allocation = self.cache.admit(tokens, namespace, reserve_pages, view=own_view)
        assert (allocation is not None) == fits
        if allocation is None:
            return
        if source is not None:
            model.use(source)
        model.make_room(num_new, read, leased)
        num_pages = len(allocation.page_ids)
        assert num_pages == num_path + num_new
        assert num_pages * model.page_size > num_reused, "no place for the next token"
        assert allocation.num_cached_tokens == num_reused
        assert allocation.misses == misses
        self.moves += allocation.moves
        max_shared = model.max_shared_tokens(view)
        known = min(len(tokens), max_shared)
        model.live.append(
            Live(
                *(namespace, tokens, known, allocation, num_pages, num_reused, num_path, gap),
                view,
                max_shared,
            )
        )

    @precondition(lambda self: self.model.live)
    @rule(index=st.integers(0, MAX_LIVE - 1), token=st.sampled_from(VOCABULARY))
    def append_token(self, index: int, token: int) -> None:
        model = self.model
        seq = model.live[index % len(model.live)]
        num_new = max(0, model.pages(len(seq.tokens) + 1) - seq.num_pages)
        fits = num_new <= model.num_available
        table = list(seq.allocation.page_ids)

        assert self.cache.grow(seq.allocation, len(seq.tokens) + 1) == fits
        assert seq.allocation.page_ids[: len(table)] == table
        if fits:
            model.make_room(num_new, model.read, model.leased)
            seq.num_pages += num_new
            seq.tokens.append(token)
        assert len(seq.allocation.page_ids) == seq.num_pages

    @precondition(lambda self: not self.model.live)
    @rule(wanted=st.lists(st.tuples(prompts, namespaces), max_size=4))
    def serve_one_after_another(self, wanted: list[tuple[list[int], str]]) -> None:
        for tokens, namespace in wanted:
            self.match(tokens, namespace)
            self.admit(tokens, namespace)
            if self.model.live:
                self.step([len(tokens)])
                self.free(0)

    @precondition(lambda self: self.model.live)
    @rule(counts=st.lists(st.integers(0, 6), min_size=MAX_LIVE, max_size=MAX_LIVE))
    def step(self, counts: list[int]) -> None:
        for move in self.moves:
            head = self.memory[move.source.page_id][: move.num_tokens]
            self.memory[move.target.page_id][: move.num_tokens] = head
        self.moves.clear()
        for page_id in self.cache._pool.free_ids:
            self.memory[page_id] = [None] * self.model.page_size
        for seq, count in zip(self.model.live, counts, strict=False):
            end = min(seq.num_computed + count, len(seq.tokens))
            end = min(end, seq.num_pages * self.model.page_size)
            for position in range(seq.num_computed, end):
                page, place = self._place(seq, position)
                self.memory[page][place] = seq.written(position + 1)
            seq.num_computed = end
        for seq in self.model.live:
            self._read(seq)
        for seq in self.model.live:
            table = list(seq.allocation.page_ids)
            self.cache.commit(seq.allocation, seq.tokens, seq.num_computed)
            assert seq.allocation.page_ids == table
            self._expect_commit(seq)

    @precondition(lambda self: self.model.live)
    @rule(index=st.integers(0, MAX_LIVE - 1), num_kept=st.sampled_from((0, 0, 1)))
    def drop(self, index: int, num_kept: int) -> None:
        """Drop the pages that are out of view, or all but one of them."""
        model = self.model
        seq = model.live[index % len(model.live)]
        unread = seq.view.unread_pages(seq.num_computed, model.page_size)
        unread = range(unread.start, max(unread.start, unread.stop - num_kept))
        if seq.num_committed_pages < seq.max_shared_tokens // model.page_size:
            unread = range(unread.start, min(unread.stop, seq.num_committed_pages))
        table = list(seq.allocation.page_ids)
        self.cache.drop(seq.allocation, unread)
        assert seq.allocation.page_ids == table
        if unread.stop > seq.gap.stop:
            num_nodes = min(unread.stop, seq.num_committed_pages)
            path = list(model.path(seq.namespace, seq.tokens, num_nodes))
            model.use(*path[max(unread.start, seq.gap.stop) :])
            seq.duplicates.difference_update(unread)
            seq.gap = unread

    @precondition(lambda self: self.model.live)
    @rule(index=st.integers(0, MAX_LIVE - 1))
    def free(self, index: int) -> None:
        model = self.model
        seq = model.live[index % len(model.live)]
        self.cache.free(seq.allocation, seq.tokens, seq.num_computed)
        self._expect_commit(seq)
        self._expect_release(seq)

    @precondition(lambda self: self.model.live)
    @rule(index=st.integers(0, MAX_LIVE - 1))
    def discard(self, index: int) -> None:
        model = self.model
        seq = model.live[index % len(model.live)]
        self.cache.discard(seq.allocation)
        path = list(model.path(seq.namespace, seq.tokens, seq.num_committed_pages))
        self._expect_release(seq)
        top = next((key for key in path if key in model.cached and key not in model.leased), None)
        for owner, prefix in list(model.cached):
            if top is not None and owner == top[0] and prefix[: len(top[1])] == top[1]:
                model.num_evicted_pages += model.cached[owner, prefix].has_page
                model.evict((owner, prefix), Cause.FAULT)
                del model.cached[owner, prefix]
        model.end_pins_of_lost_pages()
        model.forget_husks(model.leased)

    def _expect_release(self, seq: Live) -> None:
        model = self.model
        path = list(model.path(seq.namespace, seq.tokens, seq.num_committed_pages))
        model.live.remove(seq)
        model.use(*(key for i, key in enumerate(path) if i not in seq.gap))
        model.forget_husks(model.leased)

    @rule(tokens=prompts, namespace=namespaces, own_view=own_views)
    def match(self, tokens: list[int], namespace: str, own_view: View = FULL_VIEW) -> None:
        match = self.cache.match(tokens, namespace, own_view)
        view = own_view.within(self.model.view)
        assert match.num_tokens == self.model.num_reusable(namespace, tokens, view)
        misses = self.cache.explain(tokens, namespace, view=own_view)
        assert misses == self.model.misses(namespace, tokens, view)
        assert match.in_flight == self.model.is_in_flight(namespace, tokens, view)

    @precondition(lambda self: self.model.live)
    @rule(
        index=st.integers(0, MAX_LIVE - 1),
        num_tokens=st.integers(1, 16),
        rest=st.one_of(st.just([]), prompts),
        own_view=own_views,
    )
    def match_like_a_live_one(
        self, index: int, num_tokens: int, rest: list[int], own_view: View
    ) -> None:
        seq = self.model.live[index % len(self.model.live)]
        self.match(seq.tokens[:num_tokens] + rest, seq.namespace, own_view)

    @precondition(lambda self: self.model.live)
    @rule(index=st.integers(0, MAX_LIVE - 1), max_tokens=st.integers(1, 9))
    def continue_a_live_one(self, index: int, max_tokens: int) -> None:
        model = self.model
        seq = model.live[index % len(model.live)]
        found = self.cache.continuation(seq.allocation, seq.tokens, max_tokens)
        known = tuple(seq.tokens)
        if len(known) > seq.max_shared_tokens:
            assert not found.token_ids, "cached tokens behind keys that nobody shares"
            return
        path = known + tuple(found.token_ids)
        ahead = model.ahead(seq.namespace, known)
        assert len(found.token_ids) <= max_tokens
        if found.token_ids:
            assert any(other[: len(path)] == path for other in ahead)
        if len(found.token_ids) < max_tokens:
            assert not any(len(o) > len(path) and o[: len(path)] == path for o in ahead)
        counts = []
        for end in range(
            len(known) // model.page_size * model.page_size, len(path), model.page_size
        ):
            beside = model.beside(
                seq.namespace, path[: max(len(known), end)], end + model.page_size
            )
            counts.append(len(beside))
            taken = [key for key in beside if key[1] == path[: end + model.page_size]]
            if taken:
                ranks = {key: (key in model.read, model.cached[key].last_used) for key in beside}
                assert ranks[taken[0]] == max(ranks.values())
        assert found.is_only_one == all(count <= 1 for count in counts)

    # ---- what an operator does -------------------------------------------------------------------

    @precondition(lambda self: len(self.model.pins) < 3)
    @rule(
        tokens=prompts,
        namespace=namespaces,
        owner=st.sampled_from(("a", "b")),
        lifetime=st.sampled_from(("5m", "1h")),
    )
    def pin(self, tokens: list[int], namespace: str, owner: str, lifetime: str) -> None:
        pin, num_ended = self.cache.pins.add(
            self.cache.covering(tokens, namespace), owner, lifetime
        )
        keys = self.model.covering(namespace, tokens)
        assert num_ended == 0
        assert (pin is not None) == bool(keys)
        pinned = PinnedPath(keys, owner, RANKS[lifetime])
        if pin is not None and pinned not in self.model.pins:
            self.model.pins.append(pinned)
            self.pins.append((pin, pinned))

    @precondition(lambda self: self.model.pins)
    @rule()
    def unpin(self) -> None:
        pinned = self.model.pins[0]
        self.model.end(pinned)
        [pin] = [pin for pin, of in self.pins if of == pinned and pin.is_live]
        self.cache.pins.end(pin, PinEnd.REMOVED)

    @precondition(lambda self: self.cache.stats().pages_free == 0)
    @rule()
    def reset(self) -> None:
        self.cache.reset()
        for pinned in [*self.model.pins]:
            self.model.end(pinned)
        read = self.model.read
        for key in self.model.cached.keys() - read:
            self.model.evict(key, Cause.RESET)
        self.model.forget_husks(self.model.leased)

    @rule()
    def pass_time(self) -> None:
        self.model.now_s += 1.0
        self.cache.set_time(self.model.now_s)

    # ---- what must hold --------------------------------------------------------------------------

    def _place(self, seq: Live, position: int) -> tuple[int, int]:
        page_index, place = divmod(position, self.model.page_size)
        return seq.allocation.page_ids[page_index], place

    def _read(self, seq: Live) -> None:
        view = seq.view
        first = view.start(seq.num_computed)
        for position in range(seq.num_computed):
            if view.sinks <= position < first:
                continue
            page, place = self._place(seq, position)
            expected = seq.written(position + 1)
            assert self.memory[page][place] == expected, f"page {page} is not ours"

    def _expect_commit(self, seq: Live) -> None:
        num_whole = min(seq.num_computed, seq.max_shared_tokens) // self.model.page_size
        path = list(self.model.path(seq.namespace, seq.tokens, num_whole))
        for index, key in list(enumerate(path))[seq.num_committed_pages :]:
            entry = self.model.cached.setdefault(key, Entry(has_page=False))
            if entry.has_page:
                seq.duplicates.add(index)
            entry.has_page = True
            self.model.ghosts.pop(key, None)
        seq.num_committed_pages = max(seq.num_committed_pages, num_whole)

    @invariant()
    def pages_are_where_the_model_says(self) -> None:
        self.cache.check()
        stats, model = self.cache.stats(), self.model
        assert len(self.cache.pins) == len(model.pins)
        assert stats.pages_total == model.num_pages
        assert stats.pages_free == model.num_free
        assert stats.pages_private == model.num_private
        assert stats.pages_cached == model.num_cached
        assert stats.pages_leased == len(model.read)
        assert stats.evicted_pages_total == model.num_evicted_pages
        assert self.cache.available_pages == model.num_available

    @invariant()
    def cached_pages_hold_what_they_should(self) -> None:
        found = set()
        nodes = list(self.cache._tree.nodes())
        assert len(nodes) == len(self.model.cached), "other husks are kept than the model says"
        for node in nodes:
            if node.page_id == NO_PAGE:
                continue
            written = self.memory[node.page_id]
            last = written[-1]
            assert last is not None
            namespace, prefix = last
            first = len(prefix) - self.model.page_size + 1
            assert written == [(namespace, prefix[:n]) for n in range(first, len(prefix) + 1)]
            found.add(last)
        held = {key for key, entry in self.model.cached.items() if entry.has_page}
        assert found == held, "other pages are cached than the model says"

    def teardown(self) -> None:
        if not hasattr(self, "cache"):
            return
        while self.model.live:
            self.free(0)
        self.pages_are_where_the_model_says()
        assert self.cache.stats().pages_leased == 0
        assert len(self.cache._pending_pages) == 0
        self.cache.reset()
        self.cache.check()
        assert self.cache.stats().pages_free == self.model.num_pages
        assert len(self.cache._tree.roots()) == 0


TestCacheMachine = CacheMachine.TestCase
TestCacheMachine.settings = settings(stateful_step_count=40)
