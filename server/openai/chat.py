"""`POST /v1/chat/completions`: the JSON of chats. Knows nothing of how they are generated."""

from __future__ import annotations

import orjson

from server.answer_types import Report, StreamReport
from server.generation.chunks import Envelope
from server.generation.generate import Job, usage_so_far
from server.generation.output import FinishWord, OutputChunk
from server.generation.prompt_logprobs import listed, logprobs_entry
from server.http import sse
from server.http.context import RequestRecord
from server.openai.response_models import (
    ChatChoice,
    ChatChunkChoice,
    ChatCompletion,
    ChatFinishReason,
    ChatLogprobs,
    ChoiceDetails,
    MessageDelta,
    PromptDetails,
)
from server.service import Service

_DELTA = b'{"index":%d,"delta":{"content":'
_NO_LOGPROBS = b'},"logprobs":null,"finish_reason":null}'


class ChatFormat:
    """One choice of a chat's response; see `AnswerFormat`."""

    def __init__(self, service: Service, job: Job, record: RequestRecord, index: int) -> None:
        self._tokenizer = service.text.tokenizer
        self._id = f"chatcmpl-{record.request_id}"
        self._created_s = job.created_s
        self._model = service.model_name
        chunk = {
            "id": self._id,
            "object": "chat.completion.chunk",
            "created": job.created_s,
            "model": service.model_name,
        }
        self._envelope = Envelope(
            chunk, has_usage=job.has_usage_chunk, usage_so_far=usage_so_far(job, record)
        )
        self._index = index
        self._delta = _DELTA % index
        self._has_logprobs = job.has_logprobs
        self._has_token_ids = job.has_token_ids
        self._num_prompt_logprobs = job.num_prompt_logprobs
        # The details of a chat's prompt stand beside the choices (vLLM's way), once.
        self._prompt: PromptDetails = {}
        if job.has_token_ids:
            self._prompt["prompt_token_ids"] = list(job.prompts[0])

    def opening(self) -> bytes:
        """See `AnswerFormat`."""
        choice = self._chunk_choice({"role": "assistant", "content": ""})
        return self._envelope.choice(choice, {} if self._index else self._prompt)

    def chunk(self, chunk: OutputChunk) -> bytes:
        """See `AnswerFormat`."""
        if not self._has_logprobs and not self._has_token_ids:
            return self._envelope.text(self._delta, chunk.text, _NO_LOGPROBS)
        rest = {
            "logprobs": self._logprobs(chunk),
            "finish_reason": None,
            **self._token_ids(chunk),
        }
        return self._envelope.text(self._delta, chunk.text, b"}," + orjson.dumps(rest)[1:])

    def closing(self, finish_reason: FinishWord, report: StreamReport) -> bytes:
        """See `AnswerFormat`."""
        return self._envelope.closing(self._chunk_choice({}, finish_reason), report)

    def ending(self) -> bytes:
        """See `AnswerFormat`."""
        return sse.DONE

    def choice(self, output: OutputChunk) -> ChatChoice:
        """See `AnswerFormat`."""
        assert output.finish_reason is not None, "the output has not ended"
        self._add_prompt_logprobs(output)
        return {
            "index": self._index,
            "message": {"role": "assistant", "content": output.text, "refusal": None},
            "logprobs": self._logprobs(output),
            "finish_reason": output.finish_reason,
            **self._token_ids(output),
        }

    def answer(self, choices: list[ChatChoice], report: Report) -> ChatCompletion:
        """See `AnswerFormat`."""
        return {
            "id": self._id,
            "object": "chat.completion",
            "created": self._created_s,
            "model": self._model,
            "choices": choices,
            **self._prompt,
            **report,
        }

    def _add_prompt_logprobs(self, output: OutputChunk) -> None:
        if self._num_prompt_logprobs is not None:
            self._prompt["prompt_logprobs"] = listed(
                self._tokenizer, output.prompt_logprobs, self._num_prompt_logprobs
            )

    def _chunk_choice(
        self, delta: MessageDelta, finish_reason: ChatFinishReason | None = None
    ) -> ChatChunkChoice:
        return {
            "index": self._index,
            "delta": delta,
            "logprobs": None,
            "finish_reason": finish_reason,
        }

    def _logprobs(self, chunk: OutputChunk) -> ChatLogprobs | None:
        if not self._has_logprobs:
            return None
        entries = [logprobs_entry(self._tokenizer, token.logprobs) for token in chunk.tokens]
        return {"content": entries, "refusal": None}

    def _token_ids(self, chunk: OutputChunk) -> ChoiceDetails:
        return {"token_ids": list(chunk.token_ids)} if self._has_token_ids else {}
