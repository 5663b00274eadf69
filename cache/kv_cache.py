"""The scheduler's only interface to the key/value cache: the owner and the tokens of each page.

Every page is in exactly one place: free (in the pool), private (of one allocation) or cached (in
the prefix tree). Cached pages that an allocation reads are leased. Under a windowed view an
allocation drops the pages behind its window while it runs. The view is that of the model, or one
of the request; then pages behind the first `View.max_keys` tokens are never shared.

    tokens        |  t0 .. t3  |  t4 .. t7  |  t8 .. t11 |  t12 t13   |
    page_ids      |     7      |     2      |     5      |     0      |
                  '---- cached and leased --' '------- private -------'
                              commit moves this border to the right

Knows page ids, not bytes: no tensors, no clock, no I/O. Knows nothing of steps, slots or requests.

The runner must do the copies of one step in the order of admission, before anything that step
writes. A copy's source is therefore not held: it may be evicted and handed out again within the
same round of planning, even as the target of a later copy. The scheduler must commit only
tokens whose step was launched before the copies of any later admission are.
"""

from __future__ import annotations

from collections.abc import Sequence
from sys import maxsize

from cache.allocation import Allocation
from cache.arrivals import Arrivals
from cache.bounds import Bounds
from cache.continuation import Continuation, continuation
from cache.ghosts import Cause
from cache.lease import Lease
from cache.match import Match
from cache.misses import Misses
from cache.moves import PageMove, head_copy
from cache.node import NO_PAGE, Node
from cache.pages import PagePool
from cache.pending_pages import NextPage, PendingPages
from cache.pins import PinEnd
from cache.placement import check_placement
from cache.policy import EvictionPolicy, lru
from cache.radix import RadixTree
from cache.reuse import Reuse, Search
from cache.stats import CacheStats
from cache.view import FULL_VIEW, View


