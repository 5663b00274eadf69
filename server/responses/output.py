"""The items of a response in the making, and the events of each change.

Events have no number yet. At any moment at most one item is open, the last. Knows nothing of
tokens or of how events are sent.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, cast

import orjson

from server.answer_types import TokenLogprob
from server.responses.conversation import item_id
from server.responses.response_models import (
    EventFields,
    EventType,
    Namespace,
    OutputItem,
    OutputText,
    ReasoningText,
    Status,
)

Ended = Literal["completed", "incomplete"]
Kind = Literal["message", "reasoning", "function_call", "custom_tool_call"]

#: By kind of item, the events of an addition and of the end of its text.
_DELTA: dict[Kind, EventType] = {
    "message": "response.output_text.delta",
    "reasoning": "response.reasoning_text.delta",
    "function_call": "response.function_call_arguments.delta",
    "custom_tool_call": "response.custom_tool_call_input.delta",
}
_DONE = {
    kind: cast("EventType", f"{name.removesuffix('.delta')}.done") for kind, name in _DELTA.items()
}


@dataclass(slots=True)
class _OpenItem:
    """The item that is being written."""

    kind: Kind
    id: str
    index: int
    #: Of a call.
    call_id: str = ""
    name: str = ""
    namespace: Namespace = field(default_factory=Namespace)
    texts: list[str] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "".join(self.texts)

    @property
    def has_part(self) -> bool:
        return self.kind in {"message", "reasoning"}

    def output_text(self) -> OutputText:
        logprobs = list(self.logprobs)
        return {"type": "output_text", "text": self.text, "annotations": [], "logprobs": logprobs}

    def reasoning_text(self) -> ReasoningText:
        return {"type": "reasoning_text", "text": self.text}

    def part(self) -> OutputText | ReasoningText:
        return self.output_text() if self.kind == "message" else self.reasoning_text()

    def item(self, status: Status, *, has_parts: bool = True) -> OutputItem:
        """Return the item as it is now."""
        match self.kind:
            case "message":
                return {
                    "id": self.id,
                    "type": "message",
                    "status": status,
                    "content": [self.output_text()] if has_parts else [],
                    "role": "assistant",
                }
            case "reasoning":
                return {
                    "id": self.id,
                    "type": "reasoning",
                    "status": status,
                    "content": [self.reasoning_text()] if has_parts else [],
                    "summary": [],
                }
            case "function_call":
                return {
                    "id": self.id,
                    "type": "function_call",
                    "call_id": self.call_id,
                    "name": self.name,
                    "arguments": self.text,
                    **self.namespace,
                    "status": status,
                }
            case "custom_tool_call":
                return {
                    "id": self.id,
                    "type": "custom_tool_call",
                    "call_id": self.call_id,
                    "name": self.name,
                    "input": self.text,
                    **self.namespace,
                    "status": status,
                }

    def event(self, kind: EventType) -> EventFields:
        """Return the fields of an event that refer to the item and its part."""
        event: EventFields = {"type": kind, "item_id": self.id, "output_index": self.index}
        if self.has_part:
            event["content_index"] = 0
        return event

    def delta(self, text: str) -> EventFields:
        """Add `text`; return the event of it."""
        self.texts.append(text)
        return {**self.event(_DELTA[self.kind]), "delta": text}

    def done(self, status: Ended) -> list[EventFields]:
        """Return the events of the end of its text: a call's only where it is complete."""
        if self.has_part:
            part = self.part()
            text_done: EventFields = {**self.event(_DONE[self.kind]), "text": part["text"]}
            if part["type"] == "output_text":
                text_done["logprobs"] = part["logprobs"]
            return [text_done, {**self.event("response.content_part.done"), "part": part}]
        if status == "incomplete":
            return []
        event = self.event(_DONE[self.kind])
        if self.kind == "custom_tool_call":
            return [{**event, "input": self.text}]
        return [{**event, "name": self.name, "arguments": self.text}]


class OutputItems:
    """The items of one output, in the model's order."""

    def __init__(self, response_key: str, new_call_id: Callable[[], str]) -> None:
        """`response_key` goes into the items' ids."""
        self._response_key = response_key
        self._new_call_id = new_call_id
        self._ended: list[OutputItem] = []
        self._open: _OpenItem | None = None

    @property
    def is_message_open(self) -> bool:
        """Whether the last item is a message, to which the next text is added."""
        return self._open is not None and self._open.kind == "message"

    @property
    def is_call_open(self) -> bool:
        """Whether the last item is a call that is not complete."""
        return self._open is not None and not self._open.has_part

    def items(self) -> list[OutputItem]:
        """Return the items as they are now."""
        return [*self._ended, *([self._open.item("in_progress")] if self._open else [])]

    def text(self, text: str, logprobs: list[TokenLogprob]) -> list[EventFields]:
        """Add to the message, or begin one."""
        message, events = self._of_kind("message")
        message.logprobs += logprobs
        return [*events, {**message.delta(text), "logprobs": logprobs}]

    def grow(self, text: str) -> None:
        """Add to the message, which is open, without an event."""
        assert self._open is not None, "no message is open"
        self._open.texts.append(text)

    def delta_head(self) -> bytes:
        """Return the event of the next text up to its number: `grow` and this are `text`."""
        assert self._open is not None, "no message is open"
        event: EventFields = {**self._open.event(_DELTA["message"]), "logprobs": []}
        head = orjson.dumps(event)[:-1] + b',"sequence_number":'
        return b"event: %b\ndata: %b" % (event["type"].encode(), head)

    def reasoning(self, text: str) -> list[EventFields]:
        """Add to the reasoning, or begin it."""
        reasoning, events = self._of_kind("reasoning")
        return [*events, reasoning.delta(text)]

    def call(self, name: str, namespace: str | None, *, is_custom: bool) -> list[EventFields]:
        """Begin a call."""
        events = self.end("completed")
        call = self._begin("custom_tool_call" if is_custom else "function_call")
        call.call_id, call.name = self._new_call_id(), name
        if namespace is not None:
            call.namespace = {"namespace": namespace}
        return [*events, self._added(call)]

    def arguments(self, text: str) -> list[EventFields]:
        """Add to the arguments of the call that is open."""
        assert self._open is not None, "no call is open"
        return [self._open.delta(text)]

    def end(self, status: Ended) -> list[EventFields]:
        """End the item that is open, if one is."""
        if (ended := self._open) is None:
            return []
        self._open = None
        item = ended.item(status)
        self._ended.append(item)
        done: EventFields = {
            "type": "response.output_item.done",
            "output_index": ended.index,
            "item": item,
        }
        return [*ended.done(status), done]

    def _of_kind(
        self, kind: Literal["message", "reasoning"]
    ) -> tuple[_OpenItem, list[EventFields]]:
        """Return the open item if it is of this kind, or a new one, and the events of its begin."""
        if self._open is not None and self._open.kind == kind:
            return self._open, []
        events = self.end("completed")
        begun = self._begin(kind)
        part: EventFields = {**begun.event("response.content_part.added"), "part": begun.part()}
        return begun, [*events, self._added(begun), part]

    def _begin(self, kind: Kind) -> _OpenItem:
        index = len(self._ended)
        own_id = item_id(kind, self._response_key, index, is_output=True)
        self._open = _OpenItem(kind, own_id, index)
        return self._open

    def _added(self, begun: _OpenItem) -> EventFields:
        item = begun.item("in_progress", has_parts=False)
        return {"type": "response.output_item.added", "output_index": begun.index, "item": item}
