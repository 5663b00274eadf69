"""When a sequence that keeps a fixed number of keys drops the others, as a function of positions.

Knows nothing of which keys are dropped: the runner chooses them by their scores.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

Fusion: TypeAlias = Literal["sum", "max"]
#: The queries that score: those of the newest tokens (MorphKV), or all so far (H2O).
Scoring: TypeAlias = Literal["window", "all"]

#: Keys that gather between two compactions.
COMPACTION_TOKENS = 64


@dataclass(frozen=True, slots=True)
class Selection:
    """All but `capacity` keys are dropped at compaction points; kept are the newest and the best.

    The first point is the end of the prompt, or `capacity + interval` if that is later; the others
    follow each `interval` tokens. At a point, before the token there is computed, each layer and KV
    head keeps the newest `window` keys, and of the others those of the highest scores. So no query
    of the prompt misses a key, and a step that computes tokens on both sides of a point would
    change them.
    """

    window: int
    capacity: int
    #: How the scores by the queries of the window become one.
    fusion: Fusion = "sum"
    interval: int = COMPACTION_TOKENS
    scoring: Scoring = "window"

    @property
    def max_keys(self) -> int:
        """Return how many keys are stored at most, from the first point on."""
        return self.capacity + self.interval

    def first_point(self, num_prompt: int) -> int:
        """Return the first position before which keys are dropped."""
        return max(num_prompt, self.max_keys)

    def is_reached(self, num_prompt: int, max_len_tokens: int) -> bool:
        """Return whether a text of so many tokens has a point; its newest is not computed."""
        return self.first_point(num_prompt) + 1 < max_len_tokens

    def next_point(self, position: int, num_prompt: int) -> int:
        """Return the first compaction point behind `position`."""
        first = self.first_point(num_prompt)
        if position < first:
            return first
        return position + self.interval - (position - first) % self.interval

    def num_dropped(self, position: int, num_prompt: int) -> int:
        """Return how many keys are gone when the token at `position` is computed."""
        first = self.first_point(num_prompt)
        if position < first:
            return 0
        return position - (position - first) % self.interval - self.capacity

    def max_cached_tokens(self, num_prompt: int) -> int:
        """Return how many tokens may be reused: at the first point the others' queries count."""
        if self.scoring == "all":
            return 0
        return min(num_prompt, self.first_point(num_prompt) - self.window)

    def num_pages(self, num_prompt: int, page_size: int) -> int:
        """Return the pages that are enough from the first token to the last.

        At the first point the prompt's pages may all be shared, and other ones are needed then.
        """
        num_store_pages = -(-self.max_keys // page_size)
        num_first_pages = -(-self.first_point(num_prompt) // page_size)
        return num_first_pages + min(num_prompt // page_size, num_store_pages)
