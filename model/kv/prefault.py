"""Requests the memory of pages from the system before a step writes to them.

At the first write to a huge page the system clears it: up to milliseconds within a step, for each
of 60 such pages with 30 layers. Without work to do the same delays no request. Knows nothing of the
contents of pages, and never changes them.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable

from torch import Tensor

_MADV_POPULATE_WRITE = 23
#: Touched at a time: a fifth of a millisecond to five.
_PART_BYTES = 2 * 2**20
#: How far ahead of the used pages: some 20,000 tokens of a small model.
AHEAD_BYTES = 512 * 2**20


class Prefault:
    """Populates pages in the order of their ids, which is the order of their first use."""

    def __init__(self, regions: Iterable[Tensor], ahead_bytes: int = AHEAD_BYTES) -> None:
        """Keep `[pages, ...]` tensors on the CPU, contiguous: a page has a part in each of them."""
        self._regions = list(regions)
        self._num_pages = len(self._regions[0])
        page_bytes = [region[0].nbytes for region in self._regions]
        self._ahead_pages = ahead_bytes // sum(page_bytes)
        self._block_pages = max(1, _PART_BYTES // max(page_bytes))
        self._reached = -1
        self.touched_pages = 0
        self._next_region = 0
        self._madvise = getattr(ctypes.CDLL(None), "madvise", None)

    def reach(self, page: int) -> None:
        """Mark a page as used: the pages after it will be used soon."""
        self._reached = max(self._reached, page)

    def step(self) -> bool:
        """Touch some pages; return whether there are more to touch."""
        wanted = min(self._num_pages, self._reached + 1 + self._ahead_pages)
        if self._madvise is None or self.touched_pages >= wanted:
            return False
        end = min(self._num_pages, self.touched_pages + self._block_pages)
        if not self._touch(self._regions[self._next_region][self.touched_pages : end]):
            # An older system: memory is supplied at the first write.
            self._madvise = None
            return False
        self._next_region += 1
        if self._next_region == len(self._regions):
            self._next_region, self.touched_pages = 0, end
        return True

    def _touch(self, pages: Tensor) -> bool:
        assert self._madvise is not None
        address = pages.data_ptr()
        aside = address % 4096
        place = ctypes.c_void_p(address - aside), ctypes.c_size_t(pages.nbytes + aside)
        return bool(self._madvise(*place, _MADV_POPULATE_WRITE) == 0)

    def check(self) -> None:
        """Assert that no page beyond the last was touched."""
        assert self.touched_pages <= self._num_pages, "touched beyond the end"
        assert self._reached < self._num_pages, "reached beyond the end"
