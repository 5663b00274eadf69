"""The check that each page of a pool is in exactly one place, and that the tree's counts are true.

Knows nothing of how pages come to their places.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from cache.allocation import Allocation
from cache.node import NO_PAGE
from cache.pages import PagePool
from cache.radix import RadixTree


def check_placement(pool: PagePool, tree: RadixTree, live: Sequence[Allocation]) -> None:
    """Assert it, for a pool of which these allocations and the tree have pages. O(pages)."""
    pool.check()
    tree.check()
    nodes = list(tree.nodes())
    private = [page_id for allocation in live for page_id in allocation.private_pages()]
    cached = [node.page_id for node in nodes if node.page_id != NO_PAGE]
    places = sorted([*pool.free_ids, *private, *cached])
    assert places == list(range(pool.num_pages)), (
        f"not every page is in exactly one place: free {pool.free_ids}, "
        f"private {private}, cached {cached}"
    )
    leases = Counter(node for allocation in live for node in allocation.lease.nodes)
    assert leases == {n: n.leases for n in nodes if n.leases}, "leases differ from the counts"
    readers = Counter(node for allocation in live for node in allocation.lease.read)
    assert readers == {n: n.readers for n in nodes if n.readers}, "readers differ"
    leases = Counter(allocation.lease.root for allocation in live)
    held = {root: root.leases for root in tree.roots() if root.leases}
    assert leases == held, "leases differ from the roots' counts"
