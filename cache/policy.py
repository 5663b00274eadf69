"""The order of eviction: a sort key, and the queue that keeps its order.

Knows nothing of what eviction does to the tree, nor of pages.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from heapq import heapify, heappop, heappush
from typing import Any, Protocol, TypeAlias

from cache.node import Node


class SupportsLessThan(Protocol):
    """A sort key."""

    def __lt__(self, other: Any, /) -> bool:  # noqa: ANN401 - keys are compared with their like
        """Return whether this one is evicted first."""


#: The node with the smallest key goes first. The key is read when a node becomes evictable, and
#: again when a copy uses it or a pin changes. So it may depend on the node alone, not on the time.
EvictionPolicy: TypeAlias = Callable[[Node], SupportsLessThan]


def lru(node: Node) -> int:
    """Order by last use: exact, since no two evictable nodes were last used together."""
    return node.last_used


class EvictionQueue:
    """The evictable nodes in the policy's order, soft-pinned ones last. O(log n) each operation.

    A heap that skips dead entries. It is rebuilt when more than half of it is dead, so garbage is
    bounded at O(1) amortised cost.
    """

    def __init__(self, policy: EvictionPolicy) -> None:
        self._policy = policy
        # The ticket is unique, so that nodes themselves are never compared.
        self._heap: list[tuple[bool, SupportsLessThan, int, Node]] = []
        self._num_dead = 0
        self._last_ticket = 0

    def push(self, node: Node) -> None:
        """Enter a node, or give it its new place when it is here already."""
        self.discard(node)
        self._last_ticket += 1
        node.ticket = self._last_ticket
        heappush(self._heap, (node.pins > 0, self._policy(node), node.ticket, node))

    def discard(self, node: Node) -> None:
        """Make a node not evictable. Nothing happens to one that is not here."""
        if node.ticket:
            node.ticket = 0
            self._num_dead += 1
            self._trim()

    def pop(self) -> Node:
        """Take out the node to evict. The caller knows that there is one."""
        while True:
            *_, ticket, node = heappop(self._heap)
            if node.ticket == ticket:
                node.ticket = 0
                self._trim()
                return node
            self._num_dead -= 1

    def _trim(self) -> None:
        if 2 * self._num_dead > len(self._heap):
            self._heap = [entry for entry in self._heap if entry[3].ticket == entry[2]]
            heapify(self._heap)
            self._num_dead = 0

    def check(self, evictable: Iterable[Node]) -> None:
        """Assert that exactly the evictable nodes are here, in order, and garbage is bounded."""
        live = {
            node.ticket: (pinned, key)
            for pinned, key, ticket, node in self._heap
            if node.ticket == ticket
        }
        nodes = list(evictable)
        for node in nodes:
            assert node.ticket in live, f"page {node.page_id} is evictable but not in the queue"
            place = (node.pins > 0, self._policy(node))
            assert live[node.ticket] == place, f"page {node.page_id} is queued under an old key"
        assert len(live) == len(nodes), "the queue holds nodes that are not evictable"
        dead = len(self._heap) - len(live)
        assert dead == self._num_dead, f"{dead} dead entries, {self._num_dead} counted"
        assert 2 * dead <= len(self._heap), f"{dead} of {len(self._heap)} entries are dead"
