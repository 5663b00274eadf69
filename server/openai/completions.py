"""`POST /v1/completions`: how completions look. Knows nothing of how they are generated."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import orjson

from scheduler.client import TokenLogprobs
from server.generation.chunks import Envelope
from server.generation.generate import Job, usage_so_far
from server.generation.output import OutputChunk, TokenAt
from server.generation.prompt_logprobs import LOWEST_LOGPROB, echoed, listed, top_texts
from server.http import sse
from server.http.context import RequestRecord
from server.service import Service
from server.text.tokenizer import Tokenizer

_TEXT = b'{"index":%d,"text":'
_NO_LOGPROBS = b',"logprobs":null,"finish_reason":null}'


class CompletionFormat:
    """One choice of a completion's response; see `AnswerFormat`."""

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
        self._prompt_ids = job.prompts[prompt]
        self._prompt = {"prompt_token_ids": self._prompt_ids} if job.has_token_ids else {}
        self._skips_special_tokens = job.output.skip_special_tokens
        self._num_logprobs = job.requests[0].params.logprobs or 0
        self._num_prompt_logprobs = job.num_prompt_logprobs
        self._has_scored_echo = bool(job.echoes) and job.has_logprobs
        #: Of a stream: the prompt is told with its first chunk, which knows its probabilities.
        self._is_echo_due = self._has_scored_echo

    def opening(self) -> bytes:
        """See `AnswerFormat`. The prompt, as far as it was asked for."""
        if self._is_echo_due or not (self._echo or self._prompt):
            return b""
        return self._opened(None)

    def chunk(self, chunk: OutputChunk) -> bytes:
        """See `AnswerFormat`."""
        if not self._has_logprobs and not self._has_token_ids:
            return self._envelope.text(self._text, chunk.text, _NO_LOGPROBS)
        before = self._due_echo(chunk.prompt_logprobs)
        if not (chunk.num_tokens or chunk.text or chunk.tokens):
            return before
        rest = {"logprobs": None, "finish_reason": None, **self._details([chunk])}
        return before + self._envelope.text(self._text, chunk.text, b"," + orjson.dumps(rest)[1:])

    def closing(self, finish_reason: str, told: dict[str, Any]) -> bytes:
        """See `AnswerFormat`."""
        choice = {
            "index": self._index,
            "text": "",
            "logprobs": None,
            "finish_reason": finish_reason,
        }
        return self._due_echo(()) + self._envelope.closing(choice, told)

    def ending(self) -> bytes:
        """See `AnswerFormat`."""
        return sse.DONE

    def choice(self, chunks: Sequence[OutputChunk]) -> dict[str, Any]:
        """See `AnswerFormat`."""
        choice = {
            "index": self._index,
            "text": self._echo + "".join(chunk.text for chunk in chunks),
            "logprobs": None,
            "finish_reason": chunks[-1].finish_reason,
            **self._prompt,
            **self._details(chunks),
        }
        scores = [score for chunk in chunks for score in chunk.prompt_logprobs]
        if self._has_scored_echo:
            own = choice["logprobs"]
            echo = self._echoed_logprobs(scores)
            choice["logprobs"] = {name: echo[name] + own[name] for name in own}
        if self._num_prompt_logprobs is not None:
            told = listed(self._tokenizer, scores, self._num_prompt_logprobs)
            choice["prompt_logprobs"] = told
        return choice

    def answer(self, choices: list[dict[str, Any]], told: dict[str, Any]) -> dict[str, Any]:
        """See `AnswerFormat`."""
        return {**self._common, "choices": choices, **told}

    def _due_echo(self, scores: Sequence[TokenLogprobs]) -> bytes:
        if not self._is_echo_due:
            return b""
        self._is_echo_due = False
        return self._opened(self._echoed_logprobs(scores))

    def _opened(self, logprobs: dict[str, Any] | None) -> bytes:
        choice = {
            "index": self._index,
            "text": self._echo,
            "logprobs": logprobs,
            "finish_reason": None,
            **self._prompt,
        }
        return self._envelope.choice(choice, {})

    def _echoed_logprobs(self, scores: Sequence[TokenLogprobs]) -> dict[str, list[Any]]:
        return echoed(
            self._tokenizer,
            self._prompt_ids,
            scores,
            self._num_logprobs,
            skip_special_tokens=self._skips_special_tokens,
        )

    def _details(self, chunks: Sequence[OutputChunk]) -> dict[str, Any]:
        """Return what was asked for of the tokens."""
        details: dict[str, Any] = {}
        if self._has_logprobs:
            tokens = [token for chunk in chunks for token in chunk.tokens]
            first_char = len(self._echo) if self._has_scored_echo else 0
            details["logprobs"] = _logprobs(self._tokenizer, tokens, first_char)
        if self._has_token_ids:
            details["token_ids"] = [token for chunk in chunks for token in chunk.token_ids]
        return details


def _logprobs(
    tokenizer: Tokenizer, tokens: Sequence[TokenAt], first_char: int
) -> dict[str, list[Any]]:
    """`first_char`: where in the choice's text the output begins."""
    scores = [token.logprobs for token in tokens]
    return {
        "tokens": [tokenizer.token_text(score.token_id) for score in scores],
        "token_logprobs": [max(score.logprob, LOWEST_LOGPROB) for score in scores],
        "top_logprobs": [top_texts(tokenizer, score, len(score.top)) for score in scores],
        "text_offset": [first_char + token.start_char for token in tokens],
    }
