"""A text that is still being written, and the readers that wait for it.

Readers are generators: a bare `yield` means "I have to see more", so what they find cannot depend
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
    """The text ended where it could still have become what was looked for."""


class MismatchError(Exception):
    """What stands here is not what was looked for."""


class Source:
    """The text behind what has been told, as far as it is known."""

    def __init__(self) -> None:
        self.text = ""
        #: All before it has been told.
        self.pos = 0
        #: Characters before `text`.
        self.num_dropped = 0
        self.is_ended = False

    def drop_reported(self) -> None:
        """Forget what has been told; positions of others in the text are void."""
        self.num_dropped += self.pos
        self.text = self.text[self.pos :]
        self.pos = 0

    def more(self) -> Reading[None]:
        """Wait for more text. Raises `EndedError` if there is none."""
        length = len(self.text)
        while len(self.text) == length:
            if self.is_ended:
                raise EndedError
            yield

    def space(self, at: int) -> Reading[int]:
        """Return the position of the next character that is no space."""
        while True:
            found = _SPACE.match(self.text, at)
            assert found is not None, "no space at all matches too"
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

    def until(self, at: int, *words: str) -> Reading[tuple[int, str]]:
        """Return where the first of `words` from `at` on stands, and which it is."""
        longest, start = max(map(len, words)), at
        while True:
            end, word = first_of(self.text, start, words)
            if word:
                return end, word
            start = max(at, len(self.text) - longest + 1)
            yield from self.more()

    def name(self, at: int) -> Reading[int]:
        """Return where the tool's name at `at` ends. Raises `MismatchError` if there is none."""
        while True:
            found = _IN_NAME.match(self.text, at)
            end = at if found is None else found.end()
            if end - at > _MAX_NAME_CHARS or (end == at and end < len(self.text)):
                raise MismatchError
            if end < len(self.text):
                return end
            yield from self.more()


def first_of(text: str, start: int, words: Sequence[str]) -> tuple[int, str]:
    """Return where the first of `words` from `start` on stands, and which; (0, "") if none does."""
    places = [(text.find(word, start), word) for word in words]
    return min(((at, word) for at, word in places if at >= 0), default=(0, ""))


def num_begun(text: str, start: int, words: Sequence[str]) -> int:
    """Return how many characters at the end of `text`, from `start` on, may become a word."""
    longest = max(map(len, words), default=1) - 1
    for length in range(min(longest, len(text) - start), 0, -1):
        tail = text[-length:]
        if any(word.startswith(tail) for word in words):
            return length
    return 0
