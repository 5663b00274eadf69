"""The explanation of a prompt's reuse, as it goes to the API process: picklable, and with ages.

Knows nothing of how the cache finds it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from cache.misses import Misses, MissReason

#: By which missed tokens are counted.
MISS_REASONS = tuple(reason.value for reason in MissReason if reason is not MissReason.COMPLETE)


@dataclass(frozen=True, slots=True)
class CacheStory:
    """The tokens of a prompt that were reused, and the reasons of the others but the last."""

    reused_tokens: int = 0
    #: (reason: see `cache.MissReason`, number of tokens), in the order of the tokens.
    missed: tuple[tuple[str, int], ...] = ()
    #: The first token that differs from the cached pages.
    diverged_at: int | None = None
    #: Of the first evicted page: see `cache.Cause`. Empty: none.
    eviction_cause: str = ""
    evicted_age_s: float = 0.0

    @property
    def reason(self) -> str:
        """The reason of the first token that was not reused."""
        return self.missed[0][0] if self.missed else "complete"

    def missed_by_reason(self) -> dict[str, int]:
        """Return the number of tokens by reason."""
        counts = Counter[str]()
        for reason, count in self.missed:
            counts[reason] += count
        return dict(counts)


#: Of a prompt that was not looked up.
NO_STORY = CacheStory()


def story_of(misses: Misses, now_s: float) -> CacheStory:
    """Return the explanation; `now_s`: on the clock of the cache."""
    eviction = misses.eviction
    return CacheStory(
        misses.num_reused_tokens,
        tuple((reason.value, count) for reason, count in misses.parts),
        misses.diverged_at,
        "" if eviction is None else eviction.cause.value,
        0.0 if eviction is None else max(0.0, now_s - eviction.at_s),
    )


def summed_story(stories: Sequence[CacheStory]) -> CacheStory:
    """Return the story of several prompts of one request; it has no place of divergence."""
    if len(stories) == 1:
        return stories[0]
    missed = [part for story in stories for part in story.missed]
    evicted = next((story for story in stories if story.eviction_cause), CacheStory())
    return CacheStory(
        sum(story.reused_tokens for story in stories),
        tuple(missed),
        None,
        evicted.eviction_cause,
        evicted.evicted_age_s,
    )
