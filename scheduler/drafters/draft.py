"""The interface of the scheduler and its drafters.

Knows nothing of steps, of pages or of how a draft is verified. A drafter reads tokens, never a
model. A wrong draft costs time and changes no token.
"""

from __future__ import annotations

from collections.abc import Collection
from itertools import takewhile
from typing import NamedTuple, Protocol

from model.interface import GUESSED_TOKEN
from scheduler.sequence import Sequence


class Draft(NamedTuple):
    """A guess at the next tokens of a sequence."""

    #: The proposed continuation of `sequence.token_ids`, or `GUESSED_TOKEN`s; never empty.
    token_ids: list[int]
    #: Prior that one more token of it is accepted, `0 < probability <= 1`.
    probability: float
    #: A name for metrics: "suffix", "ngram", "prefix", "prediction", "grammar" or "model".
    drafter: str

    @property
    def is_guessed(self) -> bool:
        """Whether a draft model guesses its tokens."""
        return self.token_ids[0] == GUESSED_TOKEN

    def beginning(self, num_tokens: int) -> Draft:
        """Return its first tokens."""
        return self._replace(token_ids=self.token_ids[:num_tokens])

    def usable(self, max_tokens: int, end_ids: Collection[int]) -> Draft | None:
        """Return its tokens before the first of `end_ids`, behind which nothing comes; or None."""
        token_ids = list(takewhile(lambda id_: id_ not in end_ids, self.token_ids[:max_tokens]))
        return self._replace(token_ids=token_ids) if token_ids else None


class Drafter(Protocol):
    """Proposes drafts. All corpora that sequences share are bounded by their namespace."""

    name: str

    def propose(self, sequence: Sequence, max_tokens: int) -> Draft | None:
        """Return at most `max_tokens` tokens that may follow; None without a guess.

        Called while all tokens of the sequence are known.
        """

    def observe(self, sequence: Sequence, accepted_token_ids: list[int]) -> None:
        """Take in the tokens that a step has added, after each such step."""

    def forget(self, sequence: Sequence) -> None:
        """Drop all that is kept for a sequence, which has finished."""
