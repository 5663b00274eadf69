"""`POST /v1/chat/completions`: how chats look. Knows nothing of how they are generated."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import orjson

from scheduler.client import TokenLogprobs
from server.chunks import Envelope
from server.context import RequestRecord
from server.generate import Job
from server.output import Piece, TokenAt
from server.service import Service
from server.text.tokenizer import Tokenizer

_DELTA = b'{"index":0,"delta":{"content":'
_ROLE = b'{"index":0,"delta":{"role":"assistant","content":'
_NO_LOGPROBS = b'},"logprobs":null,"finish_reason":null}'
#: What OpenAI writes for a probability of 0, which JSON cannot say.
LOWEST_LOGPROB = -9999.0


class ChatDialect:
    """One chat's response; see `Dialect`."""

    def __init__(self, service: Service, job: Job, record: RequestRecord) -> None:
        self._tokenizer = service.text.tokenizer
        self._common = {
            "id": f"chatcmpl-{record.request_id}",
            "object": "chat.completion",
            "created": int(service.clock.wall_s()),
            "model": service.model_name,
        }
        chunk = self._common | {"object": "chat.completion.chunk"}
        self._envelope = Envelope(chunk, has_usage=job.has_usage_chunk)
        self._has_logprobs = job.request.params.logprobs is not None

    def opening(self) -> bytes:
        """See `Dialect`."""
        return self._envelope.text(_ROLE, "", _NO_LOGPROBS)

    def piece(self, piece: Piece) -> bytes:
        """See `Dialect`."""
        if not self._has_logprobs:
            return self._envelope.text(_DELTA, piece.text, _NO_LOGPROBS)
        logprobs = orjson.dumps(_logprobs(self._tokenizer, piece.tokens))
        after = b'},"logprobs":' + logprobs + b',"finish_reason":null}'
        return self._envelope.text(_DELTA, piece.text, after)

    def closing(self, finish_reason: str, told: dict[str, Any]) -> bytes:
        """See `Dialect`."""
        choice = {"index": 0, "delta": {}, "logprobs": None, "finish_reason": finish_reason}
        return self._envelope.closing(choice, told)

    def answer(self, pieces: Sequence[Piece], told: dict[str, Any]) -> dict[str, Any]:
        """See `Dialect`."""
        tokens = [token for piece in pieces for token in piece.tokens]
        text = "".join(piece.text for piece in pieces)
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": text, "refusal": None},
            "logprobs": _logprobs(self._tokenizer, tokens) if self._has_logprobs else None,
            "finish_reason": pieces[-1].finish_reason,
        }
        return {**self._common, "choices": [choice], **told}


def _logprobs(tokenizer: Tokenizer, tokens: Iterable[TokenAt]) -> dict[str, Any]:
    content = [_entry(tokenizer, token.logprobs) for token in tokens]
    return {"content": content, "refusal": None}


def _entry(tokenizer: Tokenizer, logprobs: TokenLogprobs) -> dict[str, Any]:
    sampled = _of_token(tokenizer, logprobs.token_id, logprobs.logprob)
    return {**sampled, "top_logprobs": [_of_token(tokenizer, *top) for top in logprobs.top]}


def _of_token(tokenizer: Tokenizer, token_id: int, logprob: float) -> dict[str, Any]:
    return {
        "token": tokenizer.token_text(token_id),
        "logprob": max(logprob, LOWEST_LOGPROB),
        "bytes": list(tokenizer.token_bytes(token_id)),
    }
