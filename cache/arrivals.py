"""Pages whose contents come from another tier, and the contents that another tier may keep.

Knows nothing of tiers, nor of bytes: the caller writes the pages before the next step reads them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from cache.lease import Lease
from cache.node import NO_PAGE, Node
from cache.pending_pages import NextPage
from cache.radix import RadixTree
from cache.view import FULL_VIEW


class Arrivals:
    """Enters pages into the prefix tree that no sequence computed."""

    def __init__(
        self,
        tree: RadixTree,
        num_available: Callable[[], int],
        take_pages: Callable[[int], list[int]],
    ) -> None:
        self._tree = tree
        self._num_available = num_available
        self._take_pages = take_pages

    def enter(self, tokens: Sequence[int], namespace: str, pages: range) -> list[int]:
        """Enter whole pages of `tokens`, and return the page ids to be written, in their order.

        `NO_PAGE` stands for a page that is cached already. The list ends before the first page
        without room, and is empty where a page before the first is not cached. Other pages may be
        evicted for these, but none of the same prompt.
        """
        tree, path = self._tree, self._path(tokens, namespace, pages.stop)
        if len(path) < pages.start:
            return []
        page_ids = [NO_PAGE] * (len(path) - pages.start)
        lease = Lease(tree, tree.root(namespace), path, range(0))
        for index in range(len(path), pages.stop):
            key, page_id = tree.key(tokens, index), NO_PAGE
            # A page may be there behind one that was evicted.
            if not NextPage(lease.end, key).is_cached:
                if not self._num_available():
                    break
                [page_id] = self._take_pages(1)
            lease.extend(self._node(lease.end, key, page_id))
            page_ids.append(page_id)
        lease.release()
        return page_ids

    def _node(self, parent: Node, key: bytes, page_id: int) -> Node:
        """Return the node of a page, with this page if it has none."""
        node = parent.child(key)
        if node is None:
            return self._tree.insert(parent, key, page_id)
        if page_id != NO_PAGE:
            self._tree.fill(node, page_id)
        return node

    def resident(self, tokens: Sequence[int], namespace: str, num_pages: int) -> list[int]:
        """Return the page ids of the first whole pages of `tokens`, up to one that is not cached.

        Changes nothing.
        """
        return [node.page_id for node in self._path(tokens, namespace, num_pages)]

    def _path(self, tokens: Sequence[int], namespace: str, num_pages: int) -> list[Node]:
        limit = num_pages * self._tree.page_size
        return self._tree.find(tokens, namespace, limit, FULL_VIEW).path
