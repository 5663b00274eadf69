"""Which tokens would complete a sequence of tokens that a request forbids.

Knows nothing of logits, of slots or of the text that the tokens stand for.
"""

from __future__ import annotations

from collections.abc import Sequence


class BannedSequences:
    """Follows one output, and says which tokens must not come next in it.

    A token costs O(lengths), for as many lengths as the sequences have, not for each sequence.
    """

    def __init__(self, sequences: Sequence[Sequence[int]], output: Sequence[int]) -> None:
        """`output`: what was generated before; the prompt does not count (vLLM's way)."""
        ends: dict[tuple[int, ...], set[int]] = {}
        for *beginning, last in sequences:
            ends.setdefault(tuple(beginning), set()).add(last)
        #: By all but the last token of sequences: their last ones.
        self._ends = ends
        self._lengths = sorted({len(beginning) for beginning in ends})
        self._most_tokens = self._lengths[-1]
        #: The output's end, as long as it may be the beginning of a sequence.
        self._recent: list[int] = []
        self._keep(output)

    def push(self, token_id: int) -> None:
        """Take in the next token."""
        self._keep((token_id,))

    def _keep(self, token_ids: Sequence[int]) -> None:
        self._recent += token_ids
        del self._recent[: max(0, len(self._recent) - self._most_tokens)]

    def next_banned(self) -> set[int]:
        """Return the tokens that would complete a sequence now."""
        recent = self._recent
        found: set[int] = set()
        for length in self._lengths:
            if length > len(recent):
                break
            found |= self._ends.get(tuple(recent[len(recent) - length :]), set())
        return found
