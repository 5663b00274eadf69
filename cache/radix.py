"""The prefix tree: which cached page goes on which.

One node is one whole page of tokens. Knows nothing of free pages, of sequences or of block tables;
it is told who holds nodes (`hold`, `release`) and names the page to evict (`evict`).
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from itertools import pairwise
from struct import Struct, pack
from typing import NamedTuple

from cache.node import NO_PAGE, Node
from cache.policy import EvictionPolicy, EvictionQueue

TOKEN_BYTES = 4


class Prefix(NamedTuple):
    """What the tree holds of a prompt's beginning."""

    #: None: nothing is known of the namespace.
    root: Node | None
    #: The whole pages, first page first.
    path: list[Node]
    #: A child of the path's end whose first `num_head_tokens` tokens go on as the prompt does.
    source: Node | None
    num_head_tokens: int


class RadixTree:
    """Cached pages by the tokens they hold, a root for each namespace. Token ids are < 2^32."""

    def __init__(self, page_size: int, policy: EvictionPolicy) -> None:
        if page_size < 1:
            raise ValueError(f"page_size must be at least 1, got {page_size}")
        self.page_size = page_size
        #: Pages in the tree, and those of them which a lease covers.
        self.num_pages = 0
        self.num_leased = 0
        self._roots: dict[str, Node] = {}
        self._queue = EvictionQueue(policy)
        self._now = 0
        self._page = Struct(f">{page_size}I")

    @property
    def num_evictable(self) -> int:
        """Pages that `evict` can name one after another.

        No lease covers a node without covering its ancestors, so below an unleased node all is
        unleased, and evicting leaves gets at every unleased page in the end.
        """
        return self.num_pages - self.num_leased

    @property
    def num_namespaces(self) -> int:
        """Namespaces that hold a page or are held by a lease."""
        return len(self._roots)

    # ---- queries ---------------------------------------------------------------------------------

    def key(self, tokens: Sequence[int], page_index: int) -> bytes:
        """Pack one whole page of `tokens` into a node's key. O(page_size)."""
        start = page_index * self.page_size
        return self._page.pack(*tokens[start : start + self.page_size])

    def find(self, tokens: Sequence[int], namespace: str, limit: int) -> Prefix:
        """Find the longest cached beginning of `tokens[:limit]`, token-exact. Changes nothing.

        O(limit) plus O(log children) a page.
        """
        root = self._roots.get(namespace)
        if root is None:
            return Prefix(None, [], None, 0)
        node, path, size, page = root, [], self.page_size, self._page.pack
        for start in range(0, limit - size + 1, size):
            # `Node.child`, written out: a call a page would be a third of the whole search.
            key = page(*tokens[start : start + size])
            position = bisect_left(node.keys, key)
            if position == len(node.keys) or node.keys[position] != key:
                break
            node = node.children[position]
            path.append(node)
        start = len(path) * size
        source, num_head_tokens = _longest_head(node, tokens[start : min(start + size, limit)])
        return Prefix(root, path, source, num_head_tokens)

    def nodes(self) -> Iterator[Node]:
        """Every node that holds a page, parents before children. O(pages): for checks and views."""
        pending = list(self._roots.values())
        while pending:
            node = pending.pop()
            pending.extend(node.children)
            if node.parent is not None:
                yield node

    def roots(self) -> list[Node]:
        """List the roots of all namespaces."""
        return list(self._roots.values())

    # ---- commands --------------------------------------------------------------------------------

    def root(self, namespace: str) -> Node:
        """Get a namespace's root, made if need be; to be held before anything is evicted."""
        root = self._roots.get(namespace)
        if root is None:
            root = self._roots[namespace] = Node(namespace, b"", NO_PAGE, None, 0)
        return root

    def insert(self, parent: Node, key: bytes, page_id: int) -> Node:
        """Enter a page below a held node; to be held before anything is evicted."""
        node = Node(parent.namespace, key, page_id, parent, parent.depth + 1)
        parent.add(node)
        self.num_pages += 1
        return node

    def hold(self, nodes: Sequence[Node]) -> None:
        """Count one more lease on nodes of one downward path, whose ancestors are held."""
        for node in nodes:
            if not node.leases:
                self.num_leased += 1
            node.leases += 1
        if nodes:
            # The others have a child on the path, and so never were in the queue.
            self._queue.discard(nodes[-1])

    def release(self, root: Node, nodes: Sequence[Node]) -> None:
        """Count one lease less on a root and a whole path below it, used until now.

        One moment for the whole path: of one path only the last node can be a leaf, so the tail
        goes first all the same, and no two leaves share a moment.
        """
        self._now += 1
        for node in nodes:
            node.leases -= 1
            node.last_used = self._now
            if not node.leases:
                self.num_leased -= 1
        if nodes:
            self._queue_if_evictable(nodes[-1])
        root.leases -= 1
        self._drop_if_empty(root)

    def touch(self, node: Node) -> None:
        """Make a node the most recently used one."""
        self._now += 1
        node.last_used = self._now
        self._queue_if_evictable(node)

    def pin(self, nodes: Sequence[Node], difference: int) -> None:
        """Count one soft pin more (+1) or less (-1) on nodes; some may be evicted by now."""
        for node in nodes:
            node.pins += difference
            if node.ticket:
                self._queue.push(node)

    def evict(self) -> int:
        """Forget the leaf that goes first, and return its page. The caller knows there is one."""
        node = self._queue.pop()
        self._unlink(node)
        self.num_pages -= 1
        return node.page_id

    def prune(self, path: Sequence[Node]) -> list[int]:
        """Forget what no lease covers of a path, with all below it; return the pages.

        The path is one that the tree still has. O(pages forgotten).
        """
        top = next((node for node in path if not node.leases), None)
        if top is None:
            return []
        pending, page_ids = [top], []
        while pending:
            node = pending.pop()
            self._queue.discard(node)
            page_ids.append(node.page_id)
            pending.extend(node.children)
        self._unlink(top)
        self.num_pages -= len(page_ids)
        return page_ids

    def _unlink(self, node: Node) -> None:
        parent = node.parent
        assert parent is not None, "a root is not a page"
        parent.remove(node)
        if parent.parent is None:
            self._drop_if_empty(parent)
        else:
            self._queue_if_evictable(parent)

    def _queue_if_evictable(self, node: Node) -> None:
        if not node.leases and not node.children:
            self._queue.push(node)

    def _drop_if_empty(self, root: Node) -> None:
        # A client may send a million salts: a namespace lives no longer than its pages.
        if not root.leases and not root.children:
            del self._roots[root.namespace]

    # ---- invariants ------------------------------------------------------------------------------

    def check(self) -> None:
        """Children sorted and linked, counters true, leases and roots consistent, queue exact."""
        nodes = list(self.nodes())
        for node in [*self.roots(), *nodes]:
            self._check_node(node)
        for namespace, root in self._roots.items():
            assert root.leases > 0 or bool(root.children), f"namespace {namespace!r} is empty"
        num_leased = sum(node.leases > 0 for node in nodes)
        assert self.num_pages == len(nodes), f"{len(nodes)} pages, {self.num_pages} counted"
        assert self.num_leased == num_leased, f"{num_leased} leased, {self.num_leased} counted"
        self._queue.check(node for node in nodes if not node.leases and not node.children)

    def _check_node(self, node: Node) -> None:
        name = f"the node of page {node.page_id}"
        keys = [child.key for child in node.children]
        assert node.keys == keys, f"{name}: keys and children differ"
        assert all(a < b for a, b in pairwise(keys)), f"{name}: not sorted"
        covered = sum(child.leases for child in node.children)
        assert node.leases >= covered, f"{name}: its children are leased without it"
        for child in node.children:
            assert child.parent is node, f"{name}: a child knows another parent"
            assert child.depth == node.depth + 1, f"{name}: a child knows another depth"
            assert child.namespace == node.namespace, f"{name}: a child of another namespace"
            num_tokens = len(child.key) // TOKEN_BYTES
            assert num_tokens == self.page_size, f"{name}: a child of {num_tokens} tokens"


def _longest_head(node: Node, head: Sequence[int]) -> tuple[Node | None, int]:
    """Find the child that shares the most leading tokens with `head`; and how many: O(log n).

    In sorted order, the further a key is from the place where `head` belongs, the less of its
    beginning it shares: so one of the two neighbours of that place shares the most.
    """
    probe = pack(f">{len(head)}I", *head)
    position = bisect_left(node.keys, probe)
    best, num_best_tokens = None, 0
    for child in node.children[max(position - 1, 0) : position + 1]:
        num_tokens = _num_shared_bytes(child.key[: len(probe)], probe) // TOKEN_BYTES
        if num_tokens > num_best_tokens:
            best, num_best_tokens = child, num_tokens
    return best, num_best_tokens


def _num_shared_bytes(a: bytes, b: bytes) -> int:
    """Count the leading bytes in which two strings of one length agree, without a Python loop."""
    difference = int.from_bytes(a, "big") ^ int.from_bytes(b, "big")
    return len(a) - (difference.bit_length() + 7) // 8
