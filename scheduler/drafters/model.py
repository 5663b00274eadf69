"""Drafts of a draft model, whose tokens the runner fills in when it computes the step.

Knows nothing of the model.
"""

from __future__ import annotations

from model.interface import GUESSED_TOKEN
from scheduler.drafters.draft import Draft
from scheduler.sequence import Sequence

#: Before the first draft of a sequence was verified. A model that was made for the purpose reaches
#: about as much.
_PROBABILITY = 0.8


class ModelDrafter:
    """Drafts everywhere, with placeholders for the tokens."""

    name = "model"

    def propose(self, sequence: Sequence, max_tokens: int) -> Draft | None:
        """See `Drafter`."""
        del sequence
        return Draft([GUESSED_TOKEN] * max_tokens, _PROBABILITY, self.name)

    def observe(self, sequence: Sequence, accepted_token_ids: list[int]) -> None:
        """Do nothing: the runner follows the tokens."""

    def forget(self, sequence: Sequence) -> None:
        """Do nothing: nothing is kept."""
