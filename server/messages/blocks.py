"""The blocks of an answer, told event by event: thoughts, text and calls in the model's order.

A whole answer is what its events add up to, so that it cannot differ from the stream. Knows nothing
of usage, of why an answer ends, or of how events are sent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal

import orjson

from server.tooling import Spoken
from server.tools.events import Call, Content, CutCall, Event, Reasoning
from server.tools.speech import SpeechParser

_DELTA_OF = {"text": "text_delta", "thinking": "thinking_delta"}

#: The payload of one event.
Payload = dict[str, Any]


class Blocks:
    """What one output becomes."""

    def __init__(
        self, spoken: Spoken | None, new_id: Callable[[], str], *, shows_thinking: bool = True
    ) -> None:
        """`spoken`: how it is read, None: it is plain text; `new_id` names a call.

        Without `shows_thinking` a block of thoughts is told of, but is empty.
        """
        self._spoken = spoken
        self._parser = None if spoken is None else SpeechParser(spoken.speech)
        self._new_id = new_id
        self._shows_thinking = shows_thinking
        self._num_started = 0
        self._open: Literal["text", "thinking"] | None = None
        self.num_calls = 0
        #: What the model wrote and no block holds.
        self.left_out: dict[str, Any] = {}

    def push(self, text: str) -> list[Payload]:
        """Return the events of what is known now that `text` follows."""
        if self._parser is not None:
            return self._told(self._parser.push(text))
        return self._told([Content(text)] if text else [])

    def finish(self) -> list[Payload]:
        """Return the events of what is left now that nothing follows."""
        events = [] if self._parser is None else self._parser.finish()
        return self._told(events) + self._closed()

    def check(self) -> None:
        """Assert that at most the last block is open."""
        assert self.num_calls <= self._num_started, "a call has no block"
        assert self._open is None or self._num_started, "a block is open that was never started"

    def _told(self, events: Iterable[Event]) -> list[Payload]:
        return [payload for event in events for payload in self._of(event)]

    def _of(self, event: Event) -> list[Payload]:
        match event:
            case Content(text):
                return self._more("text", text)
            case Reasoning(text):
                return self._more("thinking", text if self._shows_thinking else "")
            case Call() if self.num_calls and self._spoken and not self._spoken.has_parallel_calls:
                self.left_out["num_tool_calls"] = self.left_out.get("num_tool_calls", 0) + 1
                return []
            case Call():
                return self._call(event)
            case CutCall(text):
                self.left_out["cut_tool_call"] = text
                return []

    def _more(self, kind: Literal["text", "thinking"], text: str) -> list[Payload]:
        """Return the events of text that belongs to the open block of its kind, or to a new one."""
        payloads: list[Payload] = []
        if self._open != kind:
            signature = {"signature": ""} if kind == "thinking" else {}
            payloads += self._closed()
            payloads.append(self._started({"type": kind, kind: "", **signature}))
            self._open = kind
        if text:
            payloads.append(self._delta({"type": _DELTA_OF[kind], kind: text}))
        return payloads

    def _call(self, call: Call) -> list[Payload]:
        self.num_calls += 1
        block = {"type": "tool_use", "id": self._new_id(), "name": call.name, "input": {}}
        arguments = {"type": "input_json_delta", "partial_json": call.arguments}
        return [*self._closed(), self._started(block), self._delta(arguments), self._stopped()]

    def _closed(self) -> list[Payload]:
        if self._open is None:
            return []
        self._open = None
        return [self._stopped()]

    def _started(self, block: dict[str, Any]) -> Payload:
        self._num_started += 1
        index = self._num_started - 1
        return {"type": "content_block_start", "index": index, "content_block": block}

    def _delta(self, delta: dict[str, Any]) -> Payload:
        return {"type": "content_block_delta", "index": self._num_started - 1, "delta": delta}

    def _stopped(self) -> Payload:
        return {"type": "content_block_stop", "index": self._num_started - 1}


def summed(payloads: Iterable[Payload]) -> list[dict[str, Any]]:
    """Return the blocks that the events tell of."""
    blocks: list[dict[str, Any]] = []
    for payload in payloads:
        match payload:
            case {"content_block": block}:
                blocks.append(dict(block))
            case {"delta": {"partial_json": text}}:
                # As the model wrote it: a number may have more digits than Python reads.
                blocks[-1]["input"] = orjson.Fragment(text)
            case {"delta": {"type": "text_delta", "text": text}}:
                blocks[-1]["text"] += text
            case {"delta": {"type": "thinking_delta", "thinking": text}}:
                blocks[-1]["thinking"] += text
            case _:
                pass
    return blocks
