"""A snapshot of the scheduler. Knows nothing of how its numbers come about."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class SchedulerStats:
    """One moment. Counters (`*_total`) only grow."""

    num_running: int
    num_waiting: int
    num_waiting_tokens: int
    lowest_waiting_priority: int
    prefix_queries_tokens_total: int
    prefix_hits_tokens_total: int
    prompt_tokens_computed_total: int
    preemptions_total: int
    #: Rows that got no token, since what their grammar allows was not known in time.
    late_rows_total: int
    #: Rows that were taken back: their step raised, or their logits were not finite.
    faulty_rows_total: int
    steps_total: int
