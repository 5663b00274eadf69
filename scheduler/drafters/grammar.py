"""Drafts of the tokens that a grammar forces: keys of a JSON object, the rest of a word.

Knows nothing of grammars: the runner follows them.
"""

from __future__ import annotations

from collections.abc import Callable

from scheduler.drafters.draft import Draft
from scheduler.sequence import Sequence

#: The text is certain. Its tokens are those of a tokenizer, which models mostly choose.
_PROBABILITY = 0.95


class GrammarDrafter:
    """Drafts where the grammar of a sequence leaves no choice."""

    name = "grammar"

    def __init__(self, forced_tokens: Callable[[int], list[int]]) -> None:
        """`forced_tokens`: gives those of a slot, as `ModelRunner` does."""
        self._forced_tokens = forced_tokens

    def propose(self, sequence: Sequence, max_tokens: int) -> Draft | None:
        """See `Drafter`."""
        if sequence.constraint is None:
            return None
        token_ids = self._forced_tokens(sequence.slot)[:max_tokens]
        return Draft(token_ids, _PROBABILITY, self.name) if token_ids else None

    def observe(self, sequence: Sequence, accepted_token_ids: list[int]) -> None:
        """Do nothing: the runner follows the grammar."""

    def forget(self, sequence: Sequence) -> None:
        """Do nothing: nothing is kept."""
