"""A hold on cached pages.

Knows nothing of what the holder does with them.
"""

from __future__ import annotations

from cache.node import Node
from cache.radix import RadixTree


class Lease:
    """Keeps a path of the tree, from its root down, and the pages that it reads of the path.

    Those in `gap` are not read, and may be evicted. Released exactly once.
    """

    def __init__(self, tree: RadixTree, root: Node, nodes: list[Node], gap: range) -> None:
        self._tree = tree
        self._is_released = False
        self.root = root
        #: The path held, first page first.
        self.nodes = nodes
        #: Indices of the pages that the holder reads no more; grows at its end.
        self.gap = gap
        root.leases += 1
        tree.hold(self.read, self.unread)

    @property
    def end(self) -> Node:
        """The deepest node held: the next page is entered below it."""
        return self.nodes[-1] if self.nodes else self.root

    def extend(self, node: Node) -> None:
        """Hold a child of `end` too."""
        self.nodes.append(node)
        self._tree.hold([node], [])

    def drop(self, gap: range) -> None:
        """Stop reading the pages between the end of the old gap and that of the new one."""
        dropped = self.nodes[max(self.gap.stop, gap.start) : gap.stop]
        self.gap = gap
        self._tree.unread(dropped)

    def release(self) -> None:
        """Let go. Raises `ValueError` the second time."""
        if self._is_released:
            raise ValueError("this lease was released before")
        self._is_released = True
        self._tree.release(self.root, self.read, self.unread)

    @property
    def read(self) -> list[Node]:
        """The nodes whose pages are read."""
        return self.nodes[: self.gap.start] + self.nodes[self.gap.stop :]

    @property
    def unread(self) -> list[Node]:
        """The nodes whose pages are not read."""
        return self.nodes[self.gap.start : self.gap.stop]
