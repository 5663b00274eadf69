"""How the bytes of pages are divided between layers that read all keys and windowed ones.

Free of torch. Knows nothing of which layers these are.
"""

from __future__ import annotations

from dataclasses import dataclass

from cache.view import View


@dataclass(frozen=True, slots=True)
class GroupSizes:
    """The needs of two groups of pages.

    The bytes are divided for sequences of equal length, so that both groups run out together: for
    `max_num_seqs` of them, or for more where these have `max_len_tokens` tokens.
    """

    #: Of a page, in the layers that read all keys and in the windowed ones.
    full_bytes: int
    windowed_bytes: int
    #: The widest of the windowed layers.
    view: View
    page_size: int
    #: Tokens that a step computes, at most.
    chunk_tokens: int
    max_num_seqs: int
    max_len_tokens: int

    @property
    def num_window_pages(self) -> int:
        """Windowed pages of one sequence, beside those of a chunk: one more than it reads."""
        num_read_pages = self.view.num_pages(self.page_size) or 0
        return min(num_read_pages + 1, self._pages(self.max_len_tokens))

    @property
    def num_chunk_pages(self) -> int:
        """Windowed pages of the tokens that a step computes, whatever their sequences."""
        return self._pages(self.chunk_tokens)

    def wanted_bytes(self) -> int:
        """Return the need of all sequences at their longest."""
        num_pages = self.max_num_seqs * self._pages(self.max_len_tokens)
        return num_pages * self.full_bytes + self._capped(num_pages) * self.windowed_bytes

    def split(self, num_bytes: int, stated_len_tokens: int | None) -> tuple[int, int]:
        """Return the pages of both groups in so many bytes.

        A sequence of `stated_len_tokens` gets its pages, if there is room for them at all.
        """
        num_equal = num_bytes // (self.full_bytes + self.windowed_bytes)
        num_pages, num_windowed = num_equal, self._capped(num_equal)
        if num_windowed < num_equal:
            num_pages = (num_bytes - num_windowed * self.windowed_bytes) // self.full_bytes
        longest = self._pages(self.max_len_tokens)
        if num_pages > self.max_num_seqs * longest:
            num_windowed = min(self._windowed_beside_longest(num_bytes), num_equal)
            num_pages = (num_bytes - num_windowed * self.windowed_bytes) // self.full_bytes
        wanted = self._pages(stated_len_tokens or 0)
        least = min(wanted, self.num_window_pages + self.num_chunk_pages)
        left = num_bytes - wanted * self.full_bytes
        if num_pages < wanted and left >= least * self.windowed_bytes:
            return wanted, left // self.windowed_bytes
        return num_pages, num_windowed

    def _windowed_beside_longest(self, num_bytes: int) -> int:
        """Return the windowed pages where all sequences have `max_len_tokens` tokens."""
        each, chunk = self.num_window_pages, self.num_chunk_pages
        longest = self._pages(self.max_len_tokens)
        sequence_bytes = longest * self.full_bytes + each * self.windowed_bytes
        return (num_bytes - chunk * self.windowed_bytes) * each // sequence_bytes + chunk

    def _capped(self, num_pages: int) -> int:
        """Return the windowed pages that `max_num_seqs` sequences with so many pages need."""
        return min(num_pages, self.max_num_seqs * self.num_window_pages + self.num_chunk_pages)

    def _pages(self, num_tokens: int) -> int:
        return -(-num_tokens // self.page_size)
