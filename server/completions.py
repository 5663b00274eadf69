"""`POST /v1/completions`: how completions look. Knows nothing of how they are generated."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import orjson

from scheduler.client import TokenLogprobs
from server.chat import LOWEST_LOGPROB
from server.chunks import Envelope
from server.context import RequestRecord
from server.generate import Job
from server.output import Piece, TokenAt
from server.service import Service
from server.text.tokenizer import Tokenizer

_TEXT = b'{"index":0,"text":'
_NO_LOGPROBS = b',"logprobs":null,"finish_reason":null}'


class CompletionDialect:
    """One completion's response; see `Dialect`."""

    def __init__(self, service: Service, job: Job, record: RequestRecord) -> None:
        self._tokenizer = service.text.tokenizer
        self._common = {
            "id": f"cmpl-{record.request_id}",
            "object": "text_completion",
            "created": int(service.clock.wall_s()),
            "model": service.model_name,
        }
        self._envelope = Envelope(self._common, has_usage=job.has_usage_chunk)
        self._has_logprobs = job.request.params.logprobs is not None

    def opening(self) -> bytes:
        """See `Dialect`."""
        return b""

    def piece(self, piece: Piece) -> bytes:
        """See `Dialect`."""
        if not self._has_logprobs:
            return self._envelope.text(_TEXT, piece.text, _NO_LOGPROBS)
        logprobs = orjson.dumps(_logprobs(self._tokenizer, piece.tokens))
        after = b',"logprobs":' + logprobs + b',"finish_reason":null}'
        return self._envelope.text(_TEXT, piece.text, after)

    def closing(self, finish_reason: str, told: dict[str, Any]) -> bytes:
        """See `Dialect`."""
        choice = {"index": 0, "text": "", "logprobs": None, "finish_reason": finish_reason}
        return self._envelope.closing(choice, told)

    def answer(self, pieces: Sequence[Piece], told: dict[str, Any]) -> dict[str, Any]:
        """See `Dialect`."""
        tokens = [token for piece in pieces for token in piece.tokens]
        choice = {
            "index": 0,
            "text": "".join(piece.text for piece in pieces),
            "logprobs": _logprobs(self._tokenizer, tokens) if self._has_logprobs else None,
            "finish_reason": pieces[-1].finish_reason,
        }
        return {**self._common, "choices": [choice], **told}


def _logprobs(tokenizer: Tokenizer, tokens: Sequence[TokenAt]) -> dict[str, Any]:
    return {
        "tokens": [tokenizer.token_text(token.logprobs.token_id) for token in tokens],
        "token_logprobs": [max(token.logprobs.logprob, LOWEST_LOGPROB) for token in tokens],
        "top_logprobs": [_top(tokenizer, token.logprobs) for token in tokens],
        "text_offset": [token.start_char for token in tokens],
    }


def _top(tokenizer: Tokenizer, logprobs: TokenLogprobs) -> dict[str, float]:
    """Return the likeliest, and the sampled one in any case."""
    listed = (*logprobs.top, (logprobs.token_id, logprobs.logprob))
    return {
        tokenizer.token_text(token_id): max(logprob, LOWEST_LOGPROB) for token_id, logprob in listed
    }
