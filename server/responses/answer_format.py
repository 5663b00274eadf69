"""`POST /v1/responses`: how responses look, whole and as a stream of numbered events.

Knows nothing of how they are generated or kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import orjson

from server.generation.answer_parser import AnswerParser
from server.generation.generate import Job
from server.generation.output import OutputChunk, TokenAt
from server.http import sse
from server.http.context import RequestRecord
from server.http.errors import ApiError
from server.openai.chat import logprobs_entry
from server.openai.chat_choice import call_id
from server.responses.logprobs import TextTokens
from server.responses.output import Fields, OutputItems
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
        self._num_events = 0
        parser_options = job.parser_options
        calls = parser_options.syntax.calls if parser_options is not None else None
        num_id_chars = calls.id_chars if calls is not None else None
        self._output = OutputItems(session.key, lambda: call_id(service.chance, num_id_chars))
        self._parser = AnswerParser(parser_options) if parser_options is not None else None
        #: Nothing but text is told, event by event alike but for the text and the number.
        self._is_plain = parser_options is None and not job.has_logprobs
        self._delta_head = b""
        self._tokens = TextTokens()

    def opening(self) -> bytes:
        """See `AnswerFormat`."""
        self._record.stream_end = self._failed
        begun = {**self._shell, "output": []}
        return self._told(
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
        told = self._told(self._advance(chunk))
        if self._is_plain and self._output.is_message_open:
            self._delta_head = self._output.delta_head()
        return told

    def closing(self, finish_reason: str, told: dict[str, Any]) -> bytes:
        """See `AnswerFormat`."""
        events = self._finish(finish_reason)
        response = self._finished(finish_reason, told)
        ended = {"type": f"response.{response['status']}", "response": response}
        return self._told([*events, ended])

    def ending(self) -> bytes:
        """See `AnswerFormat`: the response itself is the last event."""
        return b""

    def choice(self, chunks: Sequence[OutputChunk]) -> dict[str, Any]:
        """See `AnswerFormat`."""
        for chunk in chunks:
            self._advance(chunk)
        reason = chunks[-1].finish_reason or ""
        self._finish(reason)
        return {"finish_reason": reason}

    def answer(self, choices: list[dict[str, Any]], told: dict[str, Any]) -> dict[str, Any]:
        """See `AnswerFormat`."""
        return self._finished(choices[0]["finish_reason"], told)

    def _advance(self, chunk: OutputChunk) -> list[Fields]:
        content = self._tokens.push(chunk)
        if self._parser is not None:
            return self._said(self._parser.push(chunk.text))
        return self._said([content] if chunk.text else [])

    def _finish(self, finish_reason: str) -> list[Fields]:
        events = self._said(self._parser.finish()) if self._parser is not None else []
        events += self._rest_of_logprobs()
        is_cut = finish_reason == "length"
        if not self._output.items():
            events += self._output.text("", [])
        return events + self._output.end("incomplete" if is_cut else "completed")

    def _said(self, said: Sequence[Event]) -> list[Fields]:
        events: list[Fields] = []
        for event in said:
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

    def _called(self, call: CallStarted) -> list[Fields]:
        tool = self._session.called(call.name)
        name = call.name if tool is None else tool.given.name
        namespace = None if tool is None else tool.namespace
        return self._output.call(name, namespace, is_custom=call.is_custom)

    def _rest_of_logprobs(self) -> list[Fields]:
        rest = self._logprobs(self._tokens.rest())
        return self._output.text("", rest) if rest else []

    def _logprobs(self, tokens: Sequence[TokenAt]) -> list[Fields]:
        return [logprobs_entry(self._tokenizer, token.logprobs) for token in tokens]

    def _finished(self, finish_reason: str, told: dict[str, Any]) -> Fields:
        """Return the whole response, and have it kept."""
        is_cut = finish_reason == "length"
        left_out = self._parser.left_out if self._parser is not None else {}
        shell = self._shell | {
            "status": "incomplete" if is_cut else "completed",
            "completed_at": None if is_cut else int(self._clock.wall_s()),
            "incomplete_details": {"reason": "max_output_tokens"} if is_cut else None,
            "usage": self._usage(told["usage"]),
            "octavo": told["octavo"] | ({"left_out": left_out} if left_out else {}),
        }
        items = self._output.items()
        return {**self._session.keep(shell, items), "output": items}

    def _usage(self, usage: dict[str, Any]) -> Fields:
        num_prompt, num_output = usage["prompt_tokens"], usage["completion_tokens"]
        num_cached = usage["prompt_tokens_details"]["cached_tokens"]
        return {
            "input_tokens": num_prompt,
            "input_tokens_details": {
                "cached_tokens": num_cached,
                # What was computed is in the cache from then on.
                "cache_write_tokens": num_prompt - num_cached,
            },
            "output_tokens": num_output,
            "output_tokens_details": {"reasoning_tokens": self._record.reasoning_tokens or 0},
            "total_tokens": num_prompt + num_output,
        }

    def _failed(self, error: ApiError) -> bytes:
        """Return what ends the stream instead: the response as far as it came, then the error.

        OpenAI's client raises at the second, because it has an `error`. Nothing is kept.
        """
        detail = orjson.loads(error.body())["error"]
        code = _ERROR_CODES.get(error.status, "server_error")
        response = self._shell | {
            "status": "failed",
            "store": False,
            "error": {"code": code, "message": error.message},
            "output": self._output.items(),
        }
        flat = {name: detail[name] for name in ("code", "message", "param")}
        return self._told(
            [
                {"type": "response.failed", "response": response},
                {"type": "error", **flat, "error": detail},
            ]
        )

    def _told(self, events: Sequence[Fields]) -> bytes:
        parts = []
        for event in events:
            numbered = {"type": event["type"], "sequence_number": self._num_events, **event}
            self._num_events += 1
            parts.append(b"event: %b\n" % event["type"].encode())
            parts.append(sse.event(orjson.dumps(numbered)))
        return b"".join(parts)
