"""A text that still grows, and readers that wait for more of it.

Readers are generators: a bare `yield` means "more text is needed", so their results cannot depend
on how the text was cut into pieces. Knows nothing of any format.
"""

from __future__ import annotations

import re
from collections.abc import Generator, Sequence
from typing import TypeVar

ResultT = TypeVar("ResultT")
Reading = Generator[None, None, ResultT]

#: Names of tools, in requests and in calls.
TOOL_NAME = r"[A-Za-z0-9_.:/\-]{1,128}"

_SPACE = re.compile(r"\s*")
_IN_NAME = re.compile(r"[A-Za-z0-9_.:/\-]*")
_MAX_NAME_CHARS = 128


class EndedError(Exception):
    """The text ended where more of it could still have matched."""


class MismatchError(Exception):
    """The text at this position does not match."""


class Source:
    """The text that is not reported yet, as far as it has arrived."""

    def __init__(self) -> None:
        self.text = ""
        #: All text before it has been reported.
        self.pos = 0
        #: Characters before `text`.
        self.num_dropped = 0
        self.is_ended = False

    def drop_reported(self) -> None:
        """Drop the text that has been reported; positions held elsewhere become void."""
        self.num_dropped += self.pos
        self.text = self.text[self.pos :]
        self.pos = 0

    def more(self) -> Reading[None]:
        """Wait for more text. Raises `EndedError` if none comes."""
        length = len(self.text)
        while len(self.text) == length:
            if self.is_ended:
                raise EndedError
            yield

    def space(self, at: int) -> Reading[int]:
        """Return the position of the next character that is not a space."""
        while True:
            found = _SPACE.match(self.text, at)
            assert found is not None, "the pattern also matches an empty text"
            at = found.end()
            if at < len(self.text):
                return at
            yield from self.more()

    def word(self, at: int, *words: str) -> Reading[str]:
        """Return which of `words` stands at `at`. Raises `MismatchError` if none does."""
        while True:
            for word in words:
                if self.text.startswith(word, at):
                    return word
            rest = self.text[at : at + max(map(len, words))]
            if not any(word.startswith(rest) for word in words):
                raise MismatchError
            yield from self.more()

    def skip(self, at: int, *words: str) -> Reading[tuple[int, str]]:
        """Skip spaces and one of `words`; return the position behind it, and the word."""
        at = yield from self.space(at)
        word = yield from self.word(at, *words)
        return at + len(word), word

    def until(self, at: int, *words: str) -> Reading[tuple[str, int, str]]:
        """Return the text from `at` to the first of `words`, the position behind it, and it."""
        longest, start = max(map(len, words)), at
        while True:
            end, word = _first_of(self.text, start, words)
            if word:
                return self.text[at:end], end + len(word), word
            start = max(at, len(self.text) - longest + 1)
            yield from self.more()

    def name(self, at: int) -> Reading[int]:
        """Return the end of the tool's name at `at`. Raises `MismatchError` if there is none."""
        while True:
            found = _IN_NAME.match(self.text, at)
            end = at if found is None else found.end()
            if end - at > _MAX_NAME_CHARS or (end == at and end < len(self.text)):
                raise MismatchError
            if end < len(self.text):
                return end
            yield from self.more()

    def known_until(self, at: int, words: Sequence[str]) -> tuple[int, str]:
        """Return the end of the text from `at` outside any word, and the word there.

        The word is empty if none is complete; the end of the text may then begin one.
        """
        end, word = _first_of(self.text, at, words)
        if word:
            return end, word
        length = len(self.text)
        longest = min(max(map(len, words), default=1) - 1, length - at)
        tails = (self.text[length - size :] for size in range(longest, 0, -1))
        begun = (tail for tail in tails if any(word.startswith(tail) for word in words))
        return length - len(next(begun, "")), ""


def _first_of(text: str, start: int, words: Sequence[str]) -> tuple[int, str]:
    """Return the position of the first of `words` from `start` on, and the word; else (0, "")."""
    places = [(text.find(word, start), word) for word in words]
    return min(((at, word) for at, word in places if at >= 0), default=(0, ""))
