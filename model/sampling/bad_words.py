"""`bad_words`: the tokens that would complete a forbidden sequence.

Knows nothing of logits, of slots or of text.
"""

from __future__ import annotations

from collections.abc import Sequence


class BannedSequences:
    """The forbidden sequences of one request, followed along its output.

    A token costs O(number of distinct lengths), not O(number of sequences).
    """

    def __init__(self, sequences: Sequence[Sequence[int]], output: Sequence[int]) -> None:
        """`output`: the tokens generated before; the prompt does not count (as in vLLM)."""
        ends: dict[tuple[int, ...], set[int]] = {}
        for *beginning, last in sequences:
            ends.setdefault(tuple(beginning), set()).add(last)
        #: By all tokens but the last: the last tokens.
        self._ends = ends
        self._lengths = sorted({len(beginning) for beginning in ends})
        self._max_tokens = self._lengths[-1]
        #: The output's last tokens, as many as a sequence has before its last.
        self._recent: list[int] = []
        self._keep(output)

    def push(self, token_ids: Sequence[int]) -> None:
        """Append the next tokens of the output."""
        self._keep(token_ids)

    def _keep(self, token_ids: Sequence[int]) -> None:
        self._recent += token_ids
        del self._recent[: max(0, len(self._recent) - self._max_tokens)]

    def next_banned(self, draft: Sequence[int] = ()) -> set[int]:
        """Return the tokens that would complete a sequence behind these further ones."""
        recent = [*self._recent, *draft]
        found: set[int] = set()
        for length in self._lengths:
            if length > len(recent):
                break
            found |= self._ends.get(tuple(recent[len(recent) - length :]), set())
        return found
