"""The free pages: a stack of page ids.

Knows nothing of tokens, of the prefix tree, or of the bytes behind a page id.
"""

from __future__ import annotations

from collections.abc import Iterable


class PagePool:
    """Hands out the page ids `0 .. num_pages - 1`, each to one owner at a time.

    The page given back last is handed out first: its bytes are likeliest to be in a CPU's cache.
    """

    def __init__(self, num_pages: int) -> None:
        if num_pages < 1:
            raise ValueError(f"num_pages must be at least 1, got {num_pages}")
        self.num_pages = num_pages
        # Reversed, so that a fresh pool hands out 0, 1, 2, ...: tables a person can read.
        self._free = list(range(num_pages - 1, -1, -1))

    @property
    def num_free(self) -> int:
        """Pages that can be taken now."""
        return len(self._free)

    @property
    def free_ids(self) -> tuple[int, ...]:
        """The free pages, next one last. O(num_pages): for checks and views."""
        return tuple(self._free)

    def take(self, num_pages: int) -> list[int]:
        """Take `num_pages` pages; the caller has checked that there are enough. O(num_pages)."""
        kept = len(self._free) - num_pages
        assert kept >= 0, f"{num_pages} pages taken of {len(self._free)} free ones"
        taken = self._free[kept:]
        del self._free[kept:]
        taken.reverse()
        return taken

    def give_back(self, page_ids: Iterable[int]) -> None:
        """Take pages back. `check` finds a page that is given back twice."""
        self._free.extend(page_ids)

    def check(self) -> None:
        """Assert that each free page is in range and is free once."""
        distinct = set(self._free)
        assert len(distinct) == len(self._free), f"a page is free twice: {sorted(self._free)}"
        strangers = distinct.difference(range(self.num_pages))
        assert not strangers, f"free pages out of range: {sorted(strangers)}"
