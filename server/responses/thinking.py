"""How many of an output's tokens were reasoning. Knows nothing of how either is told."""

from __future__ import annotations

from collections.abc import Iterable

from server.text.tokenizer import Tokenizer
from server.tools.speech import ThinkTags


class ReasoningTokens:
    """Counts the tokens up to the tag that closes reasoning, the tag's own among them.

    Whether there was reasoning at all is for the reader of the output to say.
    """

    def __init__(self, tokenizer: Tokenizer, tags: ThinkTags) -> None:
        self._tokenizer = tokenizer
        self._closer = tags.closer.encode()
        #: What may be the beginning of the closing tag.
        self._tail = b""
        self._is_open = True
        self.count = 0

    def push(self, token_ids: Iterable[int]) -> int:
        """Count on; return how many of these were reasoning. O(1) a token."""
        num_before = self.count
        for token_id in token_ids if self._is_open else ():
            self.count += 1
            text = self._tail + self._tokenizer.token_bytes(token_id)
            if self._closer in text:
                self._is_open = False
                break
            self._tail = text[-len(self._closer) + 1 :]
        return self.count - num_before
