"""How much of a sequence's drafts is accepted, from its drafts so far.

Knows nothing of prices or of steps.
"""

from __future__ import annotations

#: Weight of the newest draft, once there were a few.
_NEWEST = 0.2
#: Steps without a draft, where drafts do not pay, before one token of a draft is tried.
TRIAL_STEPS = 16


class Acceptance:
    """The ratio of accepted tokens of one sequence to the number that its drafters foresaw.

    A drafter knows whether a match is long, but not whether this text repeats at all.
    """

    def __init__(self) -> None:
        # As if one token had been foreseen with certainty, and accepted: the drafters' own
        # probabilities hold until drafts were verified.
        self._accepted = 1.0
        self._foreseen = 1.0
        self._num_drafts = 1
        #: Until then no token is tried where drafts do not pay.
        self._num_steps_to_trial = 0

    def of(self, probability: float) -> float:
        """Return the expected acceptance of a token that a drafter gives this probability."""
        return min(1.0, self._accepted / self._foreseen * probability)

    @property
    def is_trial_due(self) -> bool:
        """Whether to verify one token even where it does not seem to pay."""
        return self._num_steps_to_trial == 0

    def wait(self) -> None:
        """Count a step in which no draft would pay."""
        self._num_steps_to_trial = max(0, self._num_steps_to_trial - 1)

    def observe(self, num_tried: int, num_accepted: int, probability: float) -> None:
        """Update the ratio from one draft.

        `num_tried`: the accepted tokens and the first wrong one; those behind it prove nothing.
        """
        self._num_drafts += 1
        weight = max(_NEWEST, 1.0 / self._num_drafts)
        self._accepted += weight * (num_accepted - self._accepted)
        self._foreseen += weight * (num_tried * probability - self._foreseen)
        # A success is followed up at once: the text may have begun to repeat.
        self._num_steps_to_trial = 0 if num_accepted else TRIAL_STEPS - 1
