"""`POST /v1/messages`: the JSON of messages. Knows nothing of how they are generated."""

from __future__ import annotations

from collections.abc import Iterable

import orjson

from server.answer_types import Octavo, Report, StreamReport
from server.generation.answer_parser import call_ids
from server.generation.generate import Job
from server.generation.output import FinishWord, OutputChunk
from server.http.context import RequestRecord
from server.http.errors import ApiError, ErrorForm
from server.messages.blocks import Blocks, summed
from server.messages.diagnostics import diagnostics_of
from server.messages.response_models import (
    MessageAnswer,
    MessageEnd,
    MessageEndDelta,
    MessageEvent,
    MessageReport,
    MessagesErrorBody,
    MessageStart,
    MessageUsage,
    ReasoningReport,
    StopReason,
    WrittenBlock,
)
from server.messages.schemas import MessagesRequest
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


def message_id(record: RequestRecord) -> str:
    """Return the id of the answer to a request."""
    return f"msg_{record.request_id}"


class MessagesErrors(ErrorForm):
    """Anthropic's form, with OpenAI's `param` and `code` beside."""

    def body(self, error: ApiError) -> bytes:
        """See `ErrorForm`."""
        body: MessagesErrorBody = {
            "type": "error",
            "error": {
                "message": error.message,
                "type": ERROR_TYPES.get(error.status, "invalid_request_error"),
                "param": error.param,
                "code": error.code,
            },
            "request_id": error.request_id,
        }
        return orjson.dumps(body)

    def stream_end(self, error: ApiError) -> bytes:
        """See `ErrorForm`."""
        return b"event: error\ndata: " + self.body(error) + b"\n\n"


class Choice(MessageEnd):
    """The one answer: its blocks and its end."""

    content: list[WrittenBlock]


class MessagesFormat:
    """The one answer to a request; see `AnswerFormat`."""

    def __init__(
        self, service: Service, job: Job, record: RequestRecord, asked: MessagesRequest
    ) -> None:
        self._blocks = Blocks(
            job.parser_options,
            call_ids(service.chance, job.parser_options, "toolu_"),
            shows_thinking=asked.thinking is None or asked.thinking.display != "omitted",
        )
        self._record = record
        self._page_size = service.client.info.page_size
        self._is_cut = asked.max_tokens > job.requests[0].params.max_tokens
        self._empty: MessageAnswer = {
            "id": message_id(record),
            "type": "message",
            "role": "assistant",
            "model": service.model_name,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": self._usage(),
        }
        if asked.diagnostics is not None:
            self._empty["diagnostics"] = diagnostics_of(record.comparison)

    def opening(self) -> bytes:
        """See `AnswerFormat`."""
        message: MessageAnswer = {**self._empty, "usage": self._usage()}
        start: MessageStart = {"type": "message_start", "message": message}
        return _events([start, {"type": "ping"}])

    def chunk(self, chunk: OutputChunk) -> bytes:
        """See `AnswerFormat`."""
        return _events(self._blocks.push(chunk.text))

    def closing(self, finish_reason: FinishWord, report: StreamReport) -> bytes:
        """See `AnswerFormat`."""
        rest = self._blocks.finish()  # First: the reason depends on its calls.
        end: MessageEndDelta = {
            "type": "message_delta",
            "delta": self._end(finish_reason),
            "usage": self._usage(),
            "octavo": self._octavo(report["octavo"]),
        }
        return _events([*rest, end])

    def ending(self) -> bytes:
        """See `AnswerFormat`."""
        return _events([{"type": "message_stop"}])

    def choice(self, output: OutputChunk) -> Choice:
        """See `AnswerFormat`."""
        content = summed(self._blocks.push(output.text) + self._blocks.finish())
        return {"content": content, **self._end(output.finish_reason)}

    def answer(self, choices: list[Choice], report: Report) -> MessageAnswer:
        """See `AnswerFormat`."""
        [choice] = choices
        octavo = self._octavo(report["octavo"])
        return {**self._empty, **choice, "usage": self._usage(), "octavo": octavo}

    def _end(self, finish_reason: FinishWord | None) -> MessageEnd:
        stop_text = self._record.stop_text
        reason: StopReason
        if finish_reason == "length":
            reason = "model_context_window_exceeded" if self._is_cut else "max_tokens"
        elif stop_text is not None:
            reason = "stop_sequence"
        else:
            reason = "tool_use" if self._blocks.num_calls else "end_turn"
        return {"stop_reason": reason, "stop_sequence": stop_text}

    def _usage(self) -> MessageUsage:
        """Return Anthropic's `usage`: its three kinds of input tokens are the prompt together.

        Whole pages enter the cache as soon as they are computed. So a request without breakpoints
        put all tokens there that it did not read from the cache, except those in the last, partly
        filled page.
        """
        record, written = self._record, self._record.written_tokens
        if written is None:
            in_whole_pages = record.prompt_tokens // self._page_size * self._page_size
            written = {"5m": max(0, in_whole_pages - record.cached_tokens), "1h": 0}
        created = written["5m"] + written["1h"]
        return {
            "input_tokens": record.prompt_tokens - record.cached_tokens - created,
            "cache_creation_input_tokens": created,
            "cache_creation": {
                "ephemeral_5m_input_tokens": written["5m"],
                "ephemeral_1h_input_tokens": written["1h"],
            },
            "cache_read_input_tokens": record.cached_tokens,
            "output_tokens": record.output_tokens,
        }

    def _octavo(self, octavo: Octavo) -> MessageReport:
        more: ReasoningReport = {}
        # Anthropic's usage has no place for it.
        if self._record.reasoning_tokens is not None:
            more["reasoning_tokens"] = self._record.reasoning_tokens
        if self._blocks.left_out:
            more["left_out"] = self._blocks.left_out
        return {**octavo, **more}


def _events(events: Iterable[MessageEvent]) -> bytes:
    return b"".join(
        b"event: %b\ndata: %b\n\n" % (event["type"].encode(), orjson.dumps(event))
        for event in events
    )
