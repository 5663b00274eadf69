"""The pages of one sequence.

Knows nothing of how pages are found, handed out or evicted.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise

from cache.lease import Lease
from cache.misses import Misses
from cache.moves import PageMove
from cache.pending_pages import NextPage
from cache.radix import RadixTree
from cache.view import FULL_VIEW, View


@dataclass(slots=True, eq=False)
class Allocation:
    """The pages of one sequence, from `admit` to `free`."""

    #: The block table: page i holds the tokens from `i * page_size` on. Append-only, until `detach`
    #: puts another list in its place. Under a view the entries of pages that it reads no more are
    #: of any page, and a prompt's table may have to grow before all of it is computed.
    page_ids: list[int]
    #: To be done before the sequence's first step; none or one of each group of pages.
    moves: list[PageMove]
    #: Leading tokens that are there already, copies included.
    num_cached_tokens: int
    #: Of the other tokens.
    misses: Misses
    #: This and the fields below are the cache's own. `lease.nodes[i]` holds the same tokens as
    #: `page_ids[i]`, but is another page where two sequences computed the same. The pages in
    #: `lease.gap` were dropped.
    lease: Lease
    #: Shared tokens known when it was admitted: it is foreseeable which pages it will enter.
    num_known_tokens: int
    #: Pages that end behind it are never committed: they depend on the view of their sequence, or
    #: it is not to be stored.
    max_shared_tokens: int
    #: Of the queries of the sequence, in these pages.
    view: View = FULL_VIEW
    pending_page: NextPage | None = None
    #: The pages of the same sequence for the windowed layers, where these have pages of their own.
    windowed: Allocation | None = None
    #: The block table with the fewest pages: it bounds the tokens that have a place.
    shortest_page_ids: list[int] = field(init=False)
    #: Whether pages go out of view while the sequence runs.
    drops_pages: bool = field(init=False)

    def __post_init__(self) -> None:
        self.shortest_page_ids = self.page_ids
        self.drops_pages = self.view.window is not None

    def private_pages(self) -> list[int]:
        """List the pages outside the tree: the uncommitted ones and the duplicates."""
        gap = self.lease.gap
        behind = range(gap.stop, len(self.page_ids))
        return self.private_among(range(gap.start)) + self.private_among(behind)

    def private_among(self, indices: range) -> list[int]:
        """List the pages among `indices` that are outside the tree."""
        nodes, part = self.lease.nodes, slice(indices.start, indices.stop)
        pairs = zip(self.page_ids[part], nodes[part], strict=False)
        duplicates = [page_id for page_id, node in pairs if page_id != node.page_id]
        return duplicates + self.page_ids[max(indices.start, len(nodes)) : indices.stop]

    def detach(self, num_pages: int, tree: RadixTree) -> list[int]:
        """Keep so many private pages as a new block table, and hold no page of the tree.

        Returns the other private pages. The old table stays as it is.
        """
        private, held = self.private_pages(), self.lease
        assert len(private) >= num_pages, "too few private pages for a store of its own"
        self.lease = Lease(tree, held.root, [], range(0))
        held.release()
        self.page_ids = self.shortest_page_ids = private[:num_pages]
        self.num_known_tokens = self.max_shared_tokens = 0
        return private[num_pages:]

    def check(self, page_size: int) -> None:
        """Assert that the lease is a path, and the pending page the one behind it."""
        path = [self.lease.root, *self.lease.nodes]
        assert all(b.parent is a for a, b in pairwise(path)), "a lease is not a path"
        num_nodes = len(self.lease.nodes)
        assert num_nodes * page_size <= self.max_shared_tokens, "pages of a view are shared"
        assert num_nodes <= len(self.page_ids), "more pages committed than owned"
        is_foreseeable = (num_nodes + 1) * page_size <= self.num_known_tokens
        assert (self.pending_page is not None) == is_foreseeable, "a pending page is out of place"
        if self.pending_page is not None:
            assert self.pending_page.end is self.lease.end, "a pending page is not at the end"
