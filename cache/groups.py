"""Two groups of pages, for a model of which only some layers have a window.

The layers that read all keys and the windowed ones have pages, page ids and a prefix tree of their
own. A sequence has a block table in each; tables of one sequence hold the same tokens in the same
places. So pages of the windowed layers are given back behind the window, and a prefix is usable
where each group has the pages that its own layers will read.

    tokens          |  t0 .. t3  |  t4 .. t7  |  t8 .. t11 |  t12 t13   |
    page_ids        |     7      |     2      |     5      |     0      |
    windowed        |  (dropped) |  (dropped) |     1      |     3      |

Knows nothing of layers, nor of the bytes of a page in either group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from sys import maxsize

from cache.allocation import Allocation
from cache.kv_cache import KVCache
from cache.match import Match
from cache.misses import Misses, MissReason
from cache.pending_pages import NextPage
from cache.policy import EvictionPolicy, lru
from cache.reuse import Reuse
from cache.stats import CacheStats
from cache.view import FULL_VIEW, View


class GroupedCache(KVCache):
    """See `KVCache`. It is itself the group of the layers without a window.

    An operation that needs pages takes them in both groups, or changes nothing.
    """

    def __init__(
        self,
        num_pages: int,
        num_windowed_pages: int,
        page_size: int,
        policy: EvictionPolicy = lru,
        *,
        windowed_view: View,
        chunk_tokens: int = 1,
        can_share_heads: bool = True,
        pin_share: float = 1.0,
    ) -> None:
        """`windowed_view`: the widest of the windowed layers; others as in `KVCache`."""
        super().__init__(
            num_pages,
            page_size,
            policy,
            chunk_tokens=chunk_tokens,
            can_share_heads=can_share_heads,
            pin_share=pin_share,
        )
        self.windowed = KVCache(
            num_windowed_pages,
            page_size,
            policy,
            view=windowed_view,
            chunk_tokens=chunk_tokens,
            can_share_heads=can_share_heads,
            pin_share=pin_share,
            # Their contents depend on the view of the other layers, too.
            model_view=FULL_VIEW,
        )

    # ---- queries ---------------------------------------------------------------------------------

    @property
    def groups(self) -> tuple[KVCache, ...]:
        """See `KVCache`."""
        return (self, self.windowed)

    def match(self, tokens: Sequence[int], namespace: str = "", view: View = FULL_VIEW) -> Match:
        """See `KVCache`."""
        reuses = self._agree(self.search.reuse(tokens, namespace, view), tokens, namespace, view)
        pages = [
            group.search.next_page(reuse, tokens)
            for group, reuse in zip(self.groups, reuses, strict=True)
        ]
        # A page may be cached in one group and be computed again for the other.
        page = next((page for page in pages if self.is_in_flight(page)), pages[0])
        return Match(reuses[0].num_tokens, self.is_in_flight(page), page)

    def _agree(
        self, full: Reuse, tokens: Sequence[int], namespace: str, view: View
    ) -> tuple[Reuse, Reuse]:
        """Find the longest beginning, of at most one of the full group, usable in both groups."""
        own, other = self.search, self.windowed.search
        windowed = other.reuse(tokens, namespace, view, full.num_tokens)
        while windowed.num_tokens != full.num_tokens:
            full = own.reuse(tokens, namespace, view, windowed.num_tokens)
            windowed = other.reuse(tokens, namespace, view, full.num_tokens)
        return full, windowed

    def explain(
        self,
        tokens: Sequence[int],
        namespace: str = "",
        max_cached_tokens: int | None = None,
        view: View = FULL_VIEW,
    ) -> Misses:
        """See `KVCache`."""
        first = self.search.reuse(tokens, namespace, view, max_cached_tokens)
        full, _ = self._agree(first, tokens, namespace, view)
        return self._group_misses(first, full.num_tokens, tokens, namespace, view)

    def _group_misses(
        self,
        first: Reuse,
        num_reused_tokens: int,
        tokens: Sequence[int],
        namespace: str,
        view: View,
    ) -> Misses:
        """Return the misses behind `num_reused_tokens`, which may be fewer than the full group has.

        Between them pages of the windowed layers were evicted.
        """
        misses = self.misses(first, tokens, namespace)
        num_lost_tokens = first.num_tokens - num_reused_tokens
        if not num_lost_tokens:
            return misses
        lost = self.windowed.explain(tokens, namespace, first.num_tokens, view)
        parts = ((MissReason.EVICTED, num_lost_tokens), *misses.parts)
        return replace(
            misses,
            num_reused_tokens=num_reused_tokens,
            parts=parts,
            eviction=lost.eviction or misses.eviction,
        )

    def is_in_flight(self, page: NextPage | None) -> bool:
        """See `KVCache`: in either group."""
        return super().is_in_flight(page) or self.windowed.is_in_flight(page)

    def is_still_missing(self, page: NextPage | None) -> bool:
        """See `KVCache`: under a window this is never certain."""
        del page
        return False

    def stats(self) -> CacheStats:
        """See `KVCache`."""
        *own, pins, _ = super().stats()
        windowed = self.windowed.stats()
        *part, _, _ = windowed
        sums = [a + b for a, b in zip(own, part, strict=True)]
        return CacheStats._make((*sums, pins, windowed))

    # ---- the life of an allocation ---------------------------------------------------------------

    def admit(
        self,
        tokens: Sequence[int],
        namespace: str = "",
        reserve_pages: int = 0,
        max_cached_tokens: int | None = None,
        view: View = FULL_VIEW,
        max_stored_tokens: int = maxsize,
    ) -> Allocation | None:
        """See `KVCache`; `reserve_pages` must be left over in each group."""
        first = self.search.reuse(tokens, namespace, view, max_cached_tokens)
        full, windowed = self._agree(first, tokens, namespace, view)
        other, num_tokens = self.windowed, len(tokens)
        if not self.has_room(full, num_tokens, reserve_pages):
            return None
        if not other.has_room(windowed, num_tokens, reserve_pages):
            return None
        misses = self._group_misses(first, full.num_tokens, tokens, namespace, view)
        allocation = self.start(full, tokens, namespace, misses, max_stored_tokens)
        part = other.start(windowed, tokens, namespace, misses, max_stored_tokens)
        allocation.windowed = part
        allocation.moves += [replace(move, is_windowed=True) for move in part.moves]
        # At first a table ends a chunk behind its view. It stays the shortest: both grow alike.
        allocation.shortest_page_ids = min(part.page_ids, allocation.page_ids, key=len)
        allocation.drops_pages = True
        return allocation

    def can_grow(self, allocation: Allocation, num_tokens: int, reserve_pages: int = 0) -> bool:
        """See `KVCache`."""
        return super().can_grow(allocation, num_tokens, reserve_pages) and self.windowed.can_grow(
            _part(allocation), num_tokens, reserve_pages
        )

    def grow(self, allocation: Allocation, num_tokens: int) -> bool:
        """See `KVCache`."""
        if not self.can_grow(allocation, num_tokens):
            return False
        super().grow(allocation, num_tokens)
        return self.windowed.grow(_part(allocation), num_tokens)

    def commit(self, allocation: Allocation, tokens: Sequence[int], num_computed: int) -> None:
        """See `KVCache`."""
        super().commit(allocation, tokens, num_computed)
        self.windowed.commit(_part(allocation), tokens, num_computed)

    def drop_unread(self, allocation: Allocation, num_computed: int) -> None:
        """See `KVCache`."""
        super().drop_unread(allocation, num_computed)
        self.windowed.drop_unread(_part(allocation), num_computed)

    def free(self, allocation: Allocation, tokens: Sequence[int], num_computed: int) -> None:
        """See `KVCache`."""
        # Commits in both groups, as `commit` is this one.
        super().free(allocation, tokens, num_computed)
        self.windowed.free(_part(allocation), tokens, num_computed)

    def discard(self, allocation: Allocation) -> None:
        """See `KVCache`."""
        super().discard(allocation)
        self.windowed.discard(_part(allocation))

    # ---- reset and time --------------------------------------------------------------------------

    def set_time(self, now_s: float) -> None:
        """See `KVCache`."""
        super().set_time(now_s)
        self.windowed.set_time(now_s)

    def reset(self) -> int:
        """See `KVCache`."""
        return super().reset() + self.windowed.reset()

    # ---- invariants ------------------------------------------------------------------------------

    def check(self) -> None:
        """Assert the invariants of each group, and that sequences have the same in both."""
        super().check()
        self.windowed.check()
        live = list(self._live)
        stats = self.windowed.stats()
        is_held = stats.pages_private + stats.pages_leased > 0
        assert live or not is_held, "a part without its sequence"
        for allocation in live:
            part = _part(allocation)
            assert part.num_cached_tokens == allocation.num_cached_tokens, "groups differ in reuse"
            assert len(part.lease.nodes) == len(allocation.lease.nodes), "groups differ in commits"
            num_pages = min(len(part.page_ids), len(allocation.page_ids))
            assert len(allocation.shortest_page_ids) == num_pages, "a shorter table outgrew another"


def _part(allocation: Allocation) -> Allocation:
    assert allocation.windowed is not None, "a sequence without pages of the windowed layers"
    return allocation.windowed
