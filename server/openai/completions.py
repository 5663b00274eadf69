"""`POST /v1/completions`: the JSON of completions. Knows nothing of how they are generated."""

from __future__ import annotations

from collections.abc import Sequence

import orjson

from scheduler.client import TokenLogprobs
from server.answer_types import CompletionLogprobs, Report, StreamReport
from server.generation.chunks import Envelope
from server.generation.generate import Job
from server.generation.output import FinishWord, OutputChunk
from server.generation.prompt_logprobs import LOWEST_LOGPROB, echoed, listed, top_texts
from server.http import sse
from server.http.context import RequestRecord
from server.openai.response_models import (
    Completion,
    CompletionChoice,
    CompletionShell,
    PromptDetails,
    TokenIds,
)
from server.service import Service

_TEXT = b'{"index":%d,"text":'
_NO_LOGPROBS = b',"logprobs":null,"finish_reason":null}'


class CompletionFormat:
    """One choice of a completion's response; see `AnswerFormat`."""

    def __init__(self, service: Service, job: Job, record: RequestRecord, index: int) -> None:
        self._tokenizer = service.text.tokenizer
        self._common: CompletionShell = {
            "id": f"cmpl-{record.request_id}",
            "object": "text_completion",
            "created": job.created_s,
            "model": service.model_name,
        }
        self._envelope = Envelope(self._common, job, record)
        self._index = index
        self._text = _TEXT % index
        self._has_logprobs = job.has_logprobs
        self._has_token_ids = job.spec.fields.return_token_ids is True
        prompt = index // job.spec.num_choices
        self._echo = job.echoes[prompt] if job.echoes else ""
        self._prompt_ids = job.prompts[prompt]
        self._prompt: PromptDetails = {}
        if self._has_token_ids:
            self._prompt["prompt_token_ids"] = list(self._prompt_ids)
        self._skips_special_tokens = job.output.skip_special_tokens
        self._num_logprobs = job.requests[0].params.logprobs or 0
        self._num_prompt_logprobs = job.spec.fields.prompt_logprobs
        self._has_scored_echo = bool(job.echoes) and job.has_logprobs
        #: Of a stream: the prompt comes with its first chunk, which has its probabilities.
        self._is_echo_due = self._has_scored_echo

    def opening(self) -> bytes:
        """See `AnswerFormat`: the prompt, as far as requested."""
        if self._is_echo_due or not (self._echo or self._prompt):
            return b""
        return self._opened(None)

    def chunk(self, chunk: OutputChunk) -> bytes:
        """See `AnswerFormat`."""
        if not self._has_logprobs and not self._has_token_ids:
            return self._envelope.text(self._text, chunk.text, _NO_LOGPROBS)
        before = self._due_echo(chunk.delta.prompt_logprobs)
        if not (chunk.delta.token_ids or chunk.text or chunk.tokens):
            return before
        rest = {"logprobs": self._logprobs(chunk), "finish_reason": None, **self._token_ids(chunk)}
        return before + self._envelope.text(self._text, chunk.text, b"," + orjson.dumps(rest)[1:])

    def closing(self, finish_reason: FinishWord, report: StreamReport) -> bytes:
        """See `AnswerFormat`."""
        choice = self._choice("", None, finish_reason)
        return self._due_echo(()) + self._envelope.closing(choice, report)

    def ending(self) -> bytes:
        """See `AnswerFormat`."""
        return sse.DONE

    def choice(self, output: OutputChunk) -> CompletionChoice:
        """See `AnswerFormat`."""
        logprobs = self._logprobs(output)
        if logprobs is not None and self._has_scored_echo:
            logprobs = _concatenated(self._echoed_logprobs(output.delta.prompt_logprobs), logprobs)
        choice: CompletionChoice = {
            **self._choice(self._echo + output.text, logprobs, output.finish_reason),
            **self._prompt,
            **self._token_ids(output),
        }
        if self._num_prompt_logprobs is not None:
            choice["prompt_logprobs"] = listed(
                self._tokenizer, output.delta.prompt_logprobs, self._num_prompt_logprobs
            )
        return choice

    def answer(self, choices: list[CompletionChoice], report: Report) -> Completion:
        """See `AnswerFormat`."""
        return {**self._common, "choices": choices, **report}

    def _due_echo(self, scores: Sequence[TokenLogprobs]) -> bytes:
        if not self._is_echo_due:
            return b""
        self._is_echo_due = False
        return self._opened(self._echoed_logprobs(scores))

    def _opened(self, logprobs: CompletionLogprobs | None) -> bytes:
        return self._envelope.choice({**self._choice(self._echo, logprobs), **self._prompt}, {})

    def _choice(
        self,
        text: str,
        logprobs: CompletionLogprobs | None,
        finish_reason: FinishWord | None = None,
    ) -> CompletionChoice:
        return {
            "index": self._index,
            "text": text,
            "logprobs": logprobs,
            "finish_reason": finish_reason,
        }

    def _echoed_logprobs(self, scores: Sequence[TokenLogprobs]) -> CompletionLogprobs:
        return echoed(
            self._tokenizer,
            self._prompt_ids,
            scores,
            self._num_logprobs,
            skip_special_tokens=self._skips_special_tokens,
        )

    def _logprobs(self, chunk: OutputChunk) -> CompletionLogprobs | None:
        if not self._has_logprobs:
            return None
        tokenizer = self._tokenizer
        # Offsets count from the beginning of the choice's text.
        first_char = len(self._echo) if self._has_scored_echo else 0
        scores = [token.logprobs for token in chunk.tokens]
        return {
            "tokens": [tokenizer.token_text(score.token_id) for score in scores],
            "token_logprobs": [max(score.logprob, LOWEST_LOGPROB) for score in scores],
            "top_logprobs": [top_texts(tokenizer, score, len(score.top)) for score in scores],
            "text_offset": [first_char + token.start_char for token in chunk.tokens],
        }

    def _token_ids(self, chunk: OutputChunk) -> TokenIds:
        return {"token_ids": list(chunk.delta.token_ids)} if self._has_token_ids else {}


def _concatenated(first: CompletionLogprobs, then: CompletionLogprobs) -> CompletionLogprobs:
    return {
        "tokens": first["tokens"] + then["tokens"],
        "token_logprobs": first["token_logprobs"] + then["token_logprobs"],
        "top_logprobs": first["top_logprobs"] + then["top_logprobs"],
        "text_offset": first["text_offset"] + then["text_offset"],
    }
