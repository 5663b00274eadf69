"""The blocks of an answer, told event by event: thoughts, text and calls in the model's order.

A whole answer is what its events add up to, so that it cannot differ from the stream. Knows nothing
of usage, of why an answer ends, or of how events are sent.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from typing import Any, Literal

import orjson
from pydantic_core import from_json

from server.generation.answer_parser import AnswerParser
from server.generation.tooling import ParserOptions
from server.tools.events import (
    ArgumentsDelta,
    CallEnded,
    CallStarted,
    Content,
    CutCall,
    Event,
    Reasoning,
)
from server.tools.json_object import JsonObject, Status

_DELTA_OF = {"text": "text_delta", "thinking": "thinking_delta"}

#: The payload of one event.
Payload = dict[str, Any]


class Blocks:
    """What one output becomes."""

    def __init__(
        self,
        parser_options: ParserOptions | None,
        new_id: Callable[[], str],
        *,
        shows_thinking: bool = True,
    ) -> None:
        """`parser_options`: how it is read, None: it is plain text; `new_id` names a call.

        Without `shows_thinking` a block of thoughts is told of, but is empty.
        """
        self._parser = AnswerParser(parser_options)
        self._new_id = new_id
        self._shows_thinking = shows_thinking
        self._num_started = 0
        self._open: Literal["text", "thinking", "tool_use"] | None = None

    @property
    def num_calls(self) -> int:
        """Complete calls among the blocks."""
        return self._parser.num_calls

    @property
    def left_out(self) -> dict[str, Any]:
        """What the model wrote and no block holds."""
        return self._parser.left_out

    def push(self, text: str) -> list[Payload]:
        """Return the events of what is known now that `text` follows."""
        return self._told(self._parser.push(text))

    def finish(self) -> list[Payload]:
        """Return the events of what is left now that nothing follows."""
        return self._told(self._parser.finish()) + self._closed()

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
            case CallStarted(name):
                return self._call(name)
            case ArgumentsDelta(text):
                return [self._delta({"type": "input_json_delta", "partial_json": text})]
            case CallEnded():
                return self._closed()
            case CutCall():
                return self._closed() if self._open == "tool_use" else []

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

    def _call(self, name: str) -> list[Payload]:
        block = {"type": "tool_use", "id": self._new_id(), "name": name, "input": {}}
        payloads = [*self._closed(), self._started(block)]
        self._open = "tool_use"
        return payloads

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
    inputs: dict[int, str] = {}
    for payload in payloads:
        match payload:
            case {"content_block": block}:
                blocks.append(dict(block))
            case {"delta": {"partial_json": text}}:
                inputs[len(blocks) - 1] = inputs.get(len(blocks) - 1, "") + text
            case {"delta": {"type": "text_delta", "text": text}}:
                blocks[-1]["text"] += text
            case {"delta": {"type": "thinking_delta", "thinking": text}}:
                blocks[-1]["thinking"] += text
            case _:
                pass
    for index, text in inputs.items():
        blocks[index]["input"] = _object_of(text)
    return blocks


def _object_of(text: str) -> orjson.Fragment:
    """Return the object that a call's arguments are; if they are cut, its complete members."""
    if JsonObject(0).advance(text) is Status.DONE:
        # As the model wrote it: a number may have more digits than Python reads.
        return orjson.Fragment(text)
    try:
        return orjson.Fragment(json.dumps(from_json(text, allow_partial=True)))
    except ValueError:
        return orjson.Fragment("{}")
