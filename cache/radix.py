"""The prefix tree: which cached page goes on which.

One node is one whole page of tokens. Knows nothing of free pages, of sequences or of block tables;
callers count their leases on nodes (`hold`, `release`), and `evict` chooses a page.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from itertools import pairwise
from struct import Struct, pack
from sys import maxsize
from typing import NamedTuple

from cache.ghosts import Cause, Ghosts, first_chain, next_chain
from cache.node import NO_PAGE, Node
from cache.pins import PinEnd, Pins
from cache.policy import EvictionPolicy, EvictionQueue
from cache.view import View

TOKEN_BYTES = 4


class Prefix(NamedTuple):
    """The cached beginning of a prompt."""

    #: None: the namespace has no pages.
    root: Node | None
    #: The whole pages, first page first. Those out of view may be husks.
    path: list[Node]
    #: A child of the path's end whose first `num_head_tokens` tokens go on as the prompt does.
    source: Node | None
    num_head_tokens: int
    #: The nodes of the prompt's whole pages, and the further tokens of a page behind them. They are
    #: more than the above where pages that the prompt would read were evicted.
    known: list[Node]
    num_known_head_tokens: int

    def covering(self, num_tokens: int) -> list[Node]:
        """List the nodes of the first `num_tokens` tokens, whose last may begin with the rest."""
        num_path_tokens = len(self.path) * len(self.path[0].key) // TOKEN_BYTES if self.path else 0
        if self.source is None or self.num_head_tokens < num_tokens - num_path_tokens:
            return self.path
        return [*self.path, self.source]


class RadixTree:
    """Cached pages by the tokens they hold, a root for each namespace. Token ids are < 2^32."""

    def __init__(
        self,
        page_size: int,
        policy: EvictionPolicy,
        *,
        can_share_heads: bool = True,
        evicts_inside: bool = False,
        max_pinned_pages: int = maxsize,
    ) -> None:
        """`can_share_heads`: whether the first tokens of a page can be reused without the rest.

        `evicts_inside`: whether unread pages may go before those behind them. Under a window the
        last pages of a path are worth most, and worthless one without the other.
        """
        if page_size < 1:
            raise ValueError(f"page_size must be at least 1, got {page_size}")
        self.page_size = page_size
        self._can_share_heads = can_share_heads
        self._evicts_inside = evicts_inside
        #: Pages in the tree, and those of them which a lease reads.
        self.num_pages = 0
        self.num_read = 0
        self._num_nodes = 0
        self._roots: dict[str, Node] = {}
        self._queue = EvictionQueue(policy)
        self.pins = Pins(self._queue, max_pinned_pages)
        self._now = 0
        self._page = Struct(f">{page_size}I")
        #: The evicted pages.
        self.ghosts = Ghosts()

    @property
    def num_evictable(self) -> int:
        """Pages that `evict` can name one after another.

        Unread pages on a leased path can be evicted at once. No lease covers a node without its
        ancestors, so below an unleased node all is unleased, and evicting leaves gets at the rest.
        """
        return self.num_pages - self.num_read

    @property
    def num_husks(self) -> int:
        """Nodes without a page."""
        return self._num_nodes - self.num_pages

    # ---- queries ---------------------------------------------------------------------------------

    def num_floor_tokens(self, node: Node, head: Sequence[int]) -> int:
        """Count the first tokens of `head` in a page below a node that need the whole page."""
        return 0 if self._can_share_heads else _longest_head(node, head)[1]

    def key(self, tokens: Sequence[int], page_index: int) -> bytes:
        """Pack one whole page of `tokens` into a node's key. O(page_size)."""
        start = page_index * self.page_size
        return self._page.pack(*tokens[start : start + self.page_size])

    def find(self, tokens: Sequence[int], namespace: str, limit: int, view: View) -> Prefix:
        """Find the longest cached beginning of `tokens[:limit]`, token-exact. Changes nothing.

        All its pages are there that the query behind it reads in this view. O(limit) plus
        O(log children) a page.
        """
        root = self._roots.get(namespace)
        if root is None:
            return Prefix(None, [], None, 0, [], 0)
        node, size, page = root, self.page_size, self._page.pack
        path, husks = list[Node](), list[int]()
        for start in range(0, limit - size + 1, size):
            # `Node.child`, written out: a call a page would be a third of the whole search.
            key = page(*tokens[start : start + size])
            position = bisect_left(node.keys, key)
            if position == len(node.keys) or node.keys[position] != key:
                break
            node = node.children[position]
            if node.page_id == NO_PAGE:
                husks.append(len(path))
            path.append(node)
        start = len(path) * size
        end = min(start + size, limit) if self._can_share_heads else start
        source, num_head_tokens = _longest_head(node, tokens[start:end])
        num_tokens = start + num_head_tokens
        for index in reversed(husks):
            first, end = index * size, (index + 1) * size
            if end <= num_tokens and (first < view.sinks or end > view.start(num_tokens)):
                num_tokens = first
        if num_tokens < start:
            return Prefix(root, path[: num_tokens // size], None, 0, path, num_head_tokens)
        return Prefix(root, path, source, num_head_tokens, path, num_head_tokens)

    def has(self, node: Node) -> bool:
        """Return whether a node, which was in the tree, was not unlinked since. O(1).

        Those below a pruned node were unlinked with it, and still have a parent.
        """
        return node.parent is not None or self._roots.get(node.namespace) is node

    def nodes(self) -> Iterator[Node]:
        """Yield all nodes but the roots, parents before children. O(nodes): for checks."""
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
            root = self._roots[namespace] = Node(
                namespace, b"", NO_PAGE, None, 0, first_chain(namespace)
            )
        return root

    def insert(self, parent: Node, key: bytes, page_id: int) -> Node:
        """Enter a page below a held node; to be held before anything is evicted."""
        chain = next_chain(parent.chain, key)
        node = Node(parent.namespace, key, NO_PAGE, parent, parent.depth + 1, chain)
        parent.add(node)
        self._num_nodes += 1
        self.fill(node, page_id)
        return node

    def fill(self, node: Node, page_id: int) -> None:
        """Give a husk a page; to be held before anything is evicted."""
        node.page_id = page_id
        self.num_pages += 1
        self.ghosts.discard(node.chain)

    def hold(self, read: Sequence[Node], unread: Sequence[Node]) -> None:
        """Count one more lease on nodes of one downward path, of which it reads some.

        Their ancestors are held.
        """
        for node in read:
            self.num_read += not node.readers
            node.leases += 1
            node.readers += 1
            self._queue.discard(node)
        for node in unread:
            node.leases += 1
            self._settle(node)

    def unread(self, nodes: Sequence[Node]) -> None:
        """Count one reader less on nodes, used until now; the leases on them remain."""
        for node in nodes:
            self._now += 1
            node.use(self._now)
            node.readers -= 1
            if not node.readers:
                self.num_read -= 1
                if node.leases or not node.children or self._evicts_inside:
                    self._settle(node)

    def release(self, root: Node, read: Sequence[Node], unread: Sequence[Node]) -> None:
        """Count one lease less on a root and a whole path below it, of which it read some."""
        for node in (root, *read, *unread):
            node.leases -= 1
        self.unread(read)
        for node in (*unread, root):
            self._settle(node)

    def touch(self, node: Node) -> None:
        """Make a node the most recently used one."""
        self._now += 1
        node.use(self._now)
        self._settle(node)

    def evict(self, cause: Cause = Cause.ROOM) -> int:
        """Take away the page that goes first, and return it. The caller knows there is one."""
        node = self._queue.pop()
        if cause is Cause.ROOM and node.has_lapsed and not node.pin_rank:
            cause = Cause.PIN_LAPSED
        self.ghosts.add(node.chain, cause)
        node.has_lapsed = False
        page_id, node.page_id = node.page_id, NO_PAGE
        self.num_pages -= 1
        if node.pin_rank:
            self.pins.end_at(node, PinEnd.EVICTED)
        self._settle(node)
        return page_id

    def prune(self, path: Sequence[Node]) -> list[int]:
        """Forget the unleased nodes of a path and all below them; return their pages.

        Its husks may have left the tree already. O(pages forgotten).
        """
        top = next((node for node in path if not node.leases), None)
        if top is None or top.parent is None:
            return []
        nodes = [top]
        for node in nodes:
            self._queue.discard(node)
            self.pins.end_at(node, PinEnd.EVICTED)
            nodes.extend(node.children)
        evicted = [node for node in nodes if node.page_id != NO_PAGE]
        for node in evicted:
            self.ghosts.add(node.chain, Cause.FAULT)
        page_ids = [node.page_id for node in evicted]
        self._num_nodes -= len(nodes) - 1
        self._unlink(top)
        self.num_pages -= len(page_ids)
        return page_ids

    def _unlink(self, node: Node) -> None:
        parent = node.parent
        assert parent is not None, "a root is not a page"
        parent.remove(node)
        node.parent = None
        self._num_nodes -= 1
        self._settle(parent)

    def _settle(self, node: Node) -> None:
        """Queue a node or not, or take it out of the tree, as its page and its holders want it."""
        if self._is_evictable(node):
            self._queue.push(node)
            return
        self._queue.discard(node)
        if node.page_id == NO_PAGE and not node.leases and not node.children:
            if node.parent is not None:
                self._unlink(node)
            else:
                # A client may send a million salts: a namespace is deleted with its last page.
                self._roots.pop(node.namespace, None)

    def _is_evictable(self, node: Node) -> bool:
        """Return whether a page may go now: unread, and a leaf or out of view of all its leases."""
        if node.page_id == NO_PAGE or node.readers:
            return False
        return node.leases > 0 or not node.children or self._evicts_inside

    # ---- invariants ------------------------------------------------------------------------------

    def check(self) -> None:
        """Assert that links, counters, leases, roots and the queue agree."""
        nodes = list(self.nodes())
        for node in [*self.roots(), *nodes]:
            self._check_node(node)
        pages = [node for node in nodes if node.page_id != NO_PAGE]
        for husk in set(nodes).difference(pages):
            assert not husk.readers, "an evicted page is read"
            assert husk.leases > 0 or bool(husk.children), "a husk was left behind"
        for namespace, root in self._roots.items():
            assert root.leases > 0 or bool(root.children), f"namespace {namespace!r} is empty"
        num_read = sum(node.readers > 0 for node in nodes)
        assert self.num_pages == len(pages), f"{len(pages)} pages, {self.num_pages} counted"
        assert self._num_nodes == len(nodes), f"{len(nodes)} nodes, {self._num_nodes} counted"
        assert self.num_read == num_read, f"{num_read} read, {self.num_read} counted"
        self._queue.check(filter(self._is_evictable, nodes))
        self.pins.check()

    def _check_node(self, node: Node) -> None:
        name = f"the node of page {node.page_id}"
        keys = [child.key for child in node.children]
        assert node.keys == keys, f"{name}: keys and children differ"
        assert all(a < b for a, b in pairwise(keys)), f"{name}: not sorted"
        covered = sum(child.leases for child in node.children)
        assert node.leases >= covered, f"{name}: its children are leased without it"
        assert node.leases >= node.readers, f"{name}: it is read without a lease"
        for child in node.children:
            assert child.parent is node, f"{name}: a child knows another parent"
            assert child.depth == node.depth + 1, f"{name}: a child knows another depth"
            assert child.namespace == node.namespace, f"{name}: a child of another namespace"
            assert child.chain == next_chain(node.chain, child.key), f"{name}: a wrong chain"
            num_tokens = len(child.key) // TOKEN_BYTES
            assert num_tokens == self.page_size, f"{name}: a child of {num_tokens} tokens"


def _longest_head(node: Node, head: Sequence[int]) -> tuple[Node | None, int]:
    """Find the page that shares the most leading tokens with `head`; and how many: O(log n).

    The keys are sorted, so one of the two neighbours of the place where `head` belongs shares the
    longest beginning with it.
    """
    probe = pack(f">{len(head)}I", *head)
    position = bisect_left(node.keys, probe)
    best, num_best_tokens = None, 0
    for child in node.children[max(position - 1, 0) : position + 1]:
        num_tokens = _num_shared_bytes(child.key[: len(probe)], probe) // TOKEN_BYTES
        if num_tokens > num_best_tokens and child.page_id != NO_PAGE:
            best, num_best_tokens = child, num_tokens
    return best, num_best_tokens


def _num_shared_bytes(a: bytes, b: bytes) -> int:
    """Count the leading bytes in which two strings of one length agree, without a Python loop."""
    difference = int.from_bytes(a, "big") ^ int.from_bytes(b, "big")
    return len(a) - (difference.bit_length() + 7) // 8
