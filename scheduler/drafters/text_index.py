"""A window over a text of tokens, in which the last tokens of a sequence are looked up.

Works like the window of zlib: a table has the latest place for each hash of the last tokens, and
each place refers to the one before it. Knows nothing of sequences.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from typing import NamedTuple

#: Ends each text of a corpus. No token has this id, so no match and no draft crosses an end.
END = 2**32 - 1

#: Matches are compared over so many tokens; beyond them the latest is as good as the longest.
MAX_MATCH_TOKENS = 32
#: Places of one hash that a look-up compares.
_MAX_PLACES = 8
_FIRST_TOKENS = 256
_NOWHERE = -1


class Match(NamedTuple):
    """A place in a text whose last tokens are those of a sequence."""

    #: Of the token that follows the match, counted from the first token that was ever added.
    position: int
    #: Tokens before `position` that agree.
    num_tokens: int


class TextIndex:
    """The last `max_tokens` tokens of a text: 28 bytes a token, O(1) for each added one."""

    def __init__(
        self, max_tokens: int, min_match_tokens: int, max_match_tokens: int = MAX_MATCH_TOKENS
    ) -> None:
        """`max_tokens` is rounded up to a power of two."""
        assert max_match_tokens >= min_match_tokens >= 1
        self._max_tokens = 1 << (max_tokens - 1).bit_length()
        self._min_match_tokens = min_match_tokens
        self._max_match_tokens = max_match_tokens
        #: Tokens are held from `start` to `end`, as positions.
        self.start = self.end = 0
        self._last = (END,) * (min_match_tokens - 1)
        self._resize(min(_FIRST_TOKENS, self._max_tokens))

    def _resize(self, num_places: int) -> None:
        """Make room for `num_places` tokens, a power of two."""
        held = self.read(0, self.end) if self.end else []
        self._places = num_places - 1
        self._slots = 2 * num_places - 1
        #: By position, the token there, and the place before with the same hash.
        self._tokens = array("I", [0]) * num_places
        self._before = array("q", [_NOWHERE]) * num_places
        #: By hash of the last tokens, the latest place behind them.
        self._latest = array("q", [_NOWHERE]) * (2 * num_places)
        self.end, self._last = 0, (END,) * (self._min_match_tokens - 1)
        self.extend(held)

    def extend(self, token_ids: Iterable[int]) -> None:
        """Add tokens; the oldest are dropped where there are more than `max_tokens`."""
        for token_id in token_ids:
            if self.end - self.start > self._places:
                if self._places + 1 < self._max_tokens:
                    self._resize(2 * (self._places + 1))
                else:
                    self.start += 1
            self._tokens[self.end & self._places] = token_id
            self.end += 1
            last = (*self._last, token_id)
            self._last = last[1:]
            slot = hash(last) & self._slots
            self._before[self.end & self._places] = self._latest[slot]
            self._latest[slot] = self.end

    def read(self, position: int, num_tokens: int) -> list[int]:
        """Return at most `num_tokens` held tokens from a position on, ends included."""
        text, places = self._tokens, self._places
        return [text[p & places] for p in range(position, min(position + num_tokens, self.end))]

    def continuation(self, position: int, max_tokens: int) -> list[int]:
        """Return the tokens from a position on, up to the end of their text."""
        found = self.read(position, max_tokens)
        return found[: found.index(END)] if END in found else found

    def matches(self, token_ids: Sequence[int]) -> list[Match]:
        """Return some places behind the last tokens of `token_ids`, latest first.

        All agree in `min_match_tokens` at least, and a token follows each. The first with
        `max_match_tokens` is the last. O(1).
        """
        found = list[Match]()
        if len(token_ids) < self._min_match_tokens:
            return found
        last = tuple(token_ids[len(token_ids) - self._min_match_tokens :])
        position = self._latest[hash(last) & self._slots]
        for _ in range(_MAX_PLACES):
            if position <= self.start:
                break
            if position < self.end and self._tokens[position & self._places] != END:
                num_tokens = self._num_shared(token_ids, position)
                if num_tokens >= self._min_match_tokens:
                    found.append(Match(position, num_tokens))
                if num_tokens == self._max_match_tokens:
                    break
            position = self._before[position & self._places]
        return found

    def _num_shared(self, token_ids: Sequence[int], position: int) -> int:
        text, places = self._tokens, self._places
        most = min(self._max_match_tokens, len(token_ids), position - self.start)
        for count in range(1, most + 1):
            if text[(position - count) & places] != token_ids[-count]:
                return count - 1
        return most
