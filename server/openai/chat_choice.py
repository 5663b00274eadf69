"""A chat's choice that is more than text: reasoning and calls, whole and as a stream.

Knows nothing of how they are told apart (`server/tools/`) nor of how they are generated.
"""

from __future__ import annotations

import random
import string
from collections.abc import Sequence
from typing import Any

from server.generation.answer_parser import AnswerParser
from server.generation.generate import Job
from server.generation.output import OutputChunk
from server.generation.tooling import ParserOptions
from server.http.context import RequestRecord
from server.openai.chat import ChatFormat
from server.service import Service
from server.tools.events import (
    ArgumentsDelta,
    CallEnded,
    CallStarted,
    Content,
    CutCall,
    Event,
    Reasoning,
    joined,
)

_ID_CHARS = string.ascii_letters + string.digits
_NUM_ID_CHARS = 24
#: What the model writes of a call, by its kind.
_WRITTEN = {"function": "arguments", "custom": "input"}


class ParsedChatFormat(ChatFormat):
    """See `AnswerFormat`. A call's first delta has its name, the others its arguments."""

    def __init__(
        self,
        service: Service,
        job: Job,
        record: RequestRecord,
        index: int,
        parser_options: ParserOptions,
    ) -> None:
        super().__init__(service, job, record, index)
        self._parser_options = parser_options
        self._parser = AnswerParser(parser_options)
        self._chance = service.chance
        self._num_started = 0
        #: Of the call that was started last.
        self._kind = "function"

    def chunk(self, chunk: OutputChunk) -> bytes:
        """See `AnswerFormat`."""
        return self._chunks(self._parser.push(chunk.text), self._details([chunk]))

    def closing(self, finish_reason: str, told: dict[str, Any]) -> bytes:
        """See `AnswerFormat`."""
        rest = self._chunks(self._parser.finish(), {})
        choice = self._choice({}, {}) | {"finish_reason": self._reason(finish_reason)}
        return rest + self._envelope.closing(choice | self._told_left_out(), told)

    def choice(self, chunks: Sequence[OutputChunk]) -> dict[str, Any]:
        """See `AnswerFormat`."""
        events = self._parser.push("".join(chunk.text for chunk in chunks))
        deltas = self._deltas(joined(events + self._parser.finish()))
        self._note_prompt(chunks)
        message: dict[str, Any] = {"role": "assistant", "content": None, "refusal": None}
        for delta in deltas:
            for name, value in delta.items():
                if name == "tool_calls":
                    _add_calls(message.setdefault(name, []), value)
                else:
                    message[name] = (message.get(name) or "") + value
        if "tool_calls" not in message:
            message["content"] = message["content"] or ""
        return {
            "index": self._index,
            "message": message,
            "logprobs": None,
            "finish_reason": self._reason(chunks[-1].finish_reason),
            **self._details(chunks),
            **self._told_left_out(),
        }

    def _chunks(self, events: list[Event], details: dict[str, Any]) -> bytes:
        """Return a chunk for each event; the details of the tokens are in the first."""
        deltas = self._deltas(events)
        if details and not deltas:
            deltas = [{}]
        chunks = []
        for delta in deltas:
            chunks.append(self._envelope.choice(self._choice(delta, details), {}))
            details = {}
        return b"".join(chunks)

    def _choice(self, delta: dict[str, Any], details: dict[str, Any]) -> dict[str, Any]:
        bare = {"index": self._index, "delta": delta, "logprobs": None, "finish_reason": None}
        return bare | details

    def _deltas(self, events: list[Event]) -> list[dict[str, Any]]:
        deltas = (self._delta_of(event) for event in events)
        return [delta for delta in deltas if delta is not None]

    def _delta_of(self, event: Event) -> dict[str, Any] | None:
        match event:
            case Content(text):
                return {"content": text}
            case Reasoning(text):
                return {"reasoning_content": text}
            case CallStarted(name, is_custom):
                self._kind = "custom" if is_custom else "function"
                return {"tool_calls": [self._started(name)]}
            case ArgumentsDelta(text):
                added = {self._kind: {_WRITTEN[self._kind]: text}}
                return {"tool_calls": [{"index": self._num_started - 1, **added}]}
            case CallEnded() | CutCall():
                return None

    def _started(self, name: str) -> dict[str, Any]:
        index = self._num_started
        self._num_started += 1
        syntax = self._parser_options.syntax.calls
        num_chars = syntax.id_chars if syntax is not None else None
        return {
            "index": index,
            "id": call_id(self._chance, num_chars),
            "type": self._kind,
            self._kind: {"name": name, _WRITTEN[self._kind]: ""},
        }

    def _reason(self, reason: str | None) -> str | None:
        is_told = self._parser.num_calls and reason == "stop" and not self._parser_options.is_named
        return "tool_calls" if is_told else reason

    def _told_left_out(self) -> dict[str, Any]:
        left_out = self._parser.left_out
        return {"octavo": {"left_out": left_out}} if left_out else {}


def _add_calls(calls: list[dict[str, Any]], deltas: Sequence[dict[str, Any]]) -> None:
    """Add the deltas to the calls of a whole answer."""
    for delta in deltas:
        if "id" in delta:
            calls.append({name: value for name, value in delta.items() if name != "index"})
        else:
            kind = calls[-1]["type"]
            calls[-1][kind][_WRITTEN[kind]] += delta[kind][_WRITTEN[kind]]


def call_id(chance: random.Random, num_chars: int | None, prefix: str = "call_") -> str:
    """Return a new id; `num_chars`: of one without a prefix, for templates that insist on it."""
    drawn = "".join(chance.choices(_ID_CHARS, k=num_chars or _NUM_ID_CHARS))
    return drawn if num_chars else prefix + drawn
