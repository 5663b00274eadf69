"""The whole pages of prompts that are being computed at this moment.

Knows nothing of the sequences that compute them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

from cache.node import NO_PAGE, Node


class NextPage(NamedTuple):
    """The whole page that a sequence needs next: the node to enter it below, and its tokens."""

    end: Node
    key: bytes

    @property
    def is_cached(self) -> bool:
        """Whether the page is in the tree by now."""
        child = self.end.child(self.key)
        return child is not None and child.page_id != NO_PAGE


class PendingPages:
    """For each allocation the one page it will enter into the tree next. O(1) each operation.

    Counted, since several allocations may compute the same page.
    """

    def __init__(self) -> None:
        self._owners: Counter[NextPage] = Counter()

    def __len__(self) -> int:
        return len(self._owners)

    def __contains__(self, pending_page: NextPage) -> bool:
        return pending_page in self._owners

    def add(self, pending_page: NextPage) -> None:
        """Count one more allocation that computes this page next."""
        self._owners[pending_page] += 1

    def remove(self, pending_page: NextPage) -> None:
        """Count one allocation less; it was added before."""
        self._owners[pending_page] -= 1
        if not self._owners[pending_page]:
            del self._owners[pending_page]

    def move(self, old: NextPage | None, new: NextPage | None) -> NextPage | None:
        """Let an allocation compute another page next, which is returned; None: no page."""
        if old is not None:
            self.remove(old)
        if new is not None:
            self.add(new)
        return new

    def check(self, expected: Iterable[NextPage]) -> None:
        """Assert that these are exactly the pending pages of the live allocations."""
        assert self._owners == Counter(expected), "pending pages differ from the live allocations'"
