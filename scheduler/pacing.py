"""How many prompt tokens may ride along while others decode, so that nobody's stream stalls.

A step takes about `decode_s + prompt_tokens * token_s`. Both are learnt from the steps as they are
timed by whoever runs them; this module has no clock. Knows nothing of sequences.

A mixed step cannot tell the two apart, and under steady load there is no other: so once in a while
decodes are given a step to themselves. Without it a cost learnt with one stream open would be
believed when there are sixty, each prompt token would seem dear, and prompts would crawl for ever.
"""

from __future__ import annotations

from dataclasses import dataclass

#: Weight of the newest step in each running mean.
_NEWEST = 0.2
#: One step counts for no more than so many times the mean: the machine may have been asleep.
_OUTLIER = 5.0
#: Before anything was measured, and never less than this: a prompt must get on, too.
_LEAST_CHUNK_TOKENS = 16
#: Mixed steps in a row before one of decodes alone, which is the shortest there is.
_MOST_MIXED_STEPS = 16


@dataclass(frozen=True, slots=True)
class PacingStats:
    """What was learnt so far; None: nothing yet."""

    decode_s: float | None
    token_s: float | None


class Pacing:
    """Bounds a step beside decodes to `max_slowdown` times a step of decodes alone."""

    def __init__(self, max_slowdown: float) -> None:
        self._max_slowdown = max_slowdown
        self._decode_s: float | None = None
        self._token_s: float | None = None
        self._num_mixed_steps = 0

    def prompt_tokens(self, budget_tokens: int, *, num_decodes: int) -> int:
        """Prompt tokens the next step may compute, at most `budget_tokens`."""
        if num_decodes == 0:
            return budget_tokens
        if self._num_mixed_steps >= _MOST_MIXED_STEPS:
            return 0
        if self._decode_s is None or self._token_s is None:
            return min(budget_tokens, _LEAST_CHUNK_TOKENS)
        spare_s = (self._max_slowdown - 1.0) * self._decode_s
        return min(budget_tokens, max(_LEAST_CHUNK_TOKENS, int(spare_s / self._token_s)))

    def observe(self, elapsed_s: float, *, num_decodes: int, num_prompt_tokens: int) -> None:
        """Learn from a step that took `elapsed_s`.

        A mixed step tells one of the two costs once the other is known; of the first it gets, it
        tells the decodes' share if prompts alone have been timed, so that a burst of arrivals does
        not have to wait for a step of decodes alone before its chunks can grow.
        """
        if num_prompt_tokens == 0:
            self._num_mixed_steps = 0
            self._decode_s = _mean(self._decode_s, elapsed_s)
            return
        if num_decodes:
            # Planned before the ones before it were timed, one may come too many.
            self._num_mixed_steps = min(self._num_mixed_steps + 1, _MOST_MIXED_STEPS)
            if self._decode_s is None and self._token_s is not None:
                # None left for the decodes: prompts alone were timed wrongly, or hardly at all.
                rest_s = elapsed_s - num_prompt_tokens * self._token_s
                self._decode_s = rest_s if rest_s > 0.0 else None
                return
        base_s = (self._decode_s or 0.0) if num_decodes else 0.0
        token_s = max(elapsed_s - base_s, 1e-9) / num_prompt_tokens
        self._token_s = _mean(self._token_s, token_s)

    def stats(self) -> PacingStats:
        """Return what was learnt so far."""
        return PacingStats(self._decode_s, self._token_s)

    def check(self) -> None:
        """Assert that what was learnt can be a time."""
        assert self._decode_s is None or self._decode_s > 0.0, "a step took no time"
        assert self._token_s is None or self._token_s > 0.0, "a token took no time"
        assert self._num_mixed_steps <= _MOST_MIXED_STEPS, "decodes had no step of their own"


def _mean(mean: float | None, newest: float) -> float:
    if mean is None:
        return newest
    return mean + _NEWEST * (min(newest, _OUTLIER * mean) - mean)
