"""Random lives of a tiny cache against a model that remembers everything and is never clever.

The model knows of each page which (namespace, prefix) was written into each of its places, so that
a wrong share, a page given back too early or a wrong copy shows as wrong content when a sequence
reads its block table; and it predicts every match, admission and eviction by brute force.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import takewhile

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from cache.kv_cache import Allocation, KVCache, MissReason, PageCopy, Pin

#: They share bytes, but no two of them in one place are the same token.
VOCABULARY = (3, 259)
MAX_LIVE = 4

Key = tuple[str, tuple[int, ...]]
Written = Key | None


def prompt(length: int, turn: int, pattern: int) -> list[int]:
    """One beginning for all, then, from `turn` on, one of a few ways to go on."""
    bits = [0 if place < turn else pattern >> (place - turn) % 3 & 1 for place in range(length)]
    return [VOCABULARY[bit] for bit in bits]


prompts = st.builds(prompt, st.integers(1, 16), st.integers(0, 12), st.integers(0, 7))
namespaces = st.sampled_from(("", "", "", "other"))


@dataclass
class Entry:
    last_used: int = 0
    pins: int = 0


@dataclass(eq=False)
class Live:
    namespace: str
    tokens: list[int]
    num_known_tokens: int
    allocation: Allocation
    num_pages: int
    num_computed: int
    num_committed_pages: int
    num_duplicates: int = 0

    def key(self, num_tokens: int) -> Key:
        return self.namespace, tuple(self.tokens[:num_tokens])


@dataclass
class Reference:
    """What the cache must hold after each call, found by looking at everything."""

    num_pages: int
    page_size: int
    cached: dict[Key, Entry] = field(default_factory=dict)
    live: list[Live] = field(default_factory=list)
    now: int = 0
    num_evicted_pages: int = 0

    def pages(self, num_tokens: int) -> int:
        return -(-num_tokens // self.page_size)

    def path(self, namespace: str, tokens: list[int], num_pages: int) -> Iterator[Key]:
        for count in range(1, num_pages + 1):
            yield namespace, tuple(tokens[: count * self.page_size])

    def num_reusable(self, namespace: str, tokens: list[int]) -> int:
        wanted = tokens[:-1]
        return max(
            (num_shared(prefix, wanted) for owner, prefix in self.cached if owner == namespace),
            default=0,
        )

    def reason(self, namespace: str, tokens: list[int]) -> MissReason:
        num_reused = self.num_reusable(namespace, tokens)
        if num_reused == len(tokens) - 1:
            return MissReason.COMPLETE
        if num_reused == 0:
            return MissReason.COLD
        goes_on = any(
            owner == namespace
            and num_shared(prefix, tokens) >= num_reused
            and len(prefix) > num_reused
            for owner, prefix in self.cached
        )
        return MissReason.DIVERGED if goes_on else MissReason.ENDED

    def is_in_flight(self, namespace: str, tokens: list[int]) -> bool:
        num_matched = self.num_reusable(namespace, tokens) // self.page_size
        if (num_matched + 1) * self.page_size > len(tokens):
            return False
        wanted = namespace, tuple(tokens[: (num_matched + 1) * self.page_size])
        return wanted not in self.cached and any(
            seq.num_committed_pages == num_matched
            and len(wanted[1]) <= seq.num_known_tokens
            and seq.key(len(wanted[1])) == wanted
            for seq in self.live
        )

    @property
    def leased(self) -> set[Key]:
        return {
            key
            for seq in self.live
            for key in self.path(seq.namespace, seq.tokens, seq.num_committed_pages)
        }

    @property
    def num_private(self) -> int:
        return sum(
            seq.num_pages - seq.num_committed_pages + seq.num_duplicates for seq in self.live
        )

    @property
    def num_free(self) -> int:
        return self.num_pages - len(self.cached) - self.num_private

    def source(self, namespace: str, tokens: list[int]) -> Key | None:
        num_reused = self.num_reusable(namespace, tokens)
        num_whole = num_reused // self.page_size * self.page_size
        if num_reused == num_whole:
            return None
        end = num_whole + self.page_size
        best = [
            (owner, prefix)
            for owner, prefix in self.cached
            if owner == namespace
            and len(prefix) == end
            and num_shared(prefix, tokens) >= num_reused
        ]
        wanted = namespace, tuple(tokens[:-1])
        below = [key for key in best if key < wanted]
        return max(below) if below else min(best)

    def use(self, *keys: Key) -> None:
        self.now += 1
        for key in keys:
            self.cached[key].last_used = self.now

    def make_room(self, num_pages: int, held: set[Key]) -> None:
        while self.num_free < num_pages:
            parents = {(owner, prefix[: -self.page_size]) for owner, prefix in self.cached}
            leaves = [key for key in self.cached if key not in parents | held]
            del self.cached[min(leaves, key=self._place)]
            self.num_evicted_pages += 1

    def _place(self, key: Key) -> tuple[bool, int]:
        return self.cached[key].pins > 0, self.cached[key].last_used


def num_shared(a: tuple[int, ...], b: list[int]) -> int:
    return len(list(takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False))))


class CacheMachine(RuleBasedStateMachine):
    @initialize(num_pages=st.integers(1, 8), page_size=st.integers(1, 4))
    def start(self, num_pages: int, page_size: int) -> None:
        self.cache = KVCache(num_pages, page_size)
        self.model = Reference(num_pages, page_size)
        self.memory: list[list[Written]] = [[None] * page_size for _ in range(num_pages)]
        self.copies: list[PageCopy] = []
        self.pins: list[tuple[Pin, list[Entry]]] = []

    # ---- what a scheduler does -------------------------------------------------------------------

    @precondition(lambda self: len(self.model.live) < MAX_LIVE)
    @rule(tokens=prompts, namespace=namespaces, reserve_pages=st.sampled_from((0, 0, 0, 1, 3)))
    def admit(self, tokens: list[int], namespace: str, reserve_pages: int = 0) -> None:
        model = self.model
        del tokens[model.num_pages * model.page_size + 1 :]
        num_reused = model.num_reusable(namespace, tokens)
        reason = model.reason(namespace, tokens)
        num_path = num_reused // model.page_size
        path = list(model.path(namespace, tokens, num_path))
        num_new = model.pages(len(tokens)) - num_path
        held = model.leased.union(path)
        fits = num_new + reserve_pages <= model.num_free + len(model.cached) - len(held)
        source = model.source(namespace, tokens)

        allocation = self.cache.admit(tokens, namespace, reserve_pages)
        assert (allocation is not None) == fits
        if allocation is None:
            return
        if source is not None:
            model.use(source)
        model.make_room(num_new, held)
        num_pages = len(allocation.page_ids)
        assert num_pages == model.pages(len(tokens))
        assert allocation.num_cached_tokens == num_reused
        assert allocation.miss_reason == reason
        self.copies += allocation.copies
        known = len(tokens)
        model.live.append(
            Live(namespace, tokens, known, allocation, num_pages, num_reused, num_path)
        )

    @precondition(lambda self: self.model.live)
    @rule(index=st.integers(0, MAX_LIVE - 1), token=st.sampled_from(VOCABULARY))
    def append_token(self, index: int, token: int) -> None:
        model = self.model
        seq = model.live[index % len(model.live)]
        num_new = max(0, model.pages(len(seq.tokens) + 1) - seq.num_pages)
        fits = num_new <= model.num_free + len(model.cached) - len(model.leased)
        table = list(seq.allocation.page_ids)

        assert self.cache.grow(seq.allocation, len(seq.tokens) + 1) == fits
        assert seq.allocation.page_ids[: len(table)] == table
        if fits:
            model.make_room(num_new, model.leased)
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
        for copy in self.copies:
            head = self.memory[copy.source][: copy.num_tokens]
            self.memory[copy.target][: copy.num_tokens] = head
        self.copies.clear()
        for seq, count in zip(self.model.live, counts, strict=False):
            end = min(seq.num_computed + count, len(seq.tokens))
            for position in range(seq.num_computed, end):
                page, place = self._place(seq, position)
                self.memory[page][place] = seq.key(position + 1)
            seq.num_computed = end
        for seq in self.model.live:
            self._read(seq)
        for seq in self.model.live:
            table = list(seq.allocation.page_ids)
            self.cache.commit(seq.allocation, seq.tokens, seq.num_computed)
            assert seq.allocation.page_ids == table
            self._expect_commit(seq)

    @precondition(lambda self: self.model.live)
    @rule(index=st.integers(0, MAX_LIVE - 1))
    def free(self, index: int) -> None:
        model = self.model
        seq = model.live[index % len(model.live)]
        self.cache.free(seq.allocation, seq.tokens, seq.num_computed)
        self._expect_commit(seq)
        model.live.remove(seq)
        model.use(*model.path(seq.namespace, seq.tokens, seq.num_committed_pages))

    @precondition(lambda self: self.model.live)
    @rule(index=st.integers(0, MAX_LIVE - 1))
    def discard(self, index: int) -> None:
        model = self.model
        seq = model.live[index % len(model.live)]
        self.cache.discard(seq.allocation)
        model.live.remove(seq)
        path = list(model.path(seq.namespace, seq.tokens, seq.num_committed_pages))
        model.use(*path)
        top = next((key for key in path if key not in model.leased), None)
        for owner, prefix in list(model.cached):
            if top is not None and owner == top[0] and prefix[: len(top[1])] == top[1]:
                del model.cached[owner, prefix]
                model.num_evicted_pages += 1

    @rule(tokens=prompts, namespace=namespaces)
    def match(self, tokens: list[int], namespace: str) -> None:
        match = self.cache.match(tokens, namespace)
        assert match.num_tokens == self.model.num_reusable(namespace, tokens)
        assert match.reason == self.model.reason(namespace, tokens)
        assert match.in_flight == self.model.is_in_flight(namespace, tokens)

    @precondition(lambda self: self.model.live)
    @rule(
        index=st.integers(0, MAX_LIVE - 1),
        num_tokens=st.integers(1, 16),
        rest=st.one_of(st.just([]), prompts),
    )
    def match_like_a_live_one(self, index: int, num_tokens: int, rest: list[int]) -> None:
        seq = self.model.live[index % len(self.model.live)]
        self.match(seq.tokens[:num_tokens] + rest, seq.namespace)

    # ---- what an operator does -------------------------------------------------------------------

    @precondition(lambda self: len(self.pins) < 2)
    @rule(tokens=prompts, namespace=namespaces)
    def pin(self, tokens: list[int], namespace: str) -> None:
        pin = self.cache.pin(tokens, namespace)
        path = self.model.path(namespace, tokens, len(tokens) // self.model.page_size)
        entries = [self.model.cached[key] for key in path if key in self.model.cached]
        for entry in entries:
            entry.pins += 1
        self.pins.append((pin, entries))

    @precondition(lambda self: self.pins)
    @rule()
    def unpin(self) -> None:
        pin, entries = self.pins.pop(0)
        self.cache.unpin(pin)
        for entry in entries:
            entry.pins -= 1

    @precondition(lambda self: self.cache.stats().pages_free == 0)
    @rule()
    def reset(self) -> None:
        self.cache.reset()
        leased = self.model.leased
        self.model.cached = {k: v for k, v in self.model.cached.items() if k in leased}

    # ---- what must hold --------------------------------------------------------------------------

    def _place(self, seq: Live, position: int) -> tuple[int, int]:
        page_index, place = divmod(position, self.model.page_size)
        return seq.allocation.page_ids[page_index], place

    def _read(self, seq: Live) -> None:
        for position in range(seq.num_computed):
            page, place = self._place(seq, position)
            assert self.memory[page][place] == seq.key(position + 1), f"page {page} is not ours"

    def _expect_commit(self, seq: Live) -> None:
        num_whole = seq.num_computed // self.model.page_size
        path = list(self.model.path(seq.namespace, seq.tokens, num_whole))
        for key in path[seq.num_committed_pages :]:
            seq.num_duplicates += key in self.model.cached
            self.model.cached.setdefault(key, Entry())
        seq.num_committed_pages = max(seq.num_committed_pages, num_whole)

    @invariant()
    def pages_are_where_the_model_says(self) -> None:
        self.cache.check()
        stats, model = self.cache.stats(), self.model
        assert stats.pages_total == model.num_pages
        assert stats.pages_free == model.num_free
        assert stats.pages_private == model.num_private
        assert stats.pages_cached == len(model.cached)
        assert stats.pages_leased == len(model.leased)
        assert stats.evicted_pages_total == model.num_evicted_pages
        assert self.cache.available_pages == model.num_free + len(model.cached) - len(model.leased)

    @invariant()
    def cached_pages_hold_what_they_should(self) -> None:
        found = set()
        for node in self.cache._tree.nodes():
            written = self.memory[node.page_id]
            last = written[-1]
            assert last is not None
            namespace, prefix = last
            first = len(prefix) - self.model.page_size + 1
            assert written == [(namespace, prefix[:n]) for n in range(first, len(prefix) + 1)]
            found.add(last)
        assert found == set(self.model.cached), "other pages are cached than the model says"

    def teardown(self) -> None:
        if not hasattr(self, "cache"):
            return
        while self.model.live:
            self.free(0)
        self.pages_are_where_the_model_says()
        assert self.cache.stats().pages_leased == 0
        assert len(self.cache._frontiers) == 0
        self.cache.reset()
        self.cache.check()
        assert self.cache.stats().pages_free == self.model.num_pages
        assert self.cache._tree.num_namespaces == 0


TestCacheMachine = CacheMachine.TestCase
TestCacheMachine.settings = settings(stateful_step_count=40)
