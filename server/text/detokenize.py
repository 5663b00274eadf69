"""Text out of tokens as they arrive. Knows nothing of stop strings or of HTTP."""

from __future__ import annotations

from codecs import utf_8_decode
from collections.abc import Sequence

from server.text.tokenizer import Tokenizer, drop_spaces


class StreamDecoder:
    """One choice's tokens in, its text out, in pieces that never have to be taken back.

    All pieces and `finish()` together are `tokenizer.decode` of all tokens, however they were
    split. A character is given out with its last byte; a sequence of bytes that can no longer
    become one is given out as U+FFFD at once. O(1) a token: at most three bytes are held back.

    `continues`: the text goes on after a prompt, so that a SentencePiece vocabulary's first space
    is a real one, and stays.
    """

    __slots__ = ("_bytes_of", "_held", "_leading_spaces")

    def __init__(
        self, tokenizer: Tokenizer, *, skip_special_tokens: bool, continues: bool = False
    ) -> None:
        self._bytes_of = tokenizer.bytes_by_id(skip_special_tokens=skip_special_tokens).__getitem__
        self._leading_spaces = 0 if continues else tokenizer.leading_spaces
        self._held = b""

    @property
    def is_holding(self) -> bool:
        """Whether a character is begun: the next one given out, or U+FFFD in its place."""
        return bool(self._held)

    def push(self, token_ids: Sequence[int]) -> str:
        """Return the text that became certain with these tokens."""
        data = b"".join(map(self._bytes_of, token_ids))
        if self._leading_spaces:
            kept = drop_spaces(data, self._leading_spaces)
            self._leading_spaces = 0 if kept else self._leading_spaces - len(data)
            data = kept
        if self._held:
            data = self._held + data
        text, num_used = utf_8_decode(data, "replace", False)  # noqa: FBT003 - takes no keywords
        self._held = data[num_used:]
        return text

    def finish(self) -> str:
        """Return the rest: U+FFFD if the tokens ended inside a character, else nothing."""
        held, self._held = self._held, b""
        return held.decode(errors="replace")

    def check(self) -> None:
        """Assert that the bytes held back may still become one character."""
        text, num_used = utf_8_decode(self._held, "strict", False)  # noqa: FBT003 - no keywords
        assert num_used == 0, f"{self._held!r} is held back, but {text!r} is certain"
        assert len(self._held) <= 3, f"{self._held!r} is longer than a broken character"
