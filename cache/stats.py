"""A snapshot of the cache. Knows nothing of how its numbers come about."""

from __future__ import annotations

from typing import NamedTuple

from cache.pins import PinStats


class CacheStats(NamedTuple):
    """One moment of the cache. Counters (`*_total`) only grow.

    `pages_free + pages_private + pages_cached == pages_total`; leased are those of the cached.
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
