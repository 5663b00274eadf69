"""One cached page in the prefix tree.

Knows its place, its holders and its recency; knows nothing of how nodes are found or evicted.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, field

#: Of a root, which stands for the empty prefix, and of a husk: a node whose page was evicted, kept
#: while it has children or leases.
NO_PAGE = -1


@dataclass(slots=True, eq=False)
class Node:
    """One whole page of tokens, after the tokens of all its ancestors. Compared by identity."""

    #: Policies may treat tenants differently.
    namespace: str
    #: The page's tokens as big-endian 32-bit numbers, so that bytes sort as the tokens do. An
    #: eighth of the memory of a tuple of ints, and compared by one memcmp.
    key: bytes
    page_id: int
    parent: Node | None
    #: Pages from the root on: 1 for the first page of a prompt.
    depth: int
    #: Names the page with all before it: see `next_chain`.
    chain: int = 0
    #: Sorted, and parallel to `children`. One sorted list answers both "this very page?" and "who
    #: shares the longest head?", and for few children is as fast as a dict.
    keys: list[bytes] = field(default_factory=list)
    children: list[Node] = field(default_factory=list)
    #: Leases on a path through this node; while there are any, the node stays in the tree.
    leases: int = 0
    #: Those of them whose view covers the page; while there are any, the page is not evicted.
    readers: int = 0
    #: Of its soft pins (`cache/pins.py`), 0 without any. Nodes of a lower rank are evicted first.
    pin_rank: int = 0
    #: Whether its last pin ended while the page was cached.
    has_lapsed: bool = False
    #: The tree's logical time of the last use: it advances by one with each use of a page.
    last_used: int = 0
    #: How often the page was used, by the sequence that computed it and by others.
    num_uses: int = 0
    #: Which entry of the eviction queue is this node's; 0 for none.
    ticket: int = 0

    def use(self, now: int) -> None:
        """Count one more use, at a logical time."""
        self.last_used = now
        self.num_uses += 1

    def child(self, key: bytes) -> Node | None:
        """Get the child that holds exactly this page of tokens. O(log children)."""
        position = bisect_left(self.keys, key)
        if position < len(self.keys) and self.keys[position] == key:
            return self.children[position]
        return None

    def add(self, child: Node) -> None:
        """Put a child in its sorted place. Its key is not there yet."""
        position = bisect_left(self.keys, child.key)
        self.keys.insert(position, child.key)
        self.children.insert(position, child)

    def remove(self, child: Node) -> None:
        """Take out a child that is there."""
        position = bisect_left(self.keys, child.key)
        del self.keys[position]
        del self.children[position]
