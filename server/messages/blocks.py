"""The blocks of an answer, event by event: thoughts, text and calls in the model's order.

A whole answer is the sum of its events, so that it cannot differ from the stream. Knows nothing of
usage, of the reason for the end of an answer, or of how events are sent.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from typing import Any, Literal, cast

import orjson
from pydantic_core import from_json

from server.answer_types import LeftOut
from server.generation.answer_parser import AnswerParser
from server.generation.tooling import ParserOptions
from server.messages.response_models import BlockEvent, Delta, WrittenBlock
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


class Blocks:
    """The blocks of one output."""

    def __init__(
        self,
        parser_options: ParserOptions | None,
        new_id: Callable[[], str],
        *,
        shows_thinking: bool = True,
    ) -> None:
        """`parser_options`: None if the output is plain text; `new_id` makes the id of a call.

        Without `shows_thinking` blocks of thoughts are empty.
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
    def left_out(self) -> LeftOut:
        """Output of the model that is in none of the blocks."""
        return self._parser.left_out

    def push(self, text: str) -> list[BlockEvent]:
        """Take in more output; return the events that follow from it."""
        return self._payloads(self._parser.push(text))

    def finish(self) -> list[BlockEvent]:
        """Return the events at the end of the output."""
        return self._payloads(self._parser.finish()) + self._closed()

    def check(self) -> None:
        """Assert that at most the last block is open."""
        assert self.num_calls <= self._num_started, "a call has no block"
        assert self._open is None or self._num_started, "a block is open that was never started"

    def _payloads(self, events: Iterable[Event]) -> list[BlockEvent]:
        return [payload for event in events for payload in self._of(event)]

    def _of(self, event: Event) -> list[BlockEvent]:
        match event:
            case Content(text):
                begun = self._begun({"type": "text", "text": ""})
                return [*begun, self._delta({"type": "text_delta", "text": text})]
            case Reasoning(text):
                begun = self._begun({"type": "thinking", "thinking": "", "signature": ""})
                if not self._shows_thinking:
                    return begun
                return [*begun, self._delta({"type": "thinking_delta", "thinking": text})]
            case CallStarted(name):
                closed, call_id = self._closed(), self._new_id()
                block: WrittenBlock = {"type": "tool_use", "id": call_id, "name": name, "input": {}}
                return closed + self._begun(block)
            case ArgumentsDelta(text):
                return [self._delta({"type": "input_json_delta", "partial_json": text})]
            case CallEnded() | CutCall():
                return self._closed() if self._open == "tool_use" else []

    def _begun(self, block: WrittenBlock) -> list[BlockEvent]:
        """Return the events that begin a block, unless one of its type is open."""
        if self._open == block["type"]:
            return []
        closed = self._closed()
        self._open, index = block["type"], self._num_started
        self._num_started += 1
        return [*closed, {"type": "content_block_start", "index": index, "content_block": block}]

    def _closed(self) -> list[BlockEvent]:
        if self._open is None:
            return []
        self._open = None
        return [{"type": "content_block_stop", "index": self._num_started - 1}]

    def _delta(self, delta: Delta) -> BlockEvent:
        return {"type": "content_block_delta", "index": self._num_started - 1, "delta": delta}


def summed(events: Iterable[BlockEvent]) -> list[WrittenBlock]:
    """Return the blocks that the events add up to."""
    blocks: list[WrittenBlock] = []
    texts: list[str] = []
    for event in events:
        if event["type"] == "content_block_start":
            blocks.append(event["content_block"])
            texts.append("")
        elif event["type"] == "content_block_delta":
            texts[-1] += _text_of(event["delta"])
    for block, text in zip(blocks, texts, strict=True):
        if block["type"] == "text":
            block["text"] = text
        elif block["type"] == "thinking":
            block["thinking"] = text
        else:
            block["input"] = cast("Any", _object_of(text))
    return blocks


def _text_of(delta: Delta) -> str:
    if delta["type"] == "text_delta":
        return delta["text"]
    return delta["thinking"] if delta["type"] == "thinking_delta" else delta["partial_json"]


def _object_of(text: str) -> orjson.Fragment:
    """Return a call's arguments as an object: of cut arguments, the complete members."""
    if JsonObject(0).advance(text) is Status.DONE:
        # As the model wrote it: a number may have more digits than Python reads.
        return orjson.Fragment(text)
    try:
        return orjson.Fragment(json.dumps(from_json(text, allow_partial=True)))
    except ValueError:
        return orjson.Fragment("{}")
