"""Snapshots of the scheduler and of the engine around it."""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

from cache.stats import CacheStats


class DraftStats(NamedTuple):
    """The drafts of one drafter so far."""

    drafter: str
    offered_tokens_total: int = 0
    accepted_tokens_total: int = 0


class SpeculationStats(NamedTuple):
    """A snapshot of all drafts so far."""

    drafters: tuple[DraftStats, ...] = ()
    #: By place in the draft, from its first token on.
    accepted_by_position: tuple[int, ...] = ()


class DraftCounts:
    """Counts the verified tokens of drafts."""

    def __init__(self) -> None:
        self._offered = Counter[str]()
        self._accepted = Counter[str]()
        self._by_position: list[int] = []

    def add(self, drafter: str, num_offered: int, num_accepted: int) -> None:
        """Count one draft."""
        self._offered[drafter] += num_offered
        self._accepted[drafter] += num_accepted
        missing = num_accepted - len(self._by_position)
        self._by_position += [0] * missing
        for position in range(num_accepted):
            self._by_position[position] += 1

    def snapshot(self) -> SpeculationStats:
        """Return the counts."""
        drafters = tuple(
            DraftStats(name, offered, self._accepted[name])
            for name, offered in self._offered.items()
        )
        return SpeculationStats(drafters, tuple(self._by_position))


class MissStats(NamedTuple):
    """Tokens of prompts that were not reused so far, each prompt counted at its first admission."""

    #: (reason, number of tokens).
    missed_tokens_total: tuple[tuple[str, int], ...] = ()
    #: Tokens whose pages were evicted for lack of room: a larger pool would still have them.
    ghost_tokens_total: int = 0
    #: The time to compute these again, by the measured price of a token.
    ghost_us_total: int = 0


class SchedulerStats(NamedTuple):
    """A snapshot of the scheduler. Counters (`*_total`) only grow within one process."""

    num_running: int = 0
    num_waiting: int = 0
    num_waiting_tokens: int = 0
    #: At least 0. Greater only where a request of priority 0 would displace a waiting one.
    lowest_waiting_priority: int = 0
    prefix_queries_tokens_total: int = 0
    prefix_hits_tokens_total: int = 0
    prompt_tokens_computed_total: int = 0
    preemptions_total: int = 0
    #: Rows without a token, because their grammar's mask was not ready in time.
    late_rows_total: int = 0
    #: Rows taken back, because their step raised or their logits were not finite.
    faulty_rows_total: int = 0
    steps_total: int = 0
    speculation: SpeculationStats = SpeculationStats()
    misses: MissStats = MissStats()


class TierStats(NamedTuple):
    """A snapshot of the disk tier; all zero where there is none."""

    disk_bytes: int = 0
    disk_pages: int = 0
    disk_stored_pages_total: int = 0
    disk_loaded_pages_total: int = 0
    #: Pages on the disk that were computed all the same, since that is faster.
    disk_refused_pages_total: int = 0
    disk_evicted_pages_total: int = 0
    disk_corrupt_pages_total: int = 0
    #: Pages that could not be stored, or were evicted before.
    disk_dropped_pages_total: int = 0
    #: Loads that were given up, since computing would have taken less time by then.
    disk_late_loads_total: int = 0
    disk_load_us_total: int = 0


class EngineStats(NamedTuple):
    """A snapshot of the engine."""

    scheduler: SchedulerStats = SchedulerStats()
    cache: CacheStats = CacheStats()
    #: Requests that wait for their grammar to be compiled, or for pages from the disk.
    num_preparing: int = 0
    tier: TierStats = TierStats()

    @property
    def num_waiting(self) -> int:
        """Requests that wait for a grammar, for pages or in the queue."""
        return self.scheduler.num_waiting + self.num_preparing
