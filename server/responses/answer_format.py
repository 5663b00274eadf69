"""`POST /v1/responses`: the JSON of responses, whole and as a stream of numbered events.

Knows nothing of how they are generated or kept.
"""

from __future__ import annotations

from collections.abc import Sequence

import orjson

from server.answer_types import (
    ErrorDetail,
    LeftOutReport,
    Report,
    StreamReport,
    TokenLogprob,
    Usage,
)
from server.generation.answer_parser import AnswerParser, call_ids
from server.generation.generate import Job
from server.generation.output import FinishWord, OutputChunk, TokenAt
from server.generation.prompt_logprobs import logprobs_entry
from server.http import sse
from server.http.context import RequestRecord
from server.http.errors import ApiError
from server.responses.diagnostics import diagnostics_of
from server.responses.logprobs import TextTokens
from server.responses.output import OutputItems
from server.responses.response_models import (
    EventFields,
    InputTokensDetails,
    ResponseBody,
    ResponseEvent,
    ResponseOctavo,
    ResponseShell,
    ResponseUsage,
)
from server.responses.response_session import ResponseSession
from server.service import Service
from server.tools.events import (
    ArgumentsDelta,
    CallEnded,
    CallStarted,
    Content,
    CutCall,
    Event,
    Reasoning,
)

#: OpenAI's `error.code` of a response that failed.
_ERROR_CODES = {429: "rate_limit_exceeded", 400: "invalid_prompt"}


