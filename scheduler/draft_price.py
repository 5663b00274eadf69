"""The measured price of drafts: the time that a further token adds to a step.

Knows nothing of how drafts are made, nor of clocks.
"""

from __future__ import annotations

#: Weight of the newest step.
_NEWEST = 0.2


class DraftPrice:
    """Running means of the time that drafts of one kind add to a step, and of their tokens.

    Two means, so that long drafts, whose price stands out of the noise, count for more.
    """

    def __init__(self) -> None:
        self._added_s = self._num_tokens = 0.0

    @property
    def token_s(self) -> float | None:
        """The time that a further token adds; None: not measured yet."""
        if self._num_tokens == 0.0:
            return None
        return max(self._added_s / self._num_tokens, 0.0)

    def learn(self, added_s: float, num_tokens: int) -> None:
        """Update the price from a step that took `added_s` longer with so many tokens."""
        weight = _NEWEST if self._num_tokens else 1.0
        self._added_s += weight * (added_s - self._added_s)
        self._num_tokens += weight * (num_tokens - self._num_tokens)

    def forget(self) -> None:
        """Let the price be measured anew."""
        self._added_s = self._num_tokens = 0.0
