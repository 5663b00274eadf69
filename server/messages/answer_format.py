"""`POST /v1/messages`: how Anthropic's messages look. Knows nothing of how they are generated."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import orjson

from server.generation.generate import Job
from server.generation.output import OutputChunk
from server.http.context import RequestRecord
from server.http.errors import ApiError
from server.messages.blocks import Blocks, Payload, summed
from server.messages.schemas import MessagesRequest
from server.openai.chat_choice import call_id
from server.service import Service

#: Anthropic's `error.type` of each status we answer with; any other below 500 is a wrong request.
ERROR_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    500: "api_error",
    503: "overloaded_error",
}


class MessagesErrors:
    """See `ErrorForm`: Anthropic's, with OpenAI's `param` and `code` beside."""

    def body(self, error: ApiError) -> bytes:
        """See `ErrorForm`."""
        told = {
            "message": error.message,
            "type": ERROR_TYPES.get(error.status, "invalid_request_error"),
            "param": error.param,
            "code": error.code,
        }
        return orjson.dumps({"type": "error", "error": told, "request_id": error.request_id})

    def stream_end(self, error: ApiError) -> bytes:
        """See `ErrorForm`."""
        return b"event: error\ndata: " + self.body(error) + b"\n\n"


class MessagesFormat:
    """The one answer to a request; see `AnswerFormat`."""

    def __init__(
        self, service: Service, job: Job, record: RequestRecord, asked: MessagesRequest
    ) -> None:
        syntax = None if job.parser_options is None else job.parser_options.syntax
        calls = None if syntax is None else syntax.calls
        num_id_chars = None if calls is None else calls.id_chars
        self._blocks = Blocks(
            job.parser_options,
            lambda: call_id(service.chance, num_id_chars, "toolu_"),
            shows_thinking=asked.thinking is None or asked.thinking.display != "omitted",
        )
        self._record = record
        self._page_size = service.client.info.page_size
        self._is_cut = asked.max_tokens > job.requests[0].params.max_tokens
        self._common = {
            "id": f"msg_{record.request_id}",
            "type": "message",
            "role": "assistant",
            "model": service.model_name,
        }

    def opening(self) -> bytes:
        """See `AnswerFormat`."""
        none_yet: dict[str, Any] = {"content": [], "stop_reason": None, "stop_sequence": None}
        message = {**self._common, **none_yet, "usage": self._usage()}
        return _events([{"type": "message_start", "message": message}, {"type": "ping"}])

    def chunk(self, chunk: OutputChunk) -> bytes:
        """See `AnswerFormat`."""
        return _events(self._blocks.push(chunk.text))

    def closing(self, finish_reason: str, told: dict[str, Any]) -> bytes:
        """See `AnswerFormat`."""
        rest = self._blocks.finish()
        end = {"delta": self._end(finish_reason), "usage": self._usage()}
        return _events([*rest, {"type": "message_delta", **end, "octavo": self._octavo(told)}])

    def ending(self) -> bytes:
        """See `AnswerFormat`."""
        return _events([{"type": "message_stop"}])

    def choice(self, chunks: Sequence[OutputChunk]) -> dict[str, Any]:
        """See `AnswerFormat`."""
        told = self._blocks.push("".join(chunk.text for chunk in chunks))
        content = summed(told + self._blocks.finish())
        return {"content": content, **self._end(chunks[-1].finish_reason)}

    def answer(self, choices: list[dict[str, Any]], told: dict[str, Any]) -> dict[str, Any]:
        """See `AnswerFormat`."""
        [choice] = choices
        return {**self._common, **choice, "usage": self._usage(), "octavo": self._octavo(told)}

    def _end(self, finish_reason: str | None) -> dict[str, Any]:
        stop_text = self._record.stop_text
        if finish_reason == "length":
            reason = "model_context_window_exceeded" if self._is_cut else "max_tokens"
        elif stop_text is not None:
            reason = "stop_sequence"
        else:
            reason = "tool_use" if self._blocks.num_calls else "end_turn"
        return {"stop_reason": reason, "stop_sequence": stop_text}

    def _usage(self) -> dict[str, Any]:
        """Return Anthropic's `usage`: its three kinds of input tokens are the prompt together.

        Whole pages enter the cache as soon as they are computed. So of what was not read from it,
        all but the tokens in the last, partly filled page is what this request put there.
        """
        record = self._record
        in_whole_pages = record.prompt_tokens // self._page_size * self._page_size
        created = max(0, in_whole_pages - record.cached_tokens)
        return {
            "input_tokens": record.prompt_tokens - record.cached_tokens - created,
            "cache_creation_input_tokens": created,
            "cache_read_input_tokens": record.cached_tokens,
            "output_tokens": record.output_tokens,
        }

    def _octavo(self, told: dict[str, Any]) -> dict[str, Any]:
        left_out, num_reasoning = self._blocks.left_out, self._record.reasoning_tokens
        # Anthropic's usage has no place for it.
        counted = {} if num_reasoning is None else {"reasoning_tokens": num_reasoning}
        return {**told["octavo"], **counted, **({"left_out": left_out} if left_out else {})}


def _events(payloads: Iterable[Payload]) -> bytes:
    return b"".join(
        b"event: %b\ndata: %b\n\n" % (payload["type"].encode(), orjson.dumps(payload))
        for payload in payloads
    )
