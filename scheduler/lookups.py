"""Counts of the prompts that were looked up in the cache: tokens reused, and missed by reason.

Knows nothing of how prompts are looked up, nor of clocks.
"""

from __future__ import annotations

from collections import Counter

from cache.ghosts import FOR_ROOM
from cache.misses import Misses, MissReason
from scheduler.stats import MissStats


class Lookups:
    """Counts each prompt once, at its first admission."""

    def __init__(self) -> None:
        self.num_queried_tokens = 0
        self.num_reused_tokens = 0
        self._missed_tokens = Counter[str]()
        self._num_ghost_tokens = 0
        self._ghost_s = 0.0

    def add(self, num_tokens: int, misses: Misses, token_s: float | None) -> None:
        """Count a prompt; `token_s`: the time to compute a token of it, if measured."""
        self.num_queried_tokens += num_tokens
        self.num_reused_tokens += misses.num_reused_tokens
        for reason, count in misses.parts:
            self._missed_tokens[reason.value] += count
        if misses.eviction is not None and misses.eviction.cause in FOR_ROOM:
            num_ghost_tokens = misses.num_tokens(MissReason.EVICTED)
            self._num_ghost_tokens += num_ghost_tokens
            self._ghost_s += num_ghost_tokens * (token_s or 0.0)

    def stats(self) -> MissStats:
        """Return the counts of missed tokens."""
        return MissStats(
            missed_tokens_total=tuple(self._missed_tokens.items()),
            ghost_tokens_total=self._num_ghost_tokens,
            ghost_us_total=round(1e6 * self._ghost_s),
        )
