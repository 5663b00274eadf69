"""A chat's choice that is more than text: reasoning and calls, whole and as a stream.

Knows nothing of how they are told apart (`server/tools/`) nor of how they are generated.
"""

from __future__ import annotations

import random
import string
from collections.abc import Sequence
from typing import Any

from server.chat import ChatDialect
from server.context import RequestRecord
from server.generate import Job
from server.output import Piece
from server.service import Service
from server.tooling import Spoken
from server.tools.events import Call, Content, CutCall, Event, Reasoning
from server.tools.speech import SpeechParser

_ID_CHARS = string.ascii_letters + string.digits
_NUM_ID_CHARS = 24


class SpokenDialect(ChatDialect):
    """See `Dialect`. A call is told in one delta: it is known only when it is complete."""

    def __init__(
        self, service: Service, job: Job, record: RequestRecord, index: int, spoken: Spoken
    ) -> None:
        super().__init__(service, job, record, index)
        self._spoken = spoken
        self._parser = SpeechParser(spoken.speech)
        self._chance = service.chance
        self._num_calls = 0
        #: What the reader is not given otherwise.
        self._left_out: dict[str, Any] = {}

    def piece(self, piece: Piece) -> bytes:
        """See `Dialect`."""
        return self._chunks(self._parser.push(piece.text), self._details([piece]))

    def closing(self, finish_reason: str, told: dict[str, Any]) -> bytes:
        """See `Dialect`."""
        rest = self._chunks(self._parser.finish(), {})
        choice = self._choice({}, {}) | {"finish_reason": self._reason(finish_reason)}
        return rest + self._envelope.closing(choice | self._told_left_out(), told)

    def choice(self, pieces: Sequence[Piece]) -> dict[str, Any]:
        """See `Dialect`."""
        events = self._parser.push("".join(piece.text for piece in pieces))
        deltas = self._deltas(events + self._parser.finish())
        self._note_prompt(pieces)
        message: dict[str, Any] = {"role": "assistant", "content": None, "refusal": None}
        for delta in deltas:
            for name, value in delta.items():
                if isinstance(value, list):
                    calls = [{k: v for k, v in call.items() if k != "index"} for call in value]
                    message[name] = [*message.get(name, ()), *calls]
                else:
                    message[name] = (message.get(name) or "") + value
        if not self._num_calls:
            message["content"] = message["content"] or ""
        return {
            "index": self._index,
            "message": message,
            "logprobs": None,
            "finish_reason": self._reason(pieces[-1].finish_reason),
            **self._details(pieces),
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
                return {"reasoning_content": text} if self._spoken.has_reasoning else None
            case Call() if self._num_calls and not self._spoken.has_parallel_calls:
                self._left_out["num_tool_calls"] = self._left_out.get("num_tool_calls", 0) + 1
                return None
            case Call():
                return {"tool_calls": [self._call(event)]}
            case CutCall(text):
                self._left_out["cut_tool_call"] = text
                return None

    def _call(self, call: Call) -> dict[str, Any]:
        index = self._num_calls
        self._num_calls += 1
        syntax = self._spoken.speech.calls
        num_chars = syntax.id_chars if syntax is not None else None
        return {
            "index": index,
            "id": call_id(self._chance, num_chars),
            "type": "function",
            "function": {"name": call.name, "arguments": call.arguments},
        }

    def _reason(self, reason: str | None) -> str | None:
        is_told = self._num_calls and reason == "stop" and not self._spoken.is_named
        return "tool_calls" if is_told else reason

    def _told_left_out(self) -> dict[str, Any]:
        return {"octavo": {"left_out": self._left_out}} if self._left_out else {}


def call_id(chance: random.Random, num_chars: int | None, prefix: str = "call_") -> str:
    """Return a new id; `num_chars`: of one without a prefix, for templates that insist on it."""
    drawn = "".join(chance.choices(_ID_CHARS, k=num_chars or _NUM_ID_CHARS))
    return drawn if num_chars else prefix + drawn
