"""Memory of pages, asked of the system before a step writes to it.

The first write to a huge page has the system clear it, or make one out of small ones first: up to
milliseconds in the midst of a step, and 60 such pages for 30 layers. In a moment without work the
same costs nobody anything. Knows nothing of what pages hold, and never changes it.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

from torch import Tensor

_MADV_POPULATE_WRITE = 23
#: Touched at a time: a fifth of a millisecond to five.
_PART_BYTES = 2 * 2**20
#: How far ahead of what is in use: some 20,000 tokens of a small model.
AHEAD_BYTES = 512 * 2**20


@dataclass(frozen=True, slots=True)
class ForetouchStats:
    """Pages whose memory was asked for, and the last one in use so far."""

    touched_pages: int
    reached_page: int


class Foretouch:
    """Touches pages in the order of their numbers, which is the order they are first used in."""

    def __init__(self, regions: Tensor, ahead_bytes: int = AHEAD_BYTES) -> None:
        """Take `[regions, pages, ...]` on the CPU, contiguous: a page has a part in each region."""
        self._regions = regions
        self._num_regions, self._num_pages = regions.shape[:2]
        self._part_bytes = regions[0, 0].nbytes
        self._ahead_pages = ahead_bytes // (self._num_regions * self._part_bytes)
        self._block_pages = max(1, _PART_BYTES // self._part_bytes)
        self._reached = -1
        self._touched_pages = 0
        self._next_region = 0
        self._madvise = getattr(ctypes.CDLL(None), "madvise", None)

    def reach(self, page: int) -> None:
        """Say that a page is in use, as those after it soon will be."""
        self._reached = max(self._reached, page)

    def step(self) -> bool:
        """Touch a little; whether there is more to touch."""
        wanted = min(self._num_pages, self._reached + 1 + self._ahead_pages)
        if self._madvise is None or self._touched_pages >= wanted:
            return False
        end = min(self._num_pages, self._touched_pages + self._block_pages)
        if not self._touch(self._next_region, self._touched_pages, end):
            # An older system: pages come as they are written.
            self._madvise = None
            return False
        self._next_region += 1
        if self._next_region == self._num_regions:
            self._next_region, self._touched_pages = 0, end
        return True

    def _touch(self, region: int, begin: int, end: int) -> bool:
        assert self._madvise is not None
        address = self._regions[region, begin].data_ptr()
        aside = address % 4096
        size = (end - begin) * self._part_bytes + aside
        place = ctypes.c_void_p(address - aside), ctypes.c_size_t(size)
        return bool(self._madvise(*place, _MADV_POPULATE_WRITE) == 0)

    def stats(self) -> ForetouchStats:
        """Return a snapshot."""
        return ForetouchStats(self._touched_pages, self._reached)

    def check(self) -> None:
        """Assert that nothing beyond the pages there are was touched."""
        assert self._touched_pages <= self._num_pages, "touched beyond the end"
        assert self._reached < self._num_pages, "reached beyond the end"
