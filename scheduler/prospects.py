"""Reasons why waiting sequences were not admitted, kept for as long as they are valid.

A look-up is a search as long as the prefix, and a queue that waits for pages would be searched at
each step. Knows nothing of steps, slots and budgets.
"""

from __future__ import annotations

from cache.kv_cache import KVCache
from cache.pending_pages import NextPage
from scheduler.sequence import Sequence


class Prospects:
    """Searches the cache for waiting sequences, again only where the result may have changed.

    Under a window, and for a sequence that may reuse a limited number of tokens, each result is a
    new search.
    """

    def __init__(self, cache: KVCache) -> None:
        self._cache = cache
        #: The sequence that last lacked pages, and the state of the cache in which it did.
        self._blocked: Sequence | None = None
        self._blocked_page: NextPage | None = None
        self._num_releases = 0

    def is_held_back(self, sequence: Sequence) -> bool:
        """Return whether a running sequence is computing the page that this one needs next."""
        if sequence.max_cached_tokens is not None:
            return False
        if self._cache.is_in_flight(sequence.next_page):
            return True
        if self.is_blocked(sequence):
            return False
        match = self._cache.match(sequence.token_ids, sequence.request.namespace, sequence.own_view)
        sequence.next_page = match.next_page
        return match.in_flight

    def is_blocked(self, sequence: Sequence) -> bool:
        """Return whether a sequence that lacked pages surely lacks them still."""
        return (
            sequence is self._blocked
            and sequence.next_page is self._blocked_page
            and self._num_releases == self._cache.num_releases
            and self._cache.is_still_missing(sequence.next_page)
        )

    def note_blocked(self, sequence: Sequence) -> None:
        """Remember that a sequence lacked pages just now."""
        self._blocked, self._blocked_page = sequence, sequence.next_page
        self._num_releases = self._cache.num_releases

    def check(self, num_running: int) -> None:
        """Assert that a new search for the blocked sequence has the same result."""
        sequence = self._blocked
        if sequence is None or sequence.allocation is not None or not self.is_blocked(sequence):
            return
        tokens, namespace = sequence.token_ids, sequence.request.namespace
        view = sequence.own_view
        is_in_flight = self._cache.match(tokens, namespace, view).in_flight
        assert not is_in_flight, "its next page is in flight"
        allocation = self._cache.admit(tokens, namespace, num_running, view=view)
        assert allocation is None, "there is room for a sequence that counts as blocked"
