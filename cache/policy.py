"""The order of eviction: a sort key, and the queue that keeps its order.

Knows nothing of what eviction does to the tree, nor of pages.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from heapq import heapify, heappop, heappush
from math import log2
from typing import Any, Literal, Protocol, TypeAlias, get_args

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


def lfu(node: Node) -> tuple[int, int]:
    """Order by number of uses; of equally many by the last one."""
    return node.num_uses, node.last_used


class CostAware:
    """Order by uses x price of the page, of which half is lost in each half-life without use.

    The price is that of the page's tokens: attention makes deeper ones cost more. All pages have
    equally many bytes. As a logarithm this does not depend on the time of the comparison:
    `log2(uses * price) - age / half-life`, times the half-life, and with the present left out.
    """

    def __init__(self, half_life_uses: float, pages_of_double_price: float) -> None:
        """`half_life_uses`: uses of any pages, which are the tree's clock.

        `pages_of_double_price`: at this depth attention costs as much as all else.
        """
        self._half_life_uses = half_life_uses
        self._pages_of_double_price = pages_of_double_price

    def __call__(self, node: Node) -> float:
        """Return the sort key of a page."""
        price = 1.0 + node.depth / self._pages_of_double_price
        return node.last_used + self._half_life_uses * log2(max(1, node.num_uses) * price)


#: By `bench/eviction.py`: in one half-life as many pages are used as this many pools have.
_POOLS_A_HALF_LIFE = 8
#: Depth in tokens at which attention costs as much as all else, in a model of 8 billion weights. A
#: steeper price would favour the deep pages of documents that are read once.
_TOKENS_OF_DOUBLE_PRICE = 32_768
PolicyName: TypeAlias = Literal["lru", "lfu", "cost"]
POLICIES: tuple[PolicyName, ...] = get_args(PolicyName)


def policy_of(name: PolicyName, num_pages: int, page_size: int) -> EvictionPolicy:
    """Return the policy of that name for a pool."""
    if name == "lru":
        return lru
    if name == "lfu":
        return lfu
    return CostAware(_POOLS_A_HALF_LIFE * num_pages, _TOKENS_OF_DOUBLE_PRICE / page_size)


class EvictionQueue:
    """The evictable nodes by rank of their pins, then by policy. O(log n) each operation.

    A heap that skips dead entries. It is rebuilt when more than half of it is dead, so garbage is
    bounded at O(1) amortised cost.
    """

    def __init__(self, policy: EvictionPolicy) -> None:
        self._policy = policy
        # The ticket is unique, so that nodes themselves are never compared.
        self._heap: list[tuple[int, SupportsLessThan, int, Node]] = []
        self._num_dead = 0
        self._last_ticket = 0

    def push(self, node: Node) -> None:
        """Enter a node, or give it its new place when it is here already."""
        self.discard(node)
        self._last_ticket += 1
        node.ticket = self._last_ticket
        heappush(self._heap, (node.pin_rank, self._policy(node), node.ticket, node))

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
            node.ticket: (rank, key)
            for rank, key, ticket, node in self._heap
            if node.ticket == ticket
        }
        nodes = list(evictable)
        for node in nodes:
            assert node.ticket in live, f"page {node.page_id} is evictable but not in the queue"
            place = (node.pin_rank, self._policy(node))
            assert live[node.ticket] == place, f"page {node.page_id} is queued under an old key"
        assert len(live) == len(nodes), "the queue holds nodes that are not evictable"
        dead = len(self._heap) - len(live)
        assert dead == self._num_dead, f"{dead} dead entries, {self._num_dead} counted"
        assert 2 * dead <= len(self._heap), f"{dead} of {len(self._heap)} entries are dead"
