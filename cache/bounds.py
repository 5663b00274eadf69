"""How many tokens and pages a sequence of a view needs in a pool.

Knows nothing of which pages are free or cached.
"""

from __future__ import annotations

from dataclasses import dataclass
from sys import maxsize

from cache.view import View


@dataclass(frozen=True, slots=True)
class Bounds:
    """The needs of one sequence, by its view."""

    num_pages: int
    page_size: int
    #: Tokens that a step computes of one sequence, at most.
    chunk_tokens: int

    def pages(self, num_tokens: int) -> int:
        """Return the pages of so many tokens."""
        return -(-num_tokens // self.page_size)

    def max_held_tokens(self, view: View) -> int:
        """Return for how many tokens it needs pages at a time, at most, with whole chunks."""
        return maxsize if view.max_keys is None else view.max_keys + self.chunk_tokens

    def max_tokens(self, view: View) -> int:
        """Return the length of the longest sequence that fits when it is alone."""
        num_read_pages = view.num_pages(self.page_size)
        if num_read_pages is not None and num_read_pages <= self.num_pages:
            return maxsize
        return self.num_pages * self.page_size

    def first_pages(self, view: View, num_tokens: int, num_cached_tokens: int, gap: range) -> int:
        """Return the length of a new block table; `gap`: the pages that are not read."""
        end = view.start(num_cached_tokens) - view.sinks + self.max_held_tokens(view)
        num_pages = self.pages(min(num_tokens, end))
        # Chunks become smaller where there is no room for whole ones.
        max_pages = len(gap) + self.num_pages
        return min(num_pages, max_pages) if self.max_tokens(view) == maxsize else num_pages
