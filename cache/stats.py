"""A snapshot of the cache. Knows nothing of how its numbers come about."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class CacheStats:
    """One moment of the cache. Counters (`*_total`) only grow.

    `pages_free + pages_private + pages_cached == pages_total`; leased are those of the cached.
    """

    pages_total: int
    pages_free: int
    pages_private: int
    pages_cached: int
    pages_leased: int
    #: Tokens of the prompts admitted, and those of them that were reused.
    query_tokens_total: int
    hit_tokens_total: int
    evicted_pages_total: int
    copied_pages_total: int
    #: Pages committed while the tree had the same: computed side by side, or for a last token.
    duplicate_pages_total: int
