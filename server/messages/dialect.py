"""`POST /v1/messages`: how Anthropic's messages look. Knows nothing of how they are generated."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import orjson

from server.context import RequestRecord
from server.errors import ApiError
from server.generate import Job
from server.messages.blocks import Blocks, Payload, summed
from server.messages.schemas import MessagesRequest
from server.output import Piece
from server.service import Service
from server.spoken import call_id

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


class MessagesDialect:
    """The one answer to a request; see `Dialect`."""

    def __init__(
        self, service: Service, job: Job, record: RequestRecord, asked: MessagesRequest
    ) -> None:
        speech = None if job.spoken is None else job.spoken.speech
        syntax = None if speech is None else speech.calls
        num_id_chars = None if syntax is None else syntax.id_chars
        self._blocks = Blocks(
            job.spoken,
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
        """See `Dialect`."""
        none_yet: dict[str, Any] = {"content": [], "stop_reason": None, "stop_sequence": None}
        message = {**self._common, **none_yet, "usage": self._usage()}
        return _events([{"type": "message_start", "message": message}, {"type": "ping"}])

    def piece(self, piece: Piece) -> bytes:
        """See `Dialect`."""
        return _events(self._blocks.push(piece.text))

    def closing(self, finish_reason: str, told: dict[str, Any]) -> bytes:
        """See `Dialect`."""
        rest = self._blocks.finish()
        end = {"delta": self._end(finish_reason), "usage": self._usage()}
        return _events([*rest, {"type": "message_delta", **end, "octavo": self._octavo(told)}])

    def ending(self) -> bytes:
        """See `Dialect`."""
        return _events([{"type": "message_stop"}])

    def choice(self, pieces: Sequence[Piece]) -> dict[str, Any]:
        """See `Dialect`."""
        told = self._blocks.push("".join(piece.text for piece in pieces))
        content = summed(told + self._blocks.finish())
        return {"content": content, **self._end(pieces[-1].finish_reason)}

    def answer(self, choices: list[dict[str, Any]], told: dict[str, Any]) -> dict[str, Any]:
        """See `Dialect`."""
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
