"""Assigns the tokens of an output to its text events. Knows nothing of how either is sent."""

from __future__ import annotations

from collections import deque

from server.generation.output import OutputChunk, TokenAt
from server.tools.events import Content


class TextTokens:
    """Finds the tokens of each text by the positions of both in the output.

    Text may be sent later than its tokens arrive, in part, or not at all (tags, calls, the spaces
    around them). A token belongs to a text that has any of its characters.
    """

    def __init__(self) -> None:
        self._waiting: deque[TokenAt] = deque()
        self._num_chars = 0
        #: The end of the latest text.
        self._end = 0

    def push(self, chunk: OutputChunk) -> None:
        """Take in the next part of the output."""
        self._waiting += chunk.tokens
        self._num_chars += len(chunk.text)

    def of(self, content: Content) -> list[TokenAt]:
        """Return the tokens of this text; drop the tokens before it."""
        start, self._end = content.start_char, content.start_char + len(content.text)
        taken = self._taken_before(self._end)
        return [token for token in taken if token.end_char > start or token.start_char >= start]

    def rest(self) -> list[TokenAt]:
        """Return the remaining tokens of the latest text, which is complete."""
        is_all = self._end == self._num_chars
        return self._taken_before(self._end + is_all)

    def _taken_before(self, end: int) -> list[TokenAt]:
        taken = []
        while self._waiting and self._waiting[0].start_char < end:
            taken.append(self._waiting.popleft())
        return taken
