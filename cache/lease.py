"""A hold on cached pages.

Knows nothing of what the holder does with them.
"""

from __future__ import annotations

from cache.node import Node
from cache.radix import RadixTree


class Lease:
    """Keeps a path of the tree, from its root down, from being evicted. Released exactly once."""

    def __init__(self, tree: RadixTree, root: Node, nodes: list[Node]) -> None:
        self._tree = tree
        self._is_released = False
        self.root = root
        #: The pages held, first page first.
        self.nodes = nodes
        root.leases += 1
        tree.hold(nodes)

    @property
    def end(self) -> Node:
        """The deepest node held: what follows is entered below it."""
        return self.nodes[-1] if self.nodes else self.root

    def extend(self, node: Node) -> None:
        """Hold a child of `end` too."""
        self.nodes.append(node)
        self._tree.hold((node,))

    def release(self) -> None:
        """Let go. Raises `ValueError` the second time."""
        if self._is_released:
            raise ValueError("this lease was released before")
        self._is_released = True
        self._tree.release(self.root, self.nodes)
