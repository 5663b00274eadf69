"""Drafts from the prefix tree: the tokens behind a sequence that is cached as far as it is known.

Another sequence of the namespace had the same prompt and began with the same output: an earlier
request, or one that runs at the same time.
"""

from __future__ import annotations

from cache.kv_cache import KVCache
from scheduler.drafters.draft import Draft
from scheduler.sequence import Sequence

#: The whole sequence agrees, from its first token on. Where the outputs of one prompt differ, the
#: path of the last used page is taken.
_PROBABILITY = 0.95
_PROBABILITY_OF_SEVERAL = 0.7


class PrefixDrafter:
    """Drafts from the pages that are cached behind the last one of a sequence."""

    name = "prefix"

    def __init__(self, cache: KVCache) -> None:
        self._cache = cache

    def propose(self, sequence: Sequence, max_tokens: int) -> Draft | None:
        """See `Drafter`."""
        if sequence.allocation is None:
            return None
        found = self._cache.continuation(sequence.allocation, sequence.token_ids, max_tokens)
        if not found.token_ids:
            return None
        probability = _PROBABILITY if found.is_only_one else _PROBABILITY_OF_SEVERAL
        return Draft(found.token_ids, probability, self.name)

    def observe(self, sequence: Sequence, accepted_token_ids: list[int]) -> None:
        """Do nothing: the lease of the sequence stands at its last page."""

    def forget(self, sequence: Sequence) -> None:
        """Do nothing: nothing is kept."""
