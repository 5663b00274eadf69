"""`POST /v1/chat/completions`: how chats look. Knows nothing of how they are generated."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import orjson

from scheduler.client import TokenLogprobs
from server.generation.chunks import Envelope
from server.generation.generate import Job, usage_so_far
from server.generation.output import OutputChunk, TokenAt
from server.generation.prompt_logprobs import LOWEST_LOGPROB, listed
from server.http import sse
from server.http.context import RequestRecord
from server.service import Service
from server.text.tokenizer import Tokenizer

_DELTA = b'{"index":%d,"delta":{"content":'
_NO_LOGPROBS = b'},"logprobs":null,"finish_reason":null}'


class ChatFormat:
    """One choice of a chat's response; see `AnswerFormat`."""

    def __init__(self, service: Service, job: Job, record: RequestRecord, index: int) -> None:
        self._tokenizer = service.text.tokenizer
        self._common = {
            "id": f"chatcmpl-{record.request_id}",
            "object": "chat.completion",
            "created": job.created_s,
            "model": service.model_name,
        }
        chunk = self._common | {"object": "chat.completion.chunk"}
        self._envelope = Envelope(
            chunk, has_usage=job.has_usage_chunk, usage_so_far=usage_so_far(job, record)
        )
        self._index = index
        self._delta = _DELTA % index
        self._has_logprobs = job.has_logprobs
        self._has_token_ids = job.has_token_ids
        self._num_prompt_logprobs = job.num_prompt_logprobs
        # What there is of a chat's prompt stands beside the choices (vLLM's way), once.
        self._beside: dict[str, Any] = {}
        if job.has_token_ids:
            self._beside["prompt_token_ids"] = job.prompts[0]

    def opening(self) -> bytes:
        """See `AnswerFormat`."""
        delta = {"role": "assistant", "content": ""}
        choice = {"index": self._index, "delta": delta, "logprobs": None, "finish_reason": None}
        return self._envelope.choice(choice, {} if self._index else self._beside)

    def chunk(self, chunk: OutputChunk) -> bytes:
        """See `AnswerFormat`."""
        if not self._has_logprobs and not self._has_token_ids:
            return self._envelope.text(self._delta, chunk.text, _NO_LOGPROBS)
        rest = {"logprobs": None, "finish_reason": None, **self._details([chunk])}
        return self._envelope.text(self._delta, chunk.text, b"}," + orjson.dumps(rest)[1:])

    def closing(self, finish_reason: str, told: dict[str, Any]) -> bytes:
        """See `AnswerFormat`."""
        choice = {
            "index": self._index,
            "delta": {},
            "logprobs": None,
            "finish_reason": finish_reason,
        }
        return self._envelope.closing(choice, told)

    def ending(self) -> bytes:
        """See `AnswerFormat`."""
        return sse.DONE

    def choice(self, chunks: Sequence[OutputChunk]) -> dict[str, Any]:
        """See `AnswerFormat`."""
        text = "".join(chunk.text for chunk in chunks)
        self._note_prompt(chunks)
        return {
            "index": self._index,
            "message": {"role": "assistant", "content": text, "refusal": None},
            "logprobs": None,
            "finish_reason": chunks[-1].finish_reason,
            **self._details(chunks),
        }

    def answer(self, choices: list[dict[str, Any]], told: dict[str, Any]) -> dict[str, Any]:
        """See `AnswerFormat`."""
        return {**self._common, "choices": choices, **self._beside, **told}

    def _note_prompt(self, chunks: Sequence[OutputChunk]) -> None:
        if self._num_prompt_logprobs is not None:
            scores = [score for chunk in chunks for score in chunk.prompt_logprobs]
            told = listed(self._tokenizer, scores, self._num_prompt_logprobs)
            self._beside["prompt_logprobs"] = told

    def _details(self, chunks: Sequence[OutputChunk]) -> dict[str, Any]:
        """Return what was asked for of the tokens."""
        details: dict[str, Any] = {}
        if self._has_logprobs:
            tokens = [token for chunk in chunks for token in chunk.tokens]
            details["logprobs"] = _logprobs(self._tokenizer, tokens)
        if self._has_token_ids:
            details["token_ids"] = [token for chunk in chunks for token in chunk.token_ids]
        return details


def _logprobs(tokenizer: Tokenizer, tokens: Iterable[TokenAt]) -> dict[str, Any]:
    content = [logprobs_entry(tokenizer, token.logprobs) for token in tokens]
    return {"content": content, "refusal": None}


def logprobs_entry(tokenizer: Tokenizer, logprobs: TokenLogprobs) -> dict[str, Any]:
    """Return what OpenAI says of one token."""
    sampled = _of_token(tokenizer, logprobs.token_id, logprobs.logprob)
    return {**sampled, "top_logprobs": [_of_token(tokenizer, *top) for top in logprobs.top]}


def _of_token(tokenizer: Tokenizer, token_id: int, logprob: float) -> dict[str, Any]:
    return {
        "token": tokenizer.token_text(token_id),
        "logprob": max(logprob, LOWEST_LOGPROB),
        "bytes": list(tokenizer.token_bytes(token_id)),
    }