class KVCache:
    """Allocations over a fixed number of pages, with token-exact prefix reuse.

    `tokens` are always those of the whole sequence from its first one on, each in `range(2**32)`;
    the cache reads the few it needs and keeps no reference to the list. Prefixes are shared only
    within one namespace.
    """

    def __init__(
        self,
        num_pages: int,
        page_size: int,
        policy: EvictionPolicy = lru,
        *,
        view: View = FULL_VIEW,
        chunk_tokens: int = 1,
        can_share_heads: bool = True,
        pin_share: float = 1.0,
        model_view: View | None = None,
    ) -> None:
        """`view`: of the model. `chunk_tokens`: how many a step may compute of one, at most.

        `can_share_heads`: whether the first tokens of a page can be reused without the rest.
        `pin_share`: of all pages, how many may be pinned. `model_view`: where `view` is that of
        some layers alone (`cache/groups.py`).
        """
        self.view = view
        self.bounds = Bounds(num_pages, page_size, chunk_tokens)
        self._pool = PagePool(num_pages)
        self._tree = RadixTree(
            page_size,
            policy,
            can_share_heads=can_share_heads,
            evicts_inside=model_view not in (None, view),
            max_pinned_pages=int(pin_share * num_pages),
        )
        self.search = Search(self._tree, view, model_view or view)
        self.pins = self._tree.pins
        self._page_size = page_size
        self._live: dict[Allocation, None] = {}  # Not a set: iteration is ordered.
        self._pending_pages = PendingPages()
        self.arrivals = Arrivals(self._tree, lambda: self.available_pages, self._take_pages)
        #: Times after which more pages may have been available than before.
        self.num_releases = 0
        self._num_evicted_pages = 0
        self._num_copied_pages = self._num_duplicate_pages = 0

    # ---- queries ---------------------------------------------------------------------------------

    @property
    def available_pages(self) -> int:
        """Pages that can be allocated now: free and evictable ones."""
        return self._pool.num_free + self._tree.num_evictable

    @property
    def groups(self) -> tuple[KVCache, ...]:
        """The groups of pages of which each sequence has a part."""
        return (self,)

    def match(self, tokens: Sequence[int], namespace: str = "", view: View = FULL_VIEW) -> Match:
        """Look up a prompt of a view. Changes nothing, recency included. O(tokens reused)."""
        reuse = self.search.reuse(tokens, namespace, view)
        page = self.search.next_page(reuse, tokens)
        return Match(reuse.num_tokens, self.is_in_flight(page), page)

    def explain(
        self,
        tokens: Sequence[int],
        namespace: str = "",
        max_cached_tokens: int | None = None,
        view: View = FULL_VIEW,
    ) -> Misses:
        """Look up why a prompt is not reused as a whole, as in `admit`. Changes nothing."""
        reuse = self.search.reuse(tokens, namespace, view, max_cached_tokens)
        return self.misses(reuse, tokens, namespace)

    def is_in_flight(self, page: NextPage | None) -> bool:
        """Return whether a live allocation is computing a page, as in `Match`. O(1)."""
        # Cached and computed again: of a prompt that ends with this page, only the last token is
        # wanting, and waiting would not bring it.
        return page is not None and page in self._pending_pages and not page.is_cached

    def is_still_missing(self, page: NextPage | None) -> bool:
        """Return whether a search would surely stop at the page again, and find it not in flight.

        Where that is so and `num_releases` is as before, a prompt that found no room finds none.
        """
        if page is None or self.view.window is not None or not self._tree.has(page.end):
            return False
        # Of those before the page, one may have become a husk, which is being computed again.
        if self._tree.num_husks:
            return False
        return not page.is_cached and page not in self._pending_pages

    def continuation(
        self, allocation: Allocation, tokens: Sequence[int], max_tokens: int
    ) -> Continuation:
        """Look up the cached tokens behind `tokens`, in the namespace of their allocation.

        Changes nothing. O(log children) a page: the lease stands at the last committed page.
        """
        nodes = allocation.lease.nodes
        if len(tokens) > allocation.max_shared_tokens:
            return Continuation([])
        rest = tokens[len(nodes) * self._page_size :]
        return continuation(allocation.lease.end, rest, self._page_size, max_tokens)

    def set_time(self, now_s: float) -> None:
        """Set the time of the next evictions; see `Misses.eviction`."""
        self._tree.ghosts.now_s = now_s

    def stats(self) -> CacheStats:
        """Take a snapshot. O(1)."""
        total, free, cached = self._pool.num_pages, self._pool.num_free, self._tree.num_pages
        return CacheStats(
            pages_total=total,
            pages_free=free,
            # `check` counts them one by one.
            pages_private=total - free - cached,
            pages_cached=cached,
            pages_leased=self._tree.num_read,
            evicted_pages_total=self._num_evicted_pages,
            copied_pages_total=self._num_copied_pages,
            duplicate_pages_total=self._num_duplicate_pages,
            pins=self.pins.stats(),
        )

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
        """Give a sequence pages for all of `tokens`, the longest cached beginning reused.

        Under a window, which `view` or the model has: only for the tokens in view and a chunk.
        At most `max_cached_tokens` are reused, if given, and pages of at most `max_stored_tokens`
        entered. Also asks for `reserve_pages` more to be available afterwards; None, and nothing
        changed, where there are not enough. Raises `ValueError` for no tokens.
        """
        reuse = self.search.reuse(tokens, namespace, view, max_cached_tokens)
        if not self.has_room(reuse, len(tokens), reserve_pages):
            return None
        misses = self.misses(reuse, tokens, namespace)
        return self.start(reuse, tokens, namespace, misses, max_stored_tokens)

    def has_room(self, reuse: Reuse, num_tokens: int, reserve_pages: int) -> bool:
        """Return whether a sequence can start so, with `reserve_pages` left over."""
        # The pages that it is about to read cannot be evicted for it.
        num_left = self.available_pages - reuse.num_unread
        return self._num_new_pages(reuse, num_tokens) + reserve_pages <= num_left

    def _num_new_pages(self, reuse: Reuse, num_tokens: int) -> int:
        num_pages = self.bounds.first_pages(reuse.view, num_tokens, reuse.num_tokens, reuse.gap)
        return num_pages - len(reuse.prefix.path)

    def start(
        self,
        reuse: Reuse,
        tokens: Sequence[int],
        namespace: str,
        misses: Misses,
        max_stored_tokens: int,
    ) -> Allocation:
        """Give a sequence its first pages, as `admit` does where it `has_room`."""
        prefix, gap, path = reuse.prefix, reuse.gap, reuse.prefix.path
        num_new_pages, moves = self._num_new_pages(reuse, len(tokens)), list[PageMove]()
        lease = Lease(self._tree, prefix.root or self._tree.root(namespace), path, gap)
        page_ids = [0 if index in gap else node.page_id for index, node in enumerate(path)]
        source_page = NO_PAGE
        if prefix.source is not None:
            source_page = prefix.source.page_id
            self._tree.touch(prefix.source)
        self.pins.note_used([*path, *filter(None, [prefix.source])])
        page_ids += self._take_pages(num_new_pages)
        if source_page != NO_PAGE:
            moves = head_copy(source_page, page_ids[len(path)], prefix.num_head_tokens)
            self._num_copied_pages += len(moves)
        max_entered = min(reuse.max_shared_tokens, max_stored_tokens)
        num_entered = max(len(path) * self._page_size, max_entered)
        num_known = min(len(tokens), num_entered)
        allocation = Allocation(
            page_ids, moves, reuse.num_tokens, misses, lease, num_known, num_entered, reuse.view
        )
        self._live[allocation] = None
        self._move_pending_page(allocation, tokens)
        return allocation

    def can_grow(self, allocation: Allocation, num_tokens: int, reserve_pages: int = 0) -> bool:
        """Return whether `grow` can make room for `num_tokens` tokens.

        If it needs pages for it, `reserve_pages` more must be available afterwards.
        """
        num_new_pages = self.bounds.pages(num_tokens) - len(allocation.page_ids)
        return num_new_pages <= 0 or num_new_pages + reserve_pages <= self.available_pages

    def grow(self, allocation: Allocation, num_tokens: int) -> bool:
        """Append pages until `num_tokens` tokens fit; False, and nothing changed, if they cannot.

        Raises `ValueError` if the allocation was freed.
        """
        num_new_pages = self.bounds.pages(num_tokens) - len(allocation.page_ids)
        if num_new_pages <= 0:
            return True
        self._require_live(allocation)
        if num_new_pages > self.available_pages:
            return False
        allocation.page_ids += self._take_pages(num_new_pages)
        return True

    def commit(self, allocation: Allocation, tokens: Sequence[int], num_computed: int) -> None:
        """Enter the whole pages of `tokens[:num_computed]`, so that others may reuse them.

        O(1) while no page has been filled. Where the tree has the same page already, the
        block table keeps its own: a step under way may be reading it. Raises `ValueError` if the
        allocation was freed.
        """
        nodes = allocation.lease.nodes
        num_whole_pages = min(num_computed, allocation.max_shared_tokens) // self._page_size
        if num_whole_pages <= len(nodes):
            return
        self._require_live(allocation)
        for index in range(len(nodes), num_whole_pages):
            end, key = allocation.lease.end, self._tree.key(tokens, index)
            node = end.child(key)
            if node is None:
                node = self._tree.insert(end, key, allocation.page_ids[index])
            elif node.page_id == NO_PAGE:
                self._tree.fill(node, allocation.page_ids[index])
            else:
                self._num_duplicate_pages += 1
            allocation.lease.extend(node)
        self._move_pending_page(allocation, tokens)

    def drop_unread(self, allocation: Allocation, num_computed: int) -> None:
        """Give back the pages that no query behind `num_computed` tokens reads; see `drop`."""
        self.drop(allocation, allocation.view.unread_pages(num_computed, self._page_size))

    def drop(self, allocation: Allocation, unread: range) -> None:
        """Give back pages that no later query of the sequence reads, by index in its block table.

        Those to be shared were committed. Private ones go back to the pool; cached ones stay
        cached, and may be evicted unless other allocations read them. `unread` begins where it did
        before, and never shrinks. Raises `ValueError` if the allocation was freed.
        """
        lease = allocation.lease
        if unread.stop <= lease.gap.stop:
            return
        self._require_live(allocation)
        self.num_releases += 1
        num_shared_pages = allocation.max_shared_tokens // self._page_size
        is_committed = min(unread.stop, num_shared_pages) <= len(lease.nodes)
        assert is_committed, "pages are dropped that were not committed"
        pages = range(max(unread.start, lease.gap.stop), unread.stop)
        self._pool.give_back(allocation.private_among(pages))
        lease.drop(unread)

    def detach(self, allocation: Allocation, num_tokens: int) -> None:
        """Leave it private pages for so many tokens, in another block table; none is committed."""
        self._require_live(allocation)
        self.num_releases += 1
        allocation.pending_page = self._pending_pages.move(allocation.pending_page, None)
        self._pool.give_back(allocation.detach(self.bounds.pages(num_tokens), self._tree))

    def free(self, allocation: Allocation, tokens: Sequence[int], num_computed: int) -> None:
        """Commit the whole pages, then give everything back. Raises `ValueError` the second time.

        Committed pages stay cached until they are needed. `page_ids` is left as it is.
        """
        self._require_live(allocation)
        self.commit(allocation, tokens, num_computed)
        self._release(allocation)

    def discard(self, allocation: Allocation) -> None:
        """Give everything back, and forget the cached pages of the sequence.

        For contents that must not be reused. Pages leased by other allocations stay cached. Raises
        `ValueError` if the allocation was freed.
        """
        self._require_live(allocation)
        self._release(allocation)
        page_ids = self._tree.prune(allocation.lease.nodes)
        self._num_evicted_pages += len(page_ids)
        self._pool.give_back(page_ids)

    # ---- pins and reset --------------------------------------------------------------------------

    def covering(self, tokens: Sequence[int], namespace: str = "") -> list[Node]:
        """List the cached pages of `tokens`, for `pins`, whose last may begin with the last tokens.

        Changes nothing. O(tokens).
        """
        return self._tree.find(tokens, namespace, len(tokens), self.view).covering(len(tokens))

    def reset(self) -> int:
        """Forget every cached page that no allocation holds, pinned ones too; return how many."""
        self.num_releases += 1
        self.pins.end_all(PinEnd.REMOVED)
        num_pages = self._tree.num_evictable
        self._pool.give_back(self._tree.evict(Cause.RESET) for _ in range(num_pages))
        return num_pages

    # ---- parts -----------------------------------------------------------------------------------

    def misses(self, reuse: Reuse, tokens: Sequence[int], namespace: str) -> Misses:
        """Return why no more of a prompt is reused."""
        is_in_flight = self.is_in_flight(self.search.next_page(reuse, tokens))
        return self.search.misses(reuse, tokens, namespace, is_in_flight=is_in_flight)

    def _take_pages(self, num_pages: int) -> list[int]:
        num_missing_pages = max(0, num_pages - self._pool.num_free)
        self._pool.give_back(self._tree.evict() for _ in range(num_missing_pages))
        self._num_evicted_pages += num_missing_pages
        return self._pool.take(num_pages)

    def _require_live(self, allocation: Allocation) -> None:
        if allocation not in self._live:
            raise ValueError("this allocation was freed before")

    def _release(self, allocation: Allocation) -> None:
        self.num_releases += 1
        allocation.pending_page = self._pending_pages.move(allocation.pending_page, None)
        del self._live[allocation]
        self._pool.give_back(allocation.private_pages())
        allocation.lease.release()

    def _move_pending_page(self, allocation: Allocation, tokens: Sequence[int]) -> None:
        index, page = len(allocation.lease.nodes), None
        if (index + 1) * self._page_size <= allocation.num_known_tokens:
            page = NextPage(allocation.lease.end, self._tree.key(tokens, index))
        allocation.pending_page = self._pending_pages.move(allocation.pending_page, page)

    # ---- invariants ------------------------------------------------------------------------------

    def check(self) -> None:
        """Assert that every page is in exactly one place and every count is true. O(pages)."""
        live = list(self._live)
        check_placement(self._pool, self._tree, live)
        self._pending_pages.check(a.pending_page for a in live if a.pending_page is not None)
        for allocation in live:
            allocation.check(self._page_size)
