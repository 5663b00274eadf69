"""`POST /v1/completions`: how completions look. Knows nothing of how they are generated."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import orjson

from scheduler.client import TokenLogprobs
from server import sse
from server.chat import LOWEST_LOGPROB
from server.chunks import Envelope
from server.context import RequestRecord
from server.generate import Job, usage_so_far
from server.output import Piece, TokenAt
from server.service import Service
from server.text.tokenizer import Tokenizer

_TEXT = b'{"index":%d,"text":'
_NO_LOGPROBS = b',"logprobs":null,"finish_reason":null}'


class CompletionDialect:
    """One choice of a completion's response; see `Dialect`."""

    def __init__(self, service: Service, job: Job, record: RequestRecord, index: int) -> None:
        self._tokenizer = service.text.tokenizer
        self._common = {
            "id": f"cmpl-{record.request_id}",
            "object": "text_completion",
            "created": job.created_s,
            "model": service.model_name,
        }
        self._envelope = Envelope(
            self._common, has_usage=job.has_usage_chunk, usage_so_far=usage_so_far(job, record)
        )
        self._index = index
        self._text = _TEXT % index
        self._has_logprobs = job.has_logprobs
        self._has_token_ids = job.has_token_ids
        prompt = index // job.num_choices
        self._echo = job.echoes[prompt] if job.echoes else ""
        self._prompt = {"prompt_token_ids": job.prompts[prompt]} if job.has_token_ids else {}

    def opening(self) -> bytes:
        """See `Dialect`. The prompt, as far as it was asked for."""
        if not self._echo and not self._prompt:
            return b""
        choice = {
            "index": self._index,
            "text": self._echo,
            "logprobs": None,
            "finish_reason": None,
            **self._prompt,
        }
        return self._envelope.choice(choice, {})

    def piece(self, piece: Piece) -> bytes:
        """See `Dialect`."""
        if not self._has_logprobs and not self._has_token_ids:
            return self._envelope.text(self._text, piece.text, _NO_LOGPROBS)
        rest = {"logprobs": None, "finish_reason": None, **self._details([piece])}
        return self._envelope.text(self._text, piece.text, b"," + orjson.dumps(rest)[1:])

    def closing(self, finish_reason: str, told: dict[str, Any]) -> bytes:
        """See `Dialect`."""
        choice = {
            "index": self._index,
            "text": "",
            "logprobs": None,
            "finish_reason": finish_reason,
        }
        return self._envelope.closing(choice, told)

    def ending(self) -> bytes:
        """See `Dialect`."""
        return sse.DONE

    def choice(self, pieces: Sequence[Piece]) -> dict[str, Any]:
        """See `Dialect`."""
        return {
            "index": self._index,
            "text": self._echo + "".join(piece.text for piece in pieces),
            "logprobs": None,
            "finish_reason": pieces[-1].finish_reason,
            **self._prompt,
            **self._details(pieces),
        }

    def answer(self, choices: list[dict[str, Any]], told: dict[str, Any]) -> dict[str, Any]:
        """See `Dialect`."""
        return {**self._common, "choices": choices, **told}

    def _details(self, pieces: Sequence[Piece]) -> dict[str, Any]:
        """Return what was asked for of the tokens."""
        details: dict[str, Any] = {}
        if self._has_logprobs:
            tokens = [token for piece in pieces for token in piece.tokens]
            details["logprobs"] = _logprobs(self._tokenizer, tokens)
        if self._has_token_ids:
            details["token_ids"] = [token for piece in pieces for token in piece.token_ids]
        return details


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
