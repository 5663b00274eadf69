"""How many of an output's tokens are reasoning. Knows nothing of responses or of calls."""

from __future__ import annotations

from codecs import utf_8_decode
from collections import deque
from collections.abc import Sequence

from server.text.token_bytes import TokenBytes
from server.tools.output_parser import ThinkTags


class ReasoningCounter:
    """Counts the tokens that begin between the tags of the reasoning.

    It searches the tokens' bytes, so a tag may be one token or many, and batches may end anywhere.
    These are the tokens of the text that `OutputParser` gives as `Reasoning`.
    """

    def __init__(self, pieces: TokenBytes, tags: ThinkTags, *, is_thinking: bool) -> None:
        """`pieces`: bytes as the parser gets them; `is_thinking`: the prompt ended in reasoning."""
        self._bytes_of = pieces.__getitem__
        self._opener = tags.opener.encode()
        self._closers = [closer.encode() for closer in (tags.closer, *tags.other_closers)]
        self._is_thinking = is_thinking
        #: Bytes that may be part of a tag, and how many there were before them.
        self._text = b""
        self._num_before = 0
        #: Where the tokens begin that begin within `_text`.
        self._starts: deque[int] = deque()
        self._is_begun = False
        self._is_over = False
        self._num_tokens = 0

    def count(self, token_ids: Sequence[int], *, is_last: bool) -> int:
        """Read the next tokens; return the number of reasoning tokens so far."""
        if not self._is_over:
            self._read(token_ids)
        if is_last and not self._is_over:
            self._is_over = True
            self._num_tokens += len(self._starts) if self._is_begun or self._is_thinking else 0
        return self._num_tokens

    def _read(self, token_ids: Sequence[int]) -> None:
        for token_id in token_ids:
            self._starts.append(self._num_before + len(self._text))
            self._text += self._bytes_of(token_id)
        if not self._is_begun:
            self._begin()
        if self._is_begun:
            self._read_on()

    def _begin(self) -> None:
        """Find out whether the reasoning begins here, with the opener or behind the prompt's."""
        text, _ = utf_8_decode(self._text, "replace", False)  # noqa: FBT003 - takes no keywords
        begun = text.lstrip().encode()
        num_spaces = len(text.encode()) - len(begun)
        if begun.startswith(self._opener):
            self._drop_to(num_spaces + len(self._opener))
            self._starts = deque(at for at in self._starts if at >= self._num_before)
            self._is_begun = True
        elif not self._opener.startswith(begun):
            self._is_begun = self._is_thinking
            self._is_over = not self._is_thinking

    def _read_on(self) -> None:
        ends = [end for closer in self._closers if (end := self._text.find(closer)) >= 0]
        self._is_over = bool(ends)
        longest = max(map(len, self._closers))
        known = min(ends) if ends else max(0, len(self._text) - longest + 1)
        self._drop_to(known)
        while self._starts and self._starts[0] < self._num_before:
            self._starts.popleft()
            self._num_tokens += 1

    def _drop_to(self, length: int) -> None:
        self._text = self._text[length:]
        self._num_before += length