class ResponsesFormat:
    """The one choice of a response; see `AnswerFormat`."""

    def __init__(
        self, service: Service, job: Job, record: RequestRecord, session: ResponseSession
    ) -> None:
        self._tokenizer = service.text.tokenizer
        self._clock = service.clock
        self._job = job
        self._record = record
        self._session = session
        self._shell = session.shell(job)
        if record.comparison is not None:
            num_prompt = len(job.prompts[0])
            self._shell["prompt_cache_diagnostics"] = diagnostics_of(record.comparison, num_prompt)
        self._num_events = 0
        options = job.parser_options
        self._output = OutputItems(session.key, call_ids(service.chance, options))
        self._parser = AnswerParser(options)
        #: There is only text, and events differ only in the text and the number.
        self._is_plain = options is None and not job.has_logprobs
        self._delta_head = b""
        self._tokens = TextTokens()

    def opening(self) -> bytes:
        """See `AnswerFormat`."""
        self._record.stream_end = self._failed
        begun: ResponseBody = {**self._shell, "output": []}
        return self._numbered(
            [
                {"type": "response.created", "response": begun},
                {"type": "response.in_progress", "response": begun},
            ]
        )

    def chunk(self, chunk: OutputChunk) -> bytes:
        """See `AnswerFormat`."""
        if self._delta_head and chunk.text:
            self._output.grow(chunk.text)
            number = b"%d" % self._num_events
            self._num_events += 1
            text = orjson.dumps(chunk.text)
            return b"".join((self._delta_head, number, b',"delta":', text, b"}\n\n"))
        events = self._numbered(self._advance(chunk))
        if self._is_plain and self._output.is_message_open:
            self._delta_head = self._output.delta_head()
        return events

    def closing(self, finish_reason: FinishWord, report: StreamReport) -> bytes:
        """See `AnswerFormat`."""
        events = self._finish(finish_reason)
        response = self._finished(finish_reason, report)
        is_cut = self._is_cut(finish_reason)
        ended: EventFields = {
            "type": "response.incomplete" if is_cut else "response.completed",
            "response": response,
        }
        return self._numbered([*events, ended])

    def ending(self) -> bytes:
        """See `AnswerFormat`: the response itself is the last event."""
        return b""

    def choice(self, output: OutputChunk) -> FinishWord:
        """See `AnswerFormat`."""
        assert output.finish_reason is not None, "the output has not ended"
        self._advance(output)
        self._finish(output.finish_reason)
        return output.finish_reason

    def answer(self, choices: list[FinishWord], report: Report) -> ResponseBody:
        """See `AnswerFormat`."""
        return self._finished(choices[0], {**report})

    def _advance(self, chunk: OutputChunk) -> list[EventFields]:
        self._tokens.push(chunk)
        return self._events(self._parser.push(chunk.text))

    def _finish(self, finish_reason: FinishWord) -> list[EventFields]:
        events = self._events(self._parser.finish())
        events += self._rest_of_logprobs()
        if not self._output.items() and not self._job.spec.is_prewarming:
            events += self._output.text("", [])
        return events + self._output.end(
            "incomplete" if self._is_cut(finish_reason) else "completed"
        )

    def _is_cut(self, finish_reason: FinishWord) -> bool:
        return finish_reason == "length" and not self._job.spec.is_prewarming

    def _events(self, parsed: Sequence[Event]) -> list[EventFields]:
        events: list[EventFields] = []
        for event in parsed:
            match event:
                case Content(text):
                    events += self._output.text(text, self._logprobs(self._tokens.of(event)))
                case Reasoning(text):
                    events += self._output.reasoning(text)
                case CallStarted():
                    events += self._rest_of_logprobs() + self._called(event)
                case ArgumentsDelta(text):
                    events += self._output.arguments(text)
                case CallEnded():
                    events += self._output.end("completed")
                case CutCall():
                    events += self._output.end("incomplete") if self._output.is_call_open else []
        return events

    def _called(self, call: CallStarted) -> list[EventFields]:
        tool = self._session.called(call.name)
        name = call.name if tool is None else tool.given.name
        namespace = None if tool is None else tool.namespace
        return self._output.call(name, namespace, is_custom=call.is_custom)

    def _rest_of_logprobs(self) -> list[EventFields]:
        rest = self._logprobs(self._tokens.rest())
        return self._output.text("", rest) if rest else []

    def _logprobs(self, tokens: Sequence[TokenAt]) -> list[TokenLogprob]:
        return [logprobs_entry(self._tokenizer, token.logprobs) for token in tokens]

    def _finished(self, finish_reason: FinishWord, report: StreamReport) -> ResponseBody:
        """Return the whole response, and store it."""
        is_cut = self._is_cut(finish_reason)
        more: LeftOutReport = {"left_out": self._parser.left_out} if self._parser.left_out else {}
        octavo: ResponseOctavo = {**report["octavo"], **more}
        shell: ResponseShell = {
            **self._shell,
            "status": "incomplete" if is_cut else "completed",
            "completed_at": None if is_cut else int(self._clock.wall_s()),
            "incomplete_details": {"reason": "max_output_tokens"} if is_cut else None,
            "usage": self._usage(report["usage"]),
            "octavo": octavo,
        }
        items = self._output.items()
        return {**self._session.keep(shell, items), "output": items}

    def _usage(self, usage: Usage) -> ResponseUsage:
        num_prompt, num_output = usage["prompt_tokens"], usage["completion_tokens"]
        num_cached = usage["prompt_tokens_details"]["cached_tokens"]
        details: InputTokensDetails = {
            "cached_tokens": num_cached,
            # Computed tokens are in the cache from then on.
            "cache_write_tokens": num_prompt - num_cached,
        }
        if (written := self._record.written_tokens) is not None:
            details["cache_write_tokens"] = sum(written.values())
            # OpenAI has no other lifetimes here.
            if not written["24h"]:
                details["cache_write_tokens_details"] = {
                    "ttl_30m_tokens": written["30m"],
                    "ttl_12h_tokens": written["12h"],
                }
        return {
            "input_tokens": num_prompt,
            "input_tokens_details": details,
            "output_tokens": num_output,
            "output_tokens_details": {"reasoning_tokens": self._record.reasoning_tokens or 0},
            "total_tokens": num_prompt + num_output,
        }

    def _failed(self, error: ApiError) -> bytes:
        """Return the events that end the stream instead: the response so far, then the error.

        OpenAI's client raises at the second, because it has an `error`. Nothing is stored.
        """
        detail: ErrorDetail = orjson.loads(error.body())["error"]
        response: ResponseBody = {
            **self._shell,
            "status": "failed",
            "store": False,
            "error": {
                "code": _ERROR_CODES.get(error.status, "server_error"),
                "message": error.message,
            },
            "output": self._output.items(),
        }
        ended: EventFields = {
            "type": "error",
            "code": detail["code"],
            "message": detail["message"],
            "param": detail["param"],
            "error": detail,
        }
        return self._numbered([{"type": "response.failed", "response": response}, ended])

    def _numbered(self, events: Sequence[EventFields]) -> bytes:
        parts = []
        for event in events:
            numbered: ResponseEvent = {
                "type": event["type"],
                "sequence_number": self._num_events,
                **event,
            }
            self._num_events += 1
            parts.append(b"event: %b\n" % event["type"].encode())
            parts.append(sse.event(orjson.dumps(numbered)))
        return b"".join(parts)
