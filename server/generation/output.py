"""One request's tokens in, its text out: decoding, stop strings, and which token made which text.

Knows nothing of engines, time or HTTP: the same deltas always give the same text, however they
were split.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from scheduler.client import FinishReason, TokenLogprobs, TokenOutput
from server.text.detokenize import StreamDecoder
from server.text.stop import StopMatcher
from server.text.tokenizer import Tokenizer

FinishWord = Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class OutputOptions:
    """How tokens become text."""

    stops: tuple[str, ...] = ()
    include_stop: bool = False
    skip_special_tokens: bool = True
    #: Tokens that end the output; their own text is shown only with `include_stop`.
    end_token_ids: frozenset[int] = frozenset()
    #: Stop strings are looked for behind this many tokens.
    min_tokens: int = 0
    #: The output goes on where the prompt's text ended.
    continues: bool = False


@dataclass(frozen=True, slots=True)
class TokenAt:
    """A token with requested probabilities, and the place of its text in the output.

    Tokens that make a character together all stand where it does.
    """

    logprobs: TokenLogprobs
    start_char: int
    end_char: int


@dataclass(frozen=True, slots=True)
class OutputChunk:
    """The text that is certain after one more output of the engine."""

    text: str
    #: Tokens whose text is complete with this chunk, if their probabilities were requested.
    tokens: tuple[TokenAt, ...]
    #: The engine's, up to the token that completes a stop string.
    delta: TokenOutput
    finish_reason: FinishWord | None = None
    #: The stop string that ended the output.
    stop_text: str | None = None


def joined(chunks: Sequence[OutputChunk]) -> OutputChunk:
    """Return an output's chunks as one."""
    last = chunks[-1]
    return OutputChunk(
        "".join(chunk.text for chunk in chunks),
        tuple(token for chunk in chunks for token in chunk.tokens),
        TokenOutput(
            token_ids=tuple(i for chunk in chunks for i in chunk.delta.token_ids),
            prompt_logprobs=tuple(p for chunk in chunks for p in chunk.delta.prompt_logprobs),
        ),
        last.finish_reason,
        last.stop_text,
    )


class OutputText:
    """Turns deltas into chunks; nothing in a chunk is ever taken back.

    The token that completes a stop string is the last one counted. Probabilities of a token are
    given out with the last character of its text, so they reveal no text that is held back.
    """

    def __init__(self, tokenizer: Tokenizer, options: OutputOptions) -> None:
        """Raise `ValueError` for stop strings that are not allowed."""
        self._options = options
        self._decoder = StreamDecoder(
            tokenizer, skip_special_tokens=options.skip_special_tokens, continues=options.continues
        )
        self._matcher = StopMatcher(options.stops, include=options.include_stop)
        self._num_tokens = 0
        self._num_decoded_chars = 0
        self._num_sent_chars = 0
        #: Tokens with text that is still held back.
        self._held: deque[TokenAt] = deque()

    def push(self, delta: TokenOutput) -> OutputChunk:
        """Read an output of the engine; the last call returns a chunk with a `finish_reason`."""
        reason = delta.finish_reason
        num_shown = len(delta.token_ids)
        if reason is FinishReason.STOP and not self._options.include_stop:
            num_shown -= not self._options.end_token_ids.isdisjoint(delta.token_ids[-1:])
        stop_text = None
        if not self._options.stops and not delta.logprobs:
            text = self._push_many(delta.token_ids[:num_shown])
        else:
            text, num_read, stop_text = self._push_singly(delta, num_shown)
            if stop_text is not None:
                delta = replace(delta, token_ids=delta.token_ids[:num_read])
        if stop_text is None and reason is not None:
            tail, stop_text = self._finish()
            text += tail
        has_matched = stop_text is not None
        word: FinishWord | None = None
        if has_matched or reason is not None:
            word = "stop" if has_matched or reason is FinishReason.STOP else "length"
        tokens = self._taken(is_last=word is not None, is_cut=has_matched)
        return OutputChunk(text, tokens, delta, word, stop_text)

    def check(self) -> None:
        """Assert that text is neither sent twice nor before it is known."""
        self._decoder.check()
        self._matcher.check()
        assert self._num_sent_chars <= self._num_decoded_chars, "text was sent before it was known"
        ends = [token.end_char for token in self._held]
        assert ends == sorted(ends), "held tokens are out of order"

    def _push_many(self, token_ids: tuple[int, ...]) -> str:
        text = self._decoder.push(token_ids)
        self._num_tokens += len(token_ids)
        self._num_decoded_chars += len(text)
        self._num_sent_chars += len(text)
        return text

    def _push_singly(self, delta: TokenOutput, num_shown: int) -> tuple[str, int, str | None]:
        texts = []
        for index, token_id in enumerate(delta.token_ids[:num_shown]):
            start, was_holding = self._num_decoded_chars, self._decoder.is_holding
            decoded = self._decoder.push((token_id,))
            self._num_decoded_chars += len(decoded)
            logprobs = delta.logprobs[index] if delta.logprobs else None
            if logprobs is not None:
                # U+FFFD for a broken character is the text of the tokens before.
                start += was_holding and decoded.startswith("\ufffd")
                end = self._num_decoded_chars + self._decoder.is_holding
                self._held.append(TokenAt(logprobs, start, end))
            self._num_tokens += 1
            text, stop_text = self._match(decoded)
            texts.append(text)
            if stop_text is not None:
                return "".join(texts), index + 1, stop_text
        return "".join(texts), num_shown, None

    def _match(self, decoded: str) -> tuple[str, str | None]:
        """Return the text that may be sent, and the stop string that ends it."""
        matched = None
        if self._num_tokens > self._options.min_tokens:
            decoded, matched = self._matcher.push(decoded)
        self._num_sent_chars += len(decoded)
        return decoded, matched

    def _finish(self) -> tuple[str, str | None]:
        """Return the text that was held back, at the end of the output."""
        rest = self._decoder.finish()
        self._num_decoded_chars += len(rest)
        text, stop_text = self._match(rest)
        if stop_text is None:
            held = self._matcher.finish()
            self._num_sent_chars += len(held)
            text += held
        return text, stop_text

    def _taken(self, *, is_last: bool = False, is_cut: bool = False) -> tuple[TokenAt, ...]:
        """Take the tokens whose text has been sent; `is_cut`: the rest never will be."""
        taken = []
        while self._held:
            token = self._held[0]
            is_sent = token.end_char <= self._num_sent_chars
            if is_cut:
                # Also a token in whose middle the stop string begins.
                is_sent = is_sent or token.start_char < self._num_sent_chars
            if not is_sent and (is_cut or not is_last):
                break
            taken.append(self._held.popleft())
        return tuple(taken)
