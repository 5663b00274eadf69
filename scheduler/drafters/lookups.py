"""Drafts from texts that contain the last tokens of a sequence: n-grams and suffixes."""

from __future__ import annotations

from itertools import cycle, islice
from typing import NamedTuple

from scheduler.drafters.draft import Draft
from scheduler.drafters.text_index import MAX_MATCH_TOKENS, TextIndex
from scheduler.drafters.texts import MAX_OWN_TOKENS, MAX_PAST_TOKENS, OwnTexts, PastOutputs
from scheduler.sequence import Sequence

#: Shorter matches are chance: vLLM's drafts from two tokens break tool calls of small models
#: (vLLM #40875), and cost steps everywhere.
MIN_MATCH_TOKENS = 3
#: Tokens that a suffix drafter proposes for each token that matched.
FACTOR = 2.0


def probability(num_repeated_tokens: int, num_other_tokens: int = 0) -> float:
    """Return the share of tokens that repeat a text, expected after so many that did and did not.

    Laplace's rule of succession.
    """
    return (num_repeated_tokens + 1) / (num_repeated_tokens + num_other_tokens + 2)


class NgramDrafter:
    """Drafts from the sequence's own text, as vLLM's method `ngram` does."""

    name = "ngram"

    def __init__(
        self, lookup_min_tokens: int = MIN_MATCH_TOKENS, lookup_max_tokens: int | None = None
    ) -> None:
        """Set the bounds of a match; the longest one decides. Raises `ValueError`."""
        longest = lookup_max_tokens
        if longest is None:
            longest = max(lookup_min_tokens, MAX_MATCH_TOKENS)
        if lookup_min_tokens < 1:
            raise ValueError(f"prompt_lookup_min must be at least 1, got {lookup_min_tokens}")
        if longest < lookup_min_tokens:
            raise ValueError(
                f"prompt_lookup_max must be at least prompt_lookup_min ({lookup_min_tokens}), "
                f"got {longest}"
            )
        self._own = OwnTexts(lambda: TextIndex(MAX_OWN_TOKENS, lookup_min_tokens, longest))

    def propose(self, sequence: Sequence, max_tokens: int) -> Draft | None:
        """See `Drafter`."""
        own = self._own.index(sequence)
        found = _longest([own], sequence.token_ids)
        if found is None:
            return None
        token_ids = found.read(max_tokens)
        return Draft(token_ids, probability(found.num_tokens), self.name)

    def observe(self, sequence: Sequence, accepted_token_ids: list[int]) -> None:
        """Do nothing: the index is brought up to date when it is read."""

    def forget(self, sequence: Sequence) -> None:
        """See `Drafter`."""
        self._own.forget(sequence)


class SuffixDrafter:
    """Drafts from the sequence's own text and from past outputs of its namespace.

    The longest suffix of the sequence that one of them contains decides (2411.04975).
    """

    name = "suffix"

    def __init__(self, factor: float = FACTOR) -> None:
        """`factor`: tokens of a draft for each matched one, at most."""
        self._factor = factor
        self._own = OwnTexts(lambda: TextIndex(MAX_OWN_TOKENS, MIN_MATCH_TOKENS))
        self._past = PastOutputs(lambda: TextIndex(MAX_PAST_TOKENS, MIN_MATCH_TOKENS))

    def propose(self, sequence: Sequence, max_tokens: int) -> Draft | None:
        """See `Drafter`."""
        own, past = self._own.index(sequence), self._past.index(sequence.request.namespace)
        found = _longest([own] if past is None else [own, past], sequence.token_ids)
        if found is None:
            return None
        token_ids = found.read(min(max_tokens, max(1, int(self._factor * found.num_tokens))))
        return Draft(token_ids, probability(found.num_tokens), self.name)

    def observe(self, sequence: Sequence, accepted_token_ids: list[int]) -> None:
        """Do nothing: the index is brought up to date when it is read."""

    def forget(self, sequence: Sequence) -> None:
        """See `Drafter`. The output becomes one of the past outputs."""
        self._own.forget(sequence)
        self._past.add(sequence)


class _Found(NamedTuple):
    """The place of a match, in the index of one text."""

    text: TextIndex
    position: int
    num_tokens: int
    #: Whether the matched tokens themselves are the end of the text.
    is_own: bool

    def read(self, max_tokens: int) -> list[int]:
        """Return the tokens behind the match. Where they end with the sequence, they repeat."""
        token_ids = self.text.continuation(self.position, max_tokens)
        if self.is_own and len(token_ids) < max_tokens:
            return list(islice(cycle(token_ids), max_tokens))
        return token_ids


def _longest(indexes: list[TextIndex], token_ids: list[int]) -> _Found | None:
    """Find the longest match; of equal ones the first index's latest."""
    found: _Found | None = None
    for index in indexes:
        is_own = index is indexes[0] and index.end == len(token_ids)
        for position, num_tokens in index.matches(token_ids):
            if found is None or num_tokens > found.num_tokens:
                found = _Found(index, position, num_tokens, is_own)
    return found
