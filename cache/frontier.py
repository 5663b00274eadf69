"""Which whole pages of prompts are being computed at this moment.

Knows nothing of who computes them, nor of what anybody does with the answer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from cache.node import Node

#: Where a page will be entered, and its tokens.
Frontier = tuple[Node, bytes]


class Frontiers:
    """For each allocation the one page it will enter into the tree next. O(1) each operation.

    Counted, since the same page may be computed by several side by side.
    """

    def __init__(self) -> None:
        self._owners: Counter[Frontier] = Counter()

    def __len__(self) -> int:
        return len(self._owners)

    def __contains__(self, frontier: Frontier) -> bool:
        return frontier in self._owners

    def add(self, frontier: Frontier) -> None:
        """Say that one more allocation computes this page next."""
        self._owners[frontier] += 1

    def remove(self, frontier: Frontier) -> None:
        """Say that one allocation less does; it said before that it would."""
        self._owners[frontier] -= 1
        if not self._owners[frontier]:
            del self._owners[frontier]

    def check(self, expected: Iterable[Frontier]) -> None:
        """Exactly the frontiers of the live allocations are here."""
        assert self._owners == Counter(expected), "frontiers differ from the live allocations'"
