"""A snapshot of the cache. Knows nothing of how its numbers come about."""

from __future__ import annotations

from typing import NamedTuple

from cache.pins import PinStats


class CacheStats(NamedTuple):
    """One moment of the cache. Counters (`*_total`) only grow.

    `pages_free + pages_private + pages_cached == pages_total`; leased are those of the cached.
    Where there are two groups of pages, the numbers are sums, but for pins.
    """

    pages_total: int = 0
    pages_free: int = 0
    pages_private: int = 0
    pages_cached: int = 0
    pages_leased: int = 0
    evicted_pages_total: int = 0
    copied_pages_total: int = 0
    #: Pages committed while the tree had the same: computed side by side, or for a last token.
    duplicate_pages_total: int = 0
    pins: PinStats = PinStats()
    #: The part of the windowed layers, where these have pages of their own.
    windowed: CacheStats | None = None

    @property
    def used_share(self) -> float:
        """Return the share of the pages that sequences hold, 0 to 1: of the fuller group."""
        held = self.pages_private + self.pages_leased
        if self.windowed is None:
            return held / max(1, self.pages_total)
        part = self.windowed
        others = held - part.pages_private - part.pages_leased
        return max(part.used_share, others / max(1, self.pages_total - part.pages_total))
